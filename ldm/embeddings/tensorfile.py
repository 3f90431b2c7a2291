"""safetensors files: the header is checked and tensors are read one at a time, on demand."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ldm.embeddings.concept import EmbeddingError, check_shape

# The header of a LoRA with thousands of tensors is under 1 MB.
_MAX_HEADER = 16 * 2**20


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file's first bytes are a length and the start of a JSON object."""
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 2**56


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, and its `metadata`.

    Opening reads the header alone. Raises EmbeddingError for a header that is damaged or absurdly large, and,
    on access, for a tensor too large to be vectors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER or length > size - 8:
                raise EmbeddingError(
                    f"its header is said to be {length} bytes long, the file has {size}; it is cut off or damaged"
                )
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata: dict[str, str] = dict(file.metadata() or {})
                self._shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # the library's errors share no class
            raise _damaged(error) from error

    def __getitem__(self, name: str) -> Tensor:
        check_shape(self._shapes[name], ascii(name[:80]))
        try:
            with safe_open(path := self.path, framework="pt") as file:
                return file.get_tensor(name).clone()
        except Exception as error:
            raise EmbeddingError(f"{path.name}: cannot read {name[:80]!a} ({str(error)[:80]})") from error

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]


def save_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: BinaryIO) -> None:
    """Write a safetensors file whose bytes depend on its contents alone."""
    data = save({name: tensor.contiguous().clone() for name, tensor in tensors.items()})
    # The library orders metadata by chance; the header is written anew, in our order, and padded as it does.
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    text = json.dumps({"__metadata__": dict(metadata), **header}, separators=(",", ":"))
    encoded = text.encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


def _damaged(error: Exception) -> EmbeddingError:
    reason = str(error).replace("Error while deserializing header: ", "")[:100]
    return EmbeddingError(f"its safetensors header is damaged ({reason}); download it again")
