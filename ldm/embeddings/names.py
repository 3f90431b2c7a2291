"""File names for triggers: a trigger is any text, and no text may choose where a file goes."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

# Windows keeps these names for devices, whatever the suffix.
_RESERVED = {"con", "prn", "aux", "nul", *(f"{name}{i}" for name in ("com", "lpt") for i in range(1, 10))}


def safe_name(trigger: str) -> str:
    """A file stem for a trigger: "<my-cat>" becomes "my-cat", "*" (no file can be called so) "embedding".

    Most tools take the stem as the prompt word, so what can stay, stays.
    """
    name = unicodedata.normalize("NFC", trigger)
    name = re.sub(r"[^\w.+\- ]+", "_", name).strip("._- ")[:100].rstrip("._- ")
    if name.split(".")[0].lower() in _RESERVED:
        name = f"{name.replace('.', '_')}_"
    return name or "embedding"


def canonical_path(folder: str | Path, trigger: str) -> Path:
    """Where the canonical file of a trigger belongs: `<folder>/<trigger>.safetensors`."""
    return Path(folder) / f"{safe_name(trigger)}.safetensors"
