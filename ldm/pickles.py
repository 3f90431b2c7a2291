"""The only place that reads pickles: torch's weights-only loader with a short list of further classes."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ldm.files import NO_TENSORS, file_kind
from ldm.util import UserError


class PickleError(UserError):
    """A file that is not a pickle of tensors, is damaged, or would run code."""


def load(
    source: str | Path | BinaryIO,
    *,
    classes: Sequence[type | tuple[type, str]] = (),
    mmap: bool = False,
    meta: bool = False,
    what: str = "",
) -> Any:
    """Read a `torch.save` file onto the CPU without running code from it.

    Args:
        source: a path, or an open binary file.
        classes: allowed in addition to torch's own list, as a class or as (class, "dotted.name in the file").
        mmap: map the tensors into memory instead of reading them, where the file's layout allows it.
        meta: return tensors on the meta device, which have a shape and no numbers.
        what: how messages name the file; default: its path.

    Raises:
        PickleError: the file does not exist, is damaged, is of another kind, or needs a class that is not allowed.
    """
    name = what or (f"'{source}'" if isinstance(source, (str, Path)) else "the file")
    if isinstance(source, (str, Path)):
        kind = file_kind(source)
        if kind in NO_TENSORS:
            raise PickleError(f"{name} {NO_TENSORS[kind]}")
        mmap = mmap and kind == "zip"  # torch cannot map the older layout
        source = str(source)
    try:
        with torch.serialization.safe_globals(list(classes)):
            device = "meta" if meta else "cpu"
            return torch.load(source, map_location=device, weights_only=True, mmap=mmap or None)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise PickleError(f"{name} is refused: {_reason(error)}") from error
    except Exception as error:  # a damaged stream can fail anywhere inside the unpickler
        raise PickleError(f"{name} is damaged or not a PyTorch file ({_first_line(error)})") from error


def _reason(error: Exception) -> str:
    asked = re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) ([A-Za-z_][\w.]*)", str(error))
    if asked:
        return f"it asks for '{asked[1].rstrip('.')}', which tensors never need"
    return f"it is damaged or not a file of tensors ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]
