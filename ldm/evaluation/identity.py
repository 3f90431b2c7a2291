"""Is it still the same creature? Colours, shape and attributes against the truth, on a scale that the truth gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.creatures.world import Creature
from ldm.evaluation.drawings import others, redrawn
from ldm.evaluation.looks import Looks
from ldm.images import to_tensor

# Half of the way from another creature to the same one drawn again: what counts as "still itself".
ITSELF = 0.5
PICTURES, OTHERS = 8, 32
_BATCH = 64


class Judge(Protocol):
    """What is asked of a judge; `ldm.evaluation.judge.AttributeJudge` is the one that is shipped."""

    def read(self, pixels: Tensor) -> list[dict[str, Any]]:
        """The value of each attribute, one dict per picture [B, 3, H, W] in [-1, 1]."""


Readings = Sequence[Mapping[str, Any]]


def read(judge: Judge | None, pictures: Sequence[Image.Image]) -> Readings | None:
    """What the judge sees on each picture; None without a judge."""
    if judge is None:
        return None
    found: list[dict[str, Any]] = []
    for start in range(0, len(pictures), _BATCH):
        found += judge.read(torch.stack([to_tensor(one) for one in pictures[start : start + _BATCH]]))
    return found


def traits(creature: Creature) -> dict[str, Any]:
    """The attributes that belong to the creature itself; a plain one has no second colour to be seen."""
    keys = ("kind", "color", "pattern", "eyes", "ears", *(("second",) if creature.pattern != "plain" else ()))
    return {key: getattr(creature, key) for key in keys}


def agreement(readings: Readings, creature: Creature) -> np.ndarray:
    """Share of the creature's attributes that the judge sees on each picture, [N]."""
    wanted = traits(creature)
    return np.array([np.mean([seen[key] == value for key, value in wanted.items()]) for seen in readings])


def likeness(looks: Looks, readings: Readings | None, truth: Looks, creature: Creature) -> np.ndarray:
    """Raw likeness of each picture to a creature, [N]: the mean of its parts, 0 to 1.

    The parts are palette overlap and aligned silhouette IoU with the true pictures, averaged over these, and, where
    there is a judge, the agreement of the attributes.
    """
    parts = [looks.palette_overlap(truth).mean(1), looks.shape_overlap(truth).mean(1)]
    if readings is not None:
        parts.append(agreement(readings, creature))
    return np.mean(parts, axis=0)


@dataclass(frozen=True)
class Subject:
    """A creature, in one background and style or free of them, with what it and others look like there.

    Everything is drawn, so that the same sight of the same creature always gives the same scale.
    """

    creature: Creature
    size: int
    judge: Judge | None
    background: str | None = None
    style: str = "photo"

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """The creature redrawn: the truth that pictures are compared with."""
        return self._drawn([self.creature] * PICTURES, take=0)

    @cached_property
    def truth(self) -> Looks:
        return Looks.of(self.pictures)

    @cached_property
    def again(self) -> list[Image.Image]:
        """The creature redrawn once more: the best that pictures can be."""
        return self._drawn([self.creature] * PICTURES, take=1)

    @cached_property
    def strangers(self) -> np.ndarray:
        """Raw likeness of other creatures, [OTHERS]: the floor."""
        strangers = others(OTHERS, unlike=self.creature, background=self.background)
        return self.raw(self._drawn(strangers, take=2))

    @cached_property
    def scale(self) -> tuple[float, float]:
        """Mean raw likeness of other creatures, and of the same one drawn again."""
        return float(self.strangers.mean()), float(self.raw(self.again).mean())

    def raw(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Raw likeness of each picture, [N]."""
        return likeness(Looks.of(pictures), read(self.judge, pictures), self.truth, self.creature)

    def calibrated(self, raw: np.ndarray) -> np.ndarray:
        """Likeness on the scale on which other creatures are 0 and the same one drawn again is 1, on average."""
        floor, ceiling = self.scale
        return (raw - floor) / max(ceiling - floor, 1e-6)

    def calibration(self) -> dict[str, float]:
        """The scale, and how often `ITSELF` takes the same creature, and another, for itself."""
        floor, ceiling = self.scale
        return {
            "floor": floor,
            "ceiling": ceiling,
            "itself_taken": float((self.calibrated(self.raw(self.again)) > ITSELF).mean()),
            "others_taken": float((self.calibrated(self.strangers) > ITSELF).mean()),
        }

    def _drawn(self, creatures: Sequence[Creature], take: int) -> list[Image.Image]:
        return redrawn(creatures, self.size, take=take, background=self.background, style=self.style)
