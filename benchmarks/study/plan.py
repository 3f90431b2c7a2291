"""A study of many inversions: what belongs to it, and its files, each written whole so that a study can go on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.files import write_text
from ldm.util import UserError


@dataclass(frozen=True)
class Inversion:
    """One concept learned once."""

    concept: str
    vectors: int
    seed: int

    @property
    def id(self) -> str:
        return f"{self.concept}-v{self.vectors}-s{self.seed}"


@dataclass(frozen=True)
class Study:
    """The folder of a study.

    `concepts/NAME` holds images, `inversions` what was learned and how, `figures` and `images` what came of it.
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
        """Figures of an inversion by its id, or of a concept without any by its name."""
        return self.folder / "figures" / f"{name}.json"

    def images(self, name: str) -> Path:
        return self.folder / "pictures" / f"{name}.png"

    def done(self, inversion: Inversion, settings: dict[str, Any]) -> bool:
        """Whether the inversion is there; UserError where it was made with other settings."""
        record = read_record(self.record(inversion))
        if record is None or not self.embedding(inversion).is_file():
            return False
        if record["settings"] != settings:
            key = next(
                k for k in {**settings, **record["settings"]} if record["settings"].get(k) != settings.get(k)
            )
            was, now = record["settings"].get(key), settings.get(key)
            raise UserError(
                f"'{self.record(inversion)}' was made with {key} {was}, not {now}; repeat its settings, or choose "
                "another --out"
            )
        return True


def plan(
    creatures: Sequence[str], styles: Sequence[str], vectors: Sequence[int], seeds: Sequence[int]
) -> list[Inversion]:
    """Every inversion of a study, first all concepts once, so that a study cut short covers them all."""
    return list(_in_order(creatures, styles, vectors, seeds))


def _in_order(
    creatures: Sequence[str], styles: Sequence[str], vectors: Sequence[int], seeds: Sequence[int]
) -> Iterator[Inversion]:
    for seed in seeds:
        for count in vectors:
            for name in (*creatures, *styles):
                yield Inversion(name, count, seed)


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON file of a study; None if it is not there. UserError for one that cannot be read."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error}); remove it to have it made again") from error


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file of a study, whole."""
    write_text(path, json.dumps(content, indent=1) + "\n")
