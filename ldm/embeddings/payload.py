"""What a file contains, whatever its name: the tensors, dict or metadata inside its container."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ldm.embeddings import image_files, torch_files
from ldm.embeddings.concept import EmbeddingError, check_shape
from ldm.files import NO_TENSORS, file_kind
from ldm.words import cleaned

# The header of a LoRA with thousands of tensors is under 1 MB.
_MAX_HEADER = 16 * 2**20


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, and the texts of its header as `metadata`.

    Opening it reads only the header. Raises EmbeddingError for a header that is damaged or far too large and, on
    access, for a tensor that is too large to be vectors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER or length > size - 8:
                raise EmbeddingError(
                    f"its header should be {length} bytes long, the file has {size}; it is cut off or damaged"
                )
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata: dict[str, str] = dict(file.metadata() or {})
                self._shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises several unrelated classes
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
    """Write a safetensors file; equal tensors and metadata give equal bytes."""
    data = save({name: tensor.contiguous().clone() for name, tensor in tensors.items()})
    # safetensors writes metadata in random order, so the header is replaced by one in our order, padded the same.
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


@dataclass(frozen=True)
class Payload:
    """The contents of a file, not yet interpreted.

    `container` is "torch", "safetensors" or "image"; `content` is a mapping or a tensor in an embedding file, and
    can be anything else in other files; `header` are the texts in the header of a safetensors file.
    """

    path: Path
    container: Literal["torch", "safetensors", "image"]
    content: Any
    header: Mapping[str, str] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """The file's name without its suffix, which most tools use as the trigger."""
        return cleaned(self.path.stem)

    @property
    def names(self) -> set[str]:
        """The text keys of the content; empty if it is not a mapping."""
        if not isinstance(self.content, Mapping):
            return set()
        return {key for key in self.content if isinstance(key, str)}


def open_payload(path: Path) -> Payload:
    """Read a file into a Payload; raises EmbeddingError with the reason, without the path."""
    kind = file_kind(path)
    if kind == "safetensors":
        tensors = TensorFile(path)
        return Payload(path, kind, tensors, tensors.metadata)
    if kind == "image":
        _check_size(path, image_files.MAX_IMAGE_BYTES, "image")
        return Payload(path, kind, image_files.load_image_payload(path))
    if kind in ("zip", "pickle"):
        _check_size(path, torch_files.MAX_TORCH_BYTES, "file")
        return Payload(path, "torch", torch_files.load_torch(path.read_bytes()))
    if kind in NO_TENSORS:
        raise EmbeddingError(f"it {NO_TENSORS[kind]}")
    raise EmbeddingError("it is not an embedding file: not safetensors, torch.save, or a PNG or WebP image")


def _check_size(path: Path, limit: int, noun: str) -> None:
    if (size := path.stat().st_size) > limit:
        raise EmbeddingError(
            f"the {noun} is {size / 2**20:.0f} MB, an embedding's is under {limit // 2**20}; "
            "is it a model checkpoint?"
        )
