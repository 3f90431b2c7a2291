"""Files of `torch.save`, read without running code or allocating more memory than the file justifies."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ldm.embeddings.concept import EmbeddingError
from ldm.pickles import MAX_DEPTH, MAX_PICKLE, Pickle, Storage, TensorRecord, interpret, tensor_records
from ldm.util import UserError, shown

_MAX_ENTRIES = 2**16
# torch.save does not compress, and compression does not halve learned numbers; this much more is allowed.
_SLACK = 2**20
_MAX_NUMBERS = 256 * 2**20
# torch.save does not compress the pickle either; archives that were packed again do.
_MAX_RATIO = 32
_MAGIC = 0x1950A86A20F9469CFC6C
_CHUNK = 2**20


class TorchFile:
    """A file of `torch.save`: what it holds, with `TensorRecord` for tensors, until `load` reads the numbers.

    Raises EmbeddingError if it is not such a file, is damaged, or unpacks to far more than it has.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.size = path, path.stat().st_size
        self._zip = kind == "zip"
        self._places: dict[str, int | str] = {}
        self.pickle = self._open_zip() if self._zip else self._open_stream()

    def load(self) -> Any:
        """Return the content with its tensors; raises EmbeddingError if they need more bytes than the file has."""
        if self.pickle.foreign:
            raise EmbeddingError(_asks_for(self.pickle))
        records = tensor_records(self.pickle.content)
        for record in records:
            record.check()
        needed = sum(record.nbytes for record in records)
        if needed > min(2 * self.size + _SLACK, _MAX_NUMBERS):
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
        with _unzipped(self.path) as archive:
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

    def _open_zip(self) -> Pickle:
        with _unzipped(self.path) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            if len(entries) > _MAX_ENTRIES or unpacked > 2 * self.size + _SLACK:
                raise EmbeddingError("it unpacks to more than any embedding holds; it may be a zip bomb")
            by_name = {entry.filename: entry for entry in entries}
            pickled = [name for name in by_name if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickled) != 1:
                raise EmbeddingError("it is a zip archive, but not of torch.save; unpack it first")
            root = pickled[0].removesuffix("data.pkl")
            if f"{root}constants.pkl" in by_name:
                raise EmbeddingError("it is a TorchScript program, not an embedding")
            order = by_name.get(f"{root}byteorder")
            if order is not None and order.file_size < 16 and archive.read(order) == b"big":
                raise EmbeddingError(
                    "it was written on a big-endian machine; write it again on a little-endian one"
                )
            if by_name[pickled[0]].file_size > min(MAX_PICKLE, _MAX_RATIO * self.size):
                raise EmbeddingError(
                    "its data.pkl is larger than any embedding's; it is a training state of a model, or malicious"
                )
            self._places = {
                name.removeprefix(f"{root}data/"): name for name in by_name if name.startswith(f"{root}data/")
            }
            with archive.open(pickled[0]) as file:
                return interpret(file.read(MAX_PICKLE))

    def _open_stream(self) -> Pickle:
        """Open the layout of torch before 1.6: pickles of magic, protocol, machine, content, keys; then storages."""
        with self.path.open("rb") as file:
            head = file.read(5 * MAX_PICKLE)
            parts = [interpret(head)]
            if parts[0].foreign:
                raise EmbeddingError(_asks_for(parts[0]))
            if parts[0].content != _MAGIC:
                raise EmbeddingError("it is a pickle, but not of torch.save; only tensors are read")
            for _ in range(4):
                parts.append(interpret(head, parts[-1].end))
            content, keys, place = parts[3], parts[4].content, parts[4].end
            declared = sum(storage.numbers * storage.dtype.itemsize for storage in content.storages.values())
            if declared > self.size - place:
                raise EmbeddingError(
                    f"it declares {declared} bytes of tensors and holds {self.size - place}; it is cut off"
                )
            is_list = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
            if not is_list or sorted(keys) != sorted(content.storages):
                raise EmbeddingError("its list of storages is damaged; download it again")
            for key in keys:
                file.seek(place)
                storage = content.storages[key]
                if file.read(8) != struct.pack("<q", storage.numbers):
                    raise EmbeddingError("the size of a storage differs from its tensor's; it is damaged")
                self._places[key] = place + 8
                place += 8 + storage.numbers * storage.dtype.itemsize
            if place > self.size:
                raise EmbeddingError("it is cut off; download it again")
        return content


# What pickles of other harmless numbers ask for, by the beginnings of the names.
_OTHER_NUMBERS = {
    ("numpy._core.multiarray.", "numpy.core.multiarray.", "numpy.dtype", "numpy.ndarray", "_codecs.encode"): (
        "arrays of numpy"
    ),
    ("torch._utils._rebuild_tensor_v3", "torch.float8_", "torch.uint", "torch.storage.UntypedStorage"): (
        "numbers of fewer bits"
    ),
    ("torch._utils._rebuild_sparse", "torch.sparse_", "torch.Size"): "sparse tensors",
    ("torch._utils._rebuild_qtensor", "torch.Q", "torch.per_", "torch.q"): "quantised tensors",
    (
        "torch._utils._rebuild_meta",
        "torch.float",
        "torch.serialization._get_layout",
    ): "tensors without values",
    ("torch.Complex", "torch.complex"): "complex numbers",
}


def _asks_for(pickle: Pickle) -> str:
    known = tuple(name for names in _OTHER_NUMBERS for name in names)
    if all(name.startswith(known) for name in pickle.foreign):
        kind = next(kind for names, kind in _OTHER_NUMBERS.items() if pickle.foreign[0].startswith(names))
        return f"it holds {kind}; save dense torch tensors of float32, for example as .safetensors"
    asked = next(name for name in pickle.foreign if not name.startswith(known))
    return f"it asks for '{asked}', which no embedding needs; it may be malicious"


@contextlib.contextmanager
def _unzipped(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive; whatever zipfile finds damaged becomes an EmbeddingError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except Exception as error:  # zipfile raises many classes on damaged archives
        raise EmbeddingError(f"it is damaged or cut off ({shown(str(error))}); download it again") from error


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
    for head in (_MAGIC, _PROTOCOL, _SYSTEM):
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
