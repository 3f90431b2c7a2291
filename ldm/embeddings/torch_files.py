"""Files of `torch.save`, read without running code or allocating more memory than the file justifies."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ldm.embeddings.concept import EmbeddingError
from ldm.outlines import MAGIC, SLACK, asks_for, outline_of, unzipped
from ldm.pickles import MAX_DEPTH, Storage, TensorRecord, tensor_records

_MAX_NUMBERS = 256 * 2**20
_CHUNK = 2**20


class TorchFile:
    """A file of `torch.save`: what it holds, with `TensorRecord` for tensors, until `load` reads the numbers.

    Raises EmbeddingError if it is not such a file, is damaged, or unpacks to far more than it has.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.size = path, path.stat().st_size
        outline = outline_of(path, kind)
        self.pickle, self._places = outline.pickle, outline.places

    def load(self) -> Any:
        """Return the content with its tensors; raises EmbeddingError if they need more bytes than the file has."""
        if self.pickle.foreign:
            raise EmbeddingError(asks_for(self.pickle))
        records = tensor_records(self.pickle.content)
        for record in records:
            record.check()
        needed = sum(record.nbytes for record in records)
        if needed > min(2 * self.size + SLACK, _MAX_NUMBERS):
            raise EmbeddingError(
                f"its tensors need {needed:,} bytes and the file has {self.size:,}; it is no embedding, or a "
                "malicious one"
            )
        return self._loaded(self.pickle.content, {})

    def _loaded(self, value: Any, known: dict[int, Any], depth: int = 0) -> Any:
        """Return a copy of nested containers with tensors; `known` are the copies by the id of their original."""
        if not isinstance(value, (TensorRecord, dict, list, tuple)):
            return value
        if id(value) not in known:
            known[id(value)] = None  # what a container that holds itself, or is nested too deeply, becomes
            if isinstance(value, TensorRecord):
                known[id(value)] = self._tensor(value)
            elif depth <= MAX_DEPTH and isinstance(value, dict):
                items = [(key, self._loaded(item, known, depth + 1)) for key, item in value.items()]
                known[id(value)] = type(value)(items)
            elif depth <= MAX_DEPTH:
                known[id(value)] = type(value)([self._loaded(item, known, depth + 1) for item in value])
        return known[id(value)]

    def _tensor(self, record: TensorRecord) -> Tensor:
        if not record.numel:
            return torch.zeros(record.shape, dtype=record.storage.dtype)
        item = record.storage.dtype.itemsize
        data = self._numbers(record.storage, record.offset * item, record.span * item)
        flat = torch.frombuffer(data, dtype=record.storage.dtype)
        return flat.as_strided(record.shape, record.stride).clone()

    def _numbers(self, storage: Storage, start: int, length: int) -> bytearray:
        """Read a part of a storage; the other parts are read too, for the checksum, but not kept."""
        place = self._places.get(storage.key)
        total = storage.numbers * storage.dtype.itemsize
        if isinstance(place, int):
            with self.path.open("rb") as file:
                file.seek(place + start)
                return bytearray(file.read(length))
        kept = bytearray()
        with unzipped(self.path) as archive:
            if place is None or archive.getinfo(place).file_size < total:
                raise EmbeddingError("it declares a tensor whose numbers are missing; it is damaged")
            with archive.open(place) as file:
                at = 0
                while chunk := file.read(_CHUNK):
                    kept += chunk[max(start - at, 0) : max(start + length - at, 0)]
                    at += len(chunk)
        if len(kept) != length:
            raise EmbeddingError("it declares a tensor whose numbers are missing; it is damaged")
        return kept


_PROTOCOL = 1001
_SYSTEM = {
    "protocol_version": _PROTOCOL,
    "little_endian": sys.byteorder == "little",
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}


class _Pickler(pickle.Pickler):
    """Pickles tensors without their storages, which it numbers in the order of their first use."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)
        self.storages: dict[int, tuple[str, torch.storage.TypedStorage]] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, torch.storage.TypedStorage):
            return None
        key, _ = self.storages.setdefault(obj._cdata, (str(len(self.storages)), obj))
        return ("storage", getattr(torch, obj._pickle_storage_type()), key, "cpu", obj._size(), None)


def save_legacy(content: Any, file: BinaryIO) -> None:
    """Write dicts, texts, numbers and CPU tensors in the layout of torch before 1.6.

    Equal contents give equal bytes.
    """
    for head in (MAGIC, _PROTOCOL, _SYSTEM):
        pickle.dump(head, file, protocol=2)
    pickler = _Pickler(file)
    pickler.dump(content)
    pickle.dump([key for key, _ in pickler.storages.values()], file, protocol=2)
    for _, storage in pickler.storages.values():
        numbers = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
        file.write(struct.pack("<q", storage._size()) + numbers.numpy().tobytes())


def save_zip(content: Any, file: BinaryIO) -> None:
    """Write what `torch.save` writes, with only the entries that torch 1.6 to 2.0 wrote.

    AUTOMATIC1111 refuses an archive with any other entry as malicious. Equal contents give equal bytes.
    """
    whole = io.BytesIO()
    torch.save(content, whole)
    with zipfile.ZipFile(whole) as new, zipfile.ZipFile(file, "w") as old:
        for name in new.namelist():
            if name.split("/")[1] in ("data.pkl", "data", "version"):
                old.writestr(zipfile.ZipInfo(name), new.read(name))
