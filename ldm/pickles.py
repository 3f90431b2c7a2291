"""The one place where a pickle is read: torch's weights-only loader with a short list of further classes."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ldm.util import UserError


class PickleError(UserError):
    """A file that is no pickle of tensors, is damaged, or asks for code."""


def load(
    source: str | Path | BinaryIO,
    *,
    classes: Sequence[type | tuple[type, str]] = (),
    mmap: bool = False,
    what: str = "",
) -> Any:
    """Read a `torch.save` file onto the CPU without running anything it contains.

    `classes` are allowed beyond torch's own list, as a class or as (class, "dotted.name in the file").
    `what` is how messages name the file (default: its path). Raises PickleError on anything else.
    """
    name = what or (f"'{source}'" if isinstance(source, (str, Path)) else "the file")
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.exists():
            raise PickleError(f"{name} does not exist; check the path")
        if path.is_dir():
            raise PickleError(f"{name} is a folder; name a file")
        if path.stat().st_size == 0:
            raise PickleError(f"{name} is empty; it was not written or downloaded completely")
        with path.open("rb") as file:
            head = file.read(512)
        if _looks_like_text(head):
            raise PickleError(f"{name} is a text or HTML page, not a PyTorch file; download the file itself")
        # Only zip files can be mapped; the legacy stream is read.
        mmap = mmap and head.startswith(b"PK\x03\x04")
        source = str(path)
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap or None)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise PickleError(f"{name} is refused: {_reason(error)}") from error
    except Exception as error:  # a damaged stream can fail anywhere inside the unpickler
        raise PickleError(f"{name} is damaged or no PyTorch file ({_first_line(error)})") from error


def _looks_like_text(head: bytes) -> bool:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return start.startswith((b"<!doctype", b"<html", b"<?xml", b"{", b"version https://git-lfs")) or (
        len(head) > 0 and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head)
    )


def _reason(error: Exception) -> str:
    asked = re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) ([A-Za-z_][\w.]*)", str(error))
    if asked:
        return f"it asks for '{asked[1].rstrip('.')}', which tensors never need"
    return f"it is damaged or no tensor file ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]
