"""Files of `torch.save`, both layouts, read without running code or allocating more memory than the file has."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import sys
import zipfile
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from torch import nn

from ldm import pickles
from ldm.embeddings.concept import EmbeddingError
from ldm.files import content_kind

_WANTED = {
    "collections OrderedDict",
    "torch Size",
    "torch.nn.modules.container ParameterDict",
    "torch.nn.parameter Parameter",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "builtins set",
    "__builtin__ set",
}
_ITEM_BYTES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
    "UntypedStorage": 1,
}
_STORAGES = {
    f"{module} {name}": size
    for name, size in _ITEM_BYTES.items()
    for module in ("torch", "torch.cuda", "torch.storage")
}
_STRINGS = {
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "UNICODE",
    "BINSTRING",
    "SHORT_BINSTRING",
    "STRING",
}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "INT", "LONG"}
_CODE = {"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}
# Marks for what these operations push; texts, numbers and globals are pushed as they are, all else as None.
_PUSHED = {"MARK": object(), "TUPLE": object(), "NONE": object()}


@dataclass
class _Global:
    """A class or function that the pickle refers to."""

    name: str


@dataclass
class Scan:
    """What one pickle declares.

    `storages` are the bytes of each storage by its key, `number` is the last integer, `end` the offset after it.
    """

    storages: dict[str, int] = field(default_factory=dict)
    number: int | None = None
    end: int = 0


def scan(data: bytes, start: int = 0, limit: int = 2**21) -> Scan:
    """Read the operations of the pickle at offset `start` without executing them.

    Raises EmbeddingError for a class or function that no embedding needs, a storage that is not declared as torch
    does it, a damaged stream, and one longer than `limit` bytes.
    """
    stream = io.BytesIO(data[start : start + limit])
    result = Scan()
    recent: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for operation, argument, _ in pickletools.genops(stream):
            _step(operation.name, argument, recent, memo, result)
            del recent[:-8]
    except EmbeddingError:
        raise
    except Exception as error:  # genops raises many classes on damaged streams
        raise EmbeddingError(f"it is damaged or not a PyTorch file ({str(error)[:80]})") from error
    result.end = start + stream.tell()
    return result


def _step(name: str, argument: Any, recent: list[Any], memo: dict[int, Any], result: Scan) -> None:
    if name == "PROTO" and argument > 5:
        raise EmbeddingError(f"it is a pickle of protocol {argument}, which does not exist; it is damaged")
    if name in ("PROTO", "FRAME"):
        return
    if name in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[argument] = _memorable(recent)
        return
    if name == "MEMOIZE":
        memo[len(memo)] = _memorable(recent)
        return
    if name in _CODE:
        raise EmbeddingError(
            f"it uses the pickle operation {name}, which tensors never need; it may be malicious"
        )
    value: Any = None
    if name in ("GET", "BINGET", "LONG_BINGET"):
        value = memo.get(argument)
    elif name == "GLOBAL":
        value = _allowed(argument)
    elif name == "STACK_GLOBAL":
        module, attribute = recent[-2:] if len(recent) > 1 else (None, None)
        value = _allowed(f"{module} {attribute}")
    elif name in _PUSHED:
        value = _PUSHED[name]
    elif name in _STRINGS:
        value = argument
    elif name in _NUMBERS:
        value = result.number = argument
    elif name == "BINPERSID":
        _claim(recent, result)
    recent.append(value)


def _allowed(name: str) -> _Global:
    if name not in _WANTED and name not in _STORAGES:
        dotted = name.replace(" ", ".")[:100]
        raise EmbeddingError(f"it asks for {dotted!a}, which no embedding needs; it may be malicious")
    return _Global(name)


def _memorable(recent: list[Any]) -> Any:
    return recent[-1] if recent and isinstance(recent[-1], (str, _Global)) else None


def _claim(recent: list[Any], result: Scan) -> None:
    """Record the storage that a persistent id declares: `( 'storage' class key location number [None] tuple`."""
    tuple_made = recent[-1:] == [_PUSHED["TUPLE"]]
    fields = recent[-8:-2] if recent[-2:-1] == [_PUSHED["NONE"]] else recent[-7:-1]
    match fields:
        case [mark, "storage", _Global(name=kind), str(key), str(), int(number)] if mark is _PUSHED["MARK"]:
            if tuple_made and kind in _STORAGES and number >= 0:
                size = number * _STORAGES[kind]
                result.storages[key] = max(size, result.storages.get(key, 0))
                return
    raise EmbeddingError("it declares a tensor in an unknown way; it is damaged or malicious")


# The largest real files are 0.15 GB: saving a slice of a vocabulary table saves the whole table.
MAX_TORCH_BYTES = 512 * 2**20
_MAX_PICKLE = 2**21
_MAX_ENTRIES = 4096
# torch.save does not compress, and compression does not halve learned numbers; this much more is allowed.
_SLACK = 2**20
_MAGIC = 0x1950A86A20F9469CFC6C


def load_torch(data: bytes) -> Any:
    """Read the bytes of a `torch.save` file without running code from it.

    Raises EmbeddingError with the reason if it is not such a file, is damaged, needs classes other than those of
    tensors, or declares more bytes than it has.
    """
    stream = _clean_zip(data) if content_kind(data[:512]) == "zip" else _checked_stream(data)
    try:
        return pickles.load(io.BytesIO(stream), classes=(nn.ParameterDict,), what="it")
    except pickles.PickleError as error:
        raise EmbeddingError(str(error)) from error


def _clean_zip(data: bytes) -> bytes:
    """Return a copy of the archive with only the records that its pickle declares.

    Two zip readers can see different archives in the same bytes; with the copy, torch reads what was checked.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            if len(entries) > _MAX_ENTRIES or unpacked > min(2 * len(data) + _SLACK, MAX_TORCH_BYTES):
                raise EmbeddingError("it unpacks to more than any embedding holds; it may be a zip bomb")
            by_name = {entry.filename: entry for entry in entries}
            pickled = [name for name in by_name if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickled) != 1:
                raise EmbeddingError("it is a zip archive, but not of torch.save; unpack it first")
            root = pickled[0].removesuffix("data.pkl")
            if f"{root}byteorder" in by_name and _record(archive, by_name[f"{root}byteorder"]) == b"big":
                raise EmbeddingError(
                    "it was written on a big-endian machine; write it again on a little-endian one"
                )
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
    except Exception as error:  # zipfile raises many classes on damaged archives
        raise EmbeddingError(f"it is damaged or cut off ({str(error)[:80]}); download it again") from error
    return clean.getvalue()


def _record(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int = MAX_TORCH_BYTES) -> bytes:
    """Return the bytes of an entry, at most as many as it declares."""
    if entry.file_size > limit:
        raise EmbeddingError(
            f"its {entry.filename[-60:]!a} is larger than any embedding's; it may be malicious"
        )
    with archive.open(entry) as file:
        return file.read(entry.file_size)


def _checked_stream(data: bytes) -> bytes:
    """Check the layout of torch before 1.6 (five pickles, then the storages) and return the bytes."""
    first = scan(data, 0, _MAX_PICKLE)
    if first.number != _MAGIC:
        raise EmbeddingError("it is a pickle, but not of torch.save; only tensors are read")
    end, declared = first.end, 0
    for _ in range(4):
        part = scan(data, end, _MAX_PICKLE)
        end, declared = part.end, declared + sum(part.storages.values())
    if declared > len(data) - end:
        raise EmbeddingError(
            f"it declares {declared} bytes of tensors and holds {len(data) - end}; it is cut off"
        )
    return data


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
