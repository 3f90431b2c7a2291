"""From a path to what the file contains, recognised by its first bytes and never by its name."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ldm.embeddings import image_files, torch_files
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


@dataclass(frozen=True)
class Payload:
    """The contents of a file: a dict (or mapping) or a tensor, and the texts of a safetensors header.

    `container` is "torch", "safetensors" or "picture".
    """

    path: Path
    container: str
    content: Any
    header: Mapping[str, str] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """The file's name without its suffix: the trigger in most tools."""
        name = "".join(c for c in self.path.stem if c.isprintable()).strip()[:200]
        return name or "embedding"

    @property
    def names(self) -> set[str]:
        """The keys of the content, if it has any."""
        if not isinstance(self.content, Mapping):
            return set()
        return {key for key in self.content if isinstance(key, str)}


def open_payload(path: Path) -> Payload:
    """Read a file into a Payload; raises EmbeddingError, without the path in it, with the reason."""
    if not path.exists():
        raise EmbeddingError("there is no such file; check the path")
    if path.is_dir():
        raise EmbeddingError("it is a folder; name the file in it")
    if not path.is_file():
        raise EmbeddingError("it is no ordinary file")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise EmbeddingError("it is empty; it was not written or downloaded completely")
    if looks_like_safetensors(head):
        tensors = TensorFile(path)
        return Payload(path, "safetensors", tensors, tensors.metadata)
    if image_files.looks_like_image(head):
        _check_size(size, image_files.MAX_IMAGE_BYTES, "picture")
        return Payload(path, "picture", image_files.load_image_payload(path))
    if head[:1] == b"\x80" or head[:4] == b"PK\x03\x04":
        _check_size(size, torch_files.MAX_TORCH_BYTES, "file")
        return Payload(path, "torch", torch_files.load_torch(path.read_bytes()))
    raise EmbeddingError(_what_else(head))


def _check_size(size: int, limit: int, noun: str) -> None:
    if size > limit:
        raise EmbeddingError(
            f"the {noun} is {size / 2**20:.0f} MB, an embedding's is under {limit // 2**20}; "
            "is it a model checkpoint?"
        )


def _what_else(head: bytes) -> str:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, not an embedding; download the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file; fetch it with 'git lfs pull'"
    if start.startswith((b"{", b"[")):
        return "it is a text (JSON) file, not an embedding"
    return "it is no embedding file: neither safetensors, nor of torch.save, nor a PNG or WebP picture"
