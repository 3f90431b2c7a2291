"""The inversions of a study and its files, which are written atomically so that a study can be continued."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.files import write_text
from ldm.util import UserError


@dataclass(frozen=True)
class Inversion:
    """One run that learns a concept."""

    concept: str
    vectors: int
    seed: int

    @property
    def id(self) -> str:
        return f"{self.concept}-v{self.vectors}-s{self.seed}"


@dataclass(frozen=True)
class Study:
    """The folder of a study.

    `concepts/NAME` has the images of a concept, `inversions` the embeddings and their settings, `figures` and
    `pictures` the results.
    """

    folder: Path

    def concept(self, name: str) -> Path:
        return self.folder / "concepts" / name

    def runs(self, inversion: Inversion) -> Path:
        return self.folder / "runs" / inversion.id

    def embedding(self, inversion: Inversion) -> Path:
        return self.folder / "inversions" / f"{inversion.id}.pt"

    def record(self, inversion: Inversion) -> Path:
        return self.folder / "inversions" / f"{inversion.id}.json"

    def figures(self, name: str) -> Path:
        """Return the file with the figures of an inversion (by its id) or of a concept's references (by its name)."""
        return self.folder / "figures" / f"{name}.json"

    def images(self, name: str) -> Path:
        return self.folder / "pictures" / f"{name}.png"

    def done(self, inversion: Inversion, settings: dict[str, Any]) -> bool:
        """Return whether the inversion exists; raises UserError if it was made with other settings."""
        record = read_record(self.record(inversion))
        if record is None or not self.embedding(inversion).is_file():
            return False
        if record["settings"] != settings:
            key = next(
                k for k in {**settings, **record["settings"]} if record["settings"].get(k) != settings.get(k)
            )
            was, now = record["settings"].get(key), settings.get(key)
            raise UserError(
                f"'{self.record(inversion)}' was made with {key} {was}, not {now}; use the same settings, or choose "
                "another --out"
            )
        return True


def plan(
    creatures: Sequence[str], styles: Sequence[str], vectors: Sequence[int], seeds: Sequence[int]
) -> list[Inversion]:
    """Return every inversion of a study; all concepts once first, so that an interrupted study covers them all."""
    names = (*creatures, *styles)
    return [Inversion(name, count, seed) for seed in seeds for count in vectors for name in names]


def read_record(path: Path) -> dict[str, Any] | None:
    """Read a JSON file of a study; None if it does not exist. Raises UserError if it cannot be read."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error}); remove it, and it is made again") from error


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file of a study atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")
