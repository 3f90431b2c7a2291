"""A style that was learned: whether creatures drawn in it look as the world would have drawn them in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from ldm.data.creatures.captions import articled
from ldm.data.creatures.world import SPECIES, Creature
from ldm.evaluation.drawings import others, redrawn
from ldm.evaluation.identity import ITSELF, PICTURES, Judge, read
from ldm.evaluation.looks import Looks
from ldm.evaluation.measures import Figures

SHOWN = 4
_SEARCHED = 64
_DRAWINGS = 48  # so many that each background is among them


def models_of_styles() -> list[Creature]:
    """Four creatures of different species and colours on which styles are tried."""
    found: list[Creature] = []
    for one in others(_SEARCHED):
        fresh = one.kind in SPECIES and all(one.kind != f.kind and one.color != f.color for f in found)
        if fresh and len(found) < SHOWN:
            found.append(one)
    return found


@dataclass(frozen=True)
class StyledSubject:
    """A creature in a style that no judge knows: all colours of a picture, background too, are what tells."""

    creature: Creature
    style: str
    size: int
    judge: Judge | None

    @property
    def prompt(self) -> str:
        """What is generated, with "{}" for the style's word."""
        return articled(f"a {self.creature.color} {self.creature.kind} in the style of {{}}")

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """The creature drawn in the style: the truth."""
        return self._drawn(0, _DRAWINGS)

    @cached_property
    def again(self) -> list[Image.Image]:
        return self._drawn(1)

    @cached_property
    def photos(self) -> list[Image.Image]:
        """The creature without the style: the floor."""
        return redrawn([self.creature] * PICTURES, self.size, take=2)

    @cached_property
    def scale(self) -> tuple[float, float]:
        """Mean colour distance to the truth: of photos, and of the style drawn again."""
        return float(self._distances(self.photos).mean()), float(self._distances(self.again).mean())

    def figures(self, pictures: Sequence[Image.Image]) -> Figures:
        """`style` is 0 for photos and 1 for the style drawn again, `in_style` the share nearer to the latter.

        Of drawings in other styles up to a sixth are nearer to a blueprint, those on a blue ground: small shares of
        `in_style` say nothing.
        `kind` is how often a judge sees the species; `kind_of_truth` is the same of true drawings, for the judge
        never saw the style.
        """
        distances = self._distances(pictures)
        floor, ceiling = self.scale
        share = (floor - distances) / max(floor - ceiling, 1e-6)
        figures: Figures = {
            "color_distance": round(float(distances.mean()), 5),
            "style": round(float(share.mean()), 5),
            "in_style": round(float((share > ITSELF).mean()), 5),
        }
        for key, shown in (("kind", pictures), ("kind_of_truth", self.pictures)):
            readings = read(self.judge, shown)
            if readings is not None:
                figures[key] = round(float(np.mean([s["kind"] == self.creature.kind for s in readings])), 5)
        return figures

    def _distances(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """To the nearest drawing: nobody said which background there should be."""
        return Looks.of(pictures, whole=True).color_distance(self._truth).min(1)

    @cached_property
    def _truth(self) -> Looks:
        return Looks.of(self.pictures, whole=True)

    def _drawn(self, take: int, count: int = PICTURES) -> list[Image.Image]:
        return redrawn([self.creature] * count, self.size, take=take, style=self.style)
