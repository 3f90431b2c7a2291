"""Files of `torch.save`, both layouts: sizes are held against the file before anything is allocated."""

from __future__ import annotations

import io
import zipfile
from typing import Any

from torch import nn

from ldm import pickles
from ldm.embeddings.concept import EmbeddingError
from ldm.embeddings.pickle_scan import scan

# The largest real files hold a whole vocabulary table because someone saved a slice of it (0.15 GB).
MAX_BYTES = 512 * 2**20
_MAX_PICKLE = 2**21
_MAX_ENTRIES = 4096
# torch.save does not compress, and learned numbers do not shrink by half if someone else does.
_SLACK = 2**20
_MAGIC = 0x1950A86A20F9469CFC6C


def load_torch(data: bytes) -> Any:
    """Read a `torch.save` file given as bytes, without running anything in it.

    Raises EmbeddingError with the reason if it is not one, is damaged, asks for more than tensors need or
    claims more memory than it brings.
    """
    stream = _clean_zip(data) if data[:4] == b"PK\x03\x04" else _checked_stream(data)
    try:
        return pickles.load(io.BytesIO(stream), classes=(nn.ParameterDict,), what="it")
    except pickles.PickleError as error:
        raise EmbeddingError(str(error)) from error


def _clean_zip(data: bytes) -> bytes:
    """The same archive written anew with only the records its pickle declares.

    Two zip readers may see two archives in one file; this way torch reads what was checked.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            if len(entries) > _MAX_ENTRIES or unpacked > min(2 * len(data) + _SLACK, MAX_BYTES):
                raise EmbeddingError("it unpacks to more than any embedding holds; it may be a zip bomb")
            by_name = {entry.filename: entry for entry in entries}
            pickled = [name for name in by_name if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickled) != 1:
                raise EmbeddingError("it is a zip archive, but not one of torch.save; unpack it first")
            root = pickled[0].removesuffix("data.pkl")
            if f"{root}byteorder" in by_name and _record(archive, by_name[f"{root}byteorder"]) == b"big":
                raise EmbeddingError("it was written on a big-endian machine; write it anew on a usual one")
            program = _record(archive, by_name[pickled[0]], _MAX_PICKLE)
            clean = io.BytesIO()
            with zipfile.ZipFile(clean, "w", zipfile.ZIP_STORED) as copy:
                copy.writestr("archive/data.pkl", program)
                copy.writestr("archive/version", "3\n")
                for key, size in scan(program).storages.items():
                    entry = by_name.get(f"{root}data/{key}")
                    if entry is None or entry.file_size < size or not key.isalnum():
                        raise EmbeddingError("it declares a tensor whose numbers are missing; it is damaged")
                    copy.writestr(f"archive/data/{key}", _record(archive, entry)[:size])
    except EmbeddingError:
        raise
    except Exception as error:  # zipfile raises half a dozen kinds on damaged archives
        raise EmbeddingError(f"it is damaged or cut off ({str(error)[:80]}); download it again") from error
    return clean.getvalue()


def _record(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int = MAX_BYTES) -> bytes:
    """The bytes of an entry, no more than it declares, whatever its compressed data says."""
    if entry.file_size > limit:
        raise EmbeddingError(
            f"its {entry.filename[-60:]!a} is larger than any embedding's; it may be malicious"
        )
    with archive.open(entry) as file:
        return file.read(entry.file_size)


def _checked_stream(data: bytes) -> bytes:
    """The layout of torch before 1.6: five pickles, then the storages one after another."""
    first = scan(data, 0, _MAX_PICKLE)
    if first.number != _MAGIC:
        raise EmbeddingError("it is a pickle, but not one of torch.save; only tensors are read")
    end, declared = first.end, 0
    for _ in range(4):
        part = scan(data, end, _MAX_PICKLE)
        end, declared = part.end, declared + sum(part.storages.values())
    if declared > len(data) - end:
        raise EmbeddingError(
            f"it declares {declared} bytes of tensors and holds {len(data) - end}; it is cut off"
        )
    return data
