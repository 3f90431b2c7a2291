"""Is it still the same creature or style? Colours, shape and attributes against the truth, and retrieval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.creatures.captions import articled
from ldm.data.creatures.world import SPECIES, Creature
from ldm.evaluation.appearance import AppearanceFeatures
from ldm.evaluation.concepts import others, redrawn
from ldm.images import to_tensor

Figures = dict[str, Any]
# Half of the way from another creature to the same one drawn again: what counts as "still itself".
ITSELF = 0.5
PICTURES, OTHERS = 8, 32
_BATCH = 64


class Judge(Protocol):
    """What is asked of a judge; `ldm.evaluation.judge.AttributeJudge` is the one that is shipped."""

    def read(self, pixels: Tensor) -> list[dict[str, Any]]:
        """The value of each attribute, one dict per picture [B, 3, H, W] in [-1, 1]."""


Readings = Sequence[Mapping[str, Any]]


def judge_readings(judge: Judge | None, pictures: Sequence[Image.Image]) -> Readings | None:
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


def likeness(
    looks: AppearanceFeatures, readings: Readings | None, truth: AppearanceFeatures, creature: Creature
) -> np.ndarray:
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
    def truth(self) -> AppearanceFeatures:
        return AppearanceFeatures.of(self.pictures)

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
        return likeness(
            AppearanceFeatures.of(pictures), judge_readings(self.judge, pictures), self.truth, self.creature
        )

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


AMONG, _PICTURES = 100, 4


@dataclass(frozen=True)
class Gallery:
    """Other creatures beside which the true one has to be found, each seen on a few drawings."""

    creatures: Sequence[Creature]
    looks: Sequence[AppearanceFeatures]

    @classmethod
    def drawn(cls, size: int, count: int) -> Gallery:
        """`count` creatures, one of which gives its place to the true one."""
        creatures = others(count)
        pictures = redrawn([one for one in creatures for _ in range(_PICTURES)], size, take=3)
        looks = AppearanceFeatures.of(pictures)
        return cls(creatures, [looks[k * _PICTURES : (k + 1) * _PICTURES] for k in range(len(creatures))])

    def ranks(self, looks: AppearanceFeatures, readings: Readings | None, subject: Subject) -> np.ndarray:
        """The true creature's place by raw likeness, [N], for each picture: 1 is the first of all.

        Each creature is compared by as many drawings in free scenes, and by the attributes it really has.
        """
        true = likeness(looks, readings, subject.truth[:_PICTURES], subject.creature)
        rivals = [
            likeness(looks, readings, seen, one)
            for one, seen in zip(self.creatures, self.looks, strict=True)
            if one.seed != subject.creature.seed
        ]
        return 1 + (np.stack(rivals[: len(self.creatures) - 1]) >= true).sum(0)


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
            readings = judge_readings(self.judge, shown)
            if readings is not None:
                figures[key] = round(float(np.mean([s["kind"] == self.creature.kind for s in readings])), 5)
        return figures

    def _distances(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """To the nearest drawing: nobody said which background there should be."""
        return AppearanceFeatures.of(pictures, whole=True).color_distance(self._truth).min(1)

    @cached_property
    def _truth(self) -> AppearanceFeatures:
        return AppearanceFeatures.of(self.pictures, whole=True)

    def _drawn(self, take: int, count: int = PICTURES) -> list[Image.Image]:
        return redrawn([self.creature] * count, self.size, take=take, style=self.style)
