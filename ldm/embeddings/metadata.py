"""Where vectors come from, as far as a file says it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MAX_TEXT = 800


@dataclass(frozen=True)
class Metadata:
    """Where vectors come from; every field is None when it is not known."""

    base_model: str | None = None
    base_model_hash: str | None = None
    steps: int | None = None
    seed: int | None = None
    initializer: str | None = None
    learning_rate: float | None = None
    images: int | None = None
    images_fingerprint: str | None = None
    resolution: int | None = None
    tool: str | None = None
    date: str | None = None

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Metadata:
        """Metadata from whatever a file says: values of a wrong type are dropped, texts cut and cleaned."""
        casts = {f.name: _CASTS[str(f.type).split(" ")[0]] for f in dataclasses.fields(cls)}
        return cls(**{name: cast(values.get(name)) for name, cast in casts.items()})

    def known(self) -> dict[str, Any]:
        """The fields that are known."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def _text(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    return "".join(c if c.isprintable() else " " for c in value[:_MAX_TEXT]).strip() or None


def _integer(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number == int(number) else None


def _number(value: Any) -> float | None:
    """A finite number; files keep some of them as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        if abs(number := int(str(value)[:40])) < 2**64:
            return number
    except ValueError:
        pass
    try:
        return number if math.isfinite(number := float(value)) else None
    except (ValueError, OverflowError):
        return None


_CASTS = {"str": _text, "int": _integer, "float": _number}
