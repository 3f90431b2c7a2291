"""Writing torch's layout from before 1.6, the only one that AUTOMATIC1111's check lets through from a new torch.

torch can write it too, but names the storages by their addresses, so no two files would be equal.
"""

from __future__ import annotations

import pickle
import struct
import sys
from typing import Any, BinaryIO

import torch

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_SYSTEM = {
    "protocol_version": _PROTOCOL,
    "little_endian": sys.byteorder == "little",
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}


class _Pickler(pickle.Pickler):
    """Pickles tensors with their storages set apart and numbered in the order they are met."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)
        self.storages: dict[int, tuple[str, torch.storage.TypedStorage]] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, torch.storage.TypedStorage):
            return None
        key, _ = self.storages.setdefault(obj._cdata, (str(len(self.storages)), obj))
        return ("storage", getattr(torch, obj._pickle_storage_type()), key, "cpu", obj._size(), None)


def save_legacy(content: Any, file: BinaryIO) -> None:
    """Write dicts, texts, numbers and CPU tensors so that equal contents give equal bytes."""
    for head in (_MAGIC, _PROTOCOL, _SYSTEM):
        pickle.dump(head, file, protocol=2)
    pickler = _Pickler(file)
    pickler.dump(content)
    pickle.dump([key for key, _ in pickler.storages.values()], file, protocol=2)
    for _, storage in pickler.storages.values():
        numbers = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
        file.write(struct.pack("<q", storage._size()) + numbers.numpy().tobytes())
