"""From a path to what the file contains, told by its first bytes and never by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.embeddings import picture, tensorfile, torchfile
from ldm.embeddings.concept import EmbeddingError


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
    if tensorfile.looks_like_safetensors(head):
        tensors = tensorfile.TensorFile(path)
        return Payload(path, "safetensors", tensors, tensors.metadata)
    if picture.looks_like_picture(head):
        _check_size(size, picture.MAX_BYTES, "picture")
        return Payload(path, "picture", picture.load(path))
    if head[:1] == b"\x80" or head[:4] == b"PK\x03\x04":
        _check_size(size, torchfile.MAX_BYTES, "file")
        return Payload(path, "torch", torchfile.load_torch(path.read_bytes()))
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
