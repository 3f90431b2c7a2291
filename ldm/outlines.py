"""What a file of `torch.save` holds: everything but the numbers of its tensors, read without running code.

Both readers begin here: that of embeddings, which then reads the numbers that it needs, or none if it is asked for the
words only, and that of models, which recognises a file by its names and shapes.
"""

from __future__ import annotations

import contextlib
import math
import struct
import sys
import zipfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.pickles import MAX_PICKLE, Pickle, PickleError, interpret
from ldm.util import UserError, shown

_MAX_ENTRIES = 2**16
# torch.save does not compress, and compression does not halve learned numbers; this much more is allowed.
SLACK = 2**20
# torch.save does not compress the pickle either; archives that were packed again do.
_MAX_RATIO = 32
MAGIC = 0x1950A86A20F9469CFC6C


@contextlib.contextmanager
def unzipped(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive; whatever zipfile finds damaged becomes a PickleError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except Exception as error:  # zipfile raises many classes on damaged archives
        raise PickleError(f"it is damaged or cut off ({shown(str(error))}); download it again") from error


# The types of floating-point numbers by their names in torch, and the formats by which `struct` reads them.
_FORMATS = {"float64": "d", "float32": "f", "float16": "e", "bfloat16": "f"}
_MOST_VALUES = 2**18


@dataclass(frozen=True, eq=False)
class Unread:
    """A tensor of a file whose numbers have not been read, so that torch, which takes seconds, is not needed.

    Attributes:
        shape: of the tensor.
        dtype: the name of its type in torch; "" if it is not known.
        stored: reads the bytes of its numbers, row after row; None if they are not known.
    """

    shape: tuple[int, ...]
    dtype: str = ""
    stored: Callable[[], bytes] | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Sequence[int]) -> Unread:
        count = len(range(len(self))[rows]) if isinstance(rows, slice) else len(rows)
        return Unread((count, *self.shape[1:]), self.dtype)

    def split(self, sizes: Sequence[int], dim: int) -> list[Unread]:
        """The parts of these sizes along an axis."""
        return [Unread((*self.shape[:dim], size, *self.shape[dim + 1 :]), self.dtype) for size in sizes]

    def values(self) -> Sequence[float] | None:
        """The numbers as float32, row after row; None if there are many, or they are not known."""
        count = math.prod(self.shape)
        if self.stored is None or self.dtype not in _FORMATS or count > _MOST_VALUES:
            return None
        data = self.stored()
        if self.dtype == "bfloat16":  # the upper half of a float32
            data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
        try:
            return array("f", struct.unpack(f"<{count}{_FORMATS[self.dtype]}", data))
        except struct.error:  # of another size than the shape's; whoever reads the tensor says so
            return None

    def is_finite(self) -> bool:
        """Whether there is no NaN and no infinity, as far as the numbers are known."""
        values = self.values()
        return values is None or all(map(math.isfinite, values))

    def norm(self) -> float | None:
        """The length of all numbers together, if they are known."""
        values = self.values()
        return None if values is None else math.hypot(*values)

    def may_equal(self, other: object) -> bool:
        """Whether another tensor, read or not, may have the same numbers."""
        if self.shape != tuple(getattr(other, "shape", ())):
            return False
        mine, others = self.values(), other.values() if isinstance(other, Unread) else None
        return mine is None or others is None or mine == others


def is_tensor(value: Any) -> bool:
    """Whether a value of a file is a tensor, read or not."""
    torch = sys.modules.get("torch")  # without it nobody can have made one
    return isinstance(value, Unread) or (torch is not None and isinstance(value, torch.Tensor))


@dataclass
class Outline:
    """The pickle of a file, and where the numbers of its storages are: by their keys, an offset or a zip entry."""

    pickle: Pickle
    places: dict[str, int | str] = field(default_factory=dict)


def outline_of(path: Path, kind: str) -> Outline:
    """Read what a file of `torch.save` holds; `kind` is that of `ldm.files.file_kind`, "zip" or "pickle".

    Raises:
        PickleError: it is no such file, is damaged, or unpacks to far more than it has.
    """
    return _of_zip(path) if kind == "zip" else _of_stream(path)


def _of_zip(path: Path) -> Outline:
    size = path.stat().st_size
    with unzipped(path) as archive:
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        if len(entries) > _MAX_ENTRIES or unpacked > 2 * size + SLACK:
            raise PickleError("it unpacks to more than any embedding or model holds; it may be a zip bomb")
        by_name = {entry.filename: entry for entry in entries}
        pickled = [name for name in by_name if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise PickleError(
                "it is a zip archive, but not of torch.save; unpack it first and name the file in it"
            )
        root = pickled[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in by_name:
            raise PickleError("it is a TorchScript program, and no file of tensors; name another file")
        order = by_name.get(f"{root}byteorder")
        if order is not None and order.file_size < 16 and archive.read(order) == b"big":
            raise PickleError("it was written on a big-endian machine; write it again on a little-endian one")
        if by_name[pickled[0]].file_size > min(MAX_PICKLE, _MAX_RATIO * size):
            raise PickleError("its data.pkl is larger than any embedding's or model's; it may be malicious")
        places: dict[str, int | str] = {
            name.removeprefix(f"{root}data/"): name for name in by_name if name.startswith(f"{root}data/")
        }
        with archive.open(pickled[0]) as file:
            return Outline(interpret(file.read(MAX_PICKLE)), places)


def _of_stream(path: Path) -> Outline:
    """Open the layout of torch before 1.6: pickles of magic, protocol, machine, content, keys; then storages."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(5 * MAX_PICKLE)
        parts = [interpret(head)]
        if parts[0].foreign:
            raise PickleError(asks_for(parts[0]))
        if parts[0].content != MAGIC:
            raise PickleError("it is a pickle, but not of torch.save; only tensors are read")
        for _ in range(4):
            parts.append(interpret(head, parts[-1].end))
        content, keys, place = parts[3], parts[4].content, parts[4].end
        declared = sum(storage.nbytes for storage in content.storages.values())
        if declared > size - place:
            raise PickleError(
                f"it declares {declared} bytes of tensors and holds {size - place}; it is cut off"
            )
        is_list = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not is_list or sorted(keys) != sorted(content.storages):
            raise PickleError("its list of storages is damaged; download it again")
        places: dict[str, int | str] = {}
        for key in keys:
            file.seek(place)
            storage = content.storages[key]
            if file.read(8) != struct.pack("<q", storage.numbers):
                raise PickleError("the size of a storage differs from its tensor's; it is damaged")
            places[key] = place + 8
            place += 8 + storage.nbytes
        if place > size:
            raise PickleError("it is cut off; download it again")
    return Outline(content, places)


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


def asks_for(pickle: Pickle) -> str:
    """Why a pickle with foreign names is not read: what it holds, and what to do."""
    known = tuple(name for names in _OTHER_NUMBERS for name in names)
    if all(name.startswith(known) for name in pickle.foreign):
        kind = next(kind for names, kind in _OTHER_NUMBERS.items() if pickle.foreign[0].startswith(names))
        return f"it holds {kind}; save dense torch tensors of float32, for example as .safetensors"
    asked = next(name for name in pickle.foreign if not name.startswith(known))
    return f"it asks for '{asked}', which tensors never need; it may be malicious"
