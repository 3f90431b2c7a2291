"""Whether images show a given creature or style: comparison with renderings of it, and retrieval among others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.creatures.captions import fix_articles
from ldm.data.creatures.world import SPECIES, Creature
from ldm.evaluation.appearance import AppearanceFeatures
from ldm.evaluation.concepts import draw_creatures, other_creatures
from ldm.images import to_tensor

Figures = dict[str, Any]
# An image counts as "still itself" beyond half of the way from other creatures (0) to the same creature (1).
ITSELF = 0.5
# Renderings per set, and other creatures that define the 0 of the scale.
IMAGES, OTHERS = 8, 32
_BATCH = 64


class Judge(Protocol):
    """A classifier of attributes; `ldm.evaluation.judge.AttributeJudge` is the one that is shipped."""

    def predict(self, pixels: Tensor) -> list[dict[str, Any]]:
        """Return the value of each attribute, one dict per image of [B, 3, H, W] in [-1, 1]."""


AttributePredictions = Sequence[Mapping[str, Any]]


def predict_attributes(judge: Judge | None, images: Sequence[Image.Image]) -> AttributePredictions | None:
    """Return the judge's predictions for each image; None without a judge."""
    if judge is None:
        return None
    predictions: list[dict[str, Any]] = []
    for start in range(0, len(images), _BATCH):
        batch = torch.stack([to_tensor(image) for image in images[start : start + _BATCH]])
        predictions += judge.predict(batch)
    return predictions


def creature_attributes(creature: Creature) -> dict[str, Any]:
    """Return the attributes of the creature itself; a plain one has no visible second colour."""
    keys = ("kind", "color", "pattern", "eyes", "ears", *(("second",) if creature.pattern != "plain" else ()))
    return {key: getattr(creature, key) for key in keys}


def attribute_agreement(predictions: AttributePredictions, creature: Creature) -> np.ndarray:
    """Return the share of the creature's attributes that the judge sees in each image, [N]."""
    expected = creature_attributes(creature)
    return np.array([np.mean([p[key] == value for key, value in expected.items()]) for p in predictions])


def likeness(
    features: AppearanceFeatures,
    predictions: AttributePredictions | None,
    truth: AppearanceFeatures,
    creature: Creature,
) -> np.ndarray:
    """Return the raw likeness of each image to a creature, [N], 0 to 1.

    It is the mean of palette overlap and outline IoU with renderings of the creature (`truth`), and, where there
    are predictions of a judge, the share of attributes that agree.
    """
    parts = [features.palette_overlap(truth).mean(1), features.shape_overlap(truth).mean(1)]
    if predictions is not None:
        parts.append(attribute_agreement(predictions, creature))
    return np.mean(parts, axis=0)


@dataclass(frozen=True)
class CreatureReference:
    """Renderings of a creature, optionally with a fixed background and style, and the scale that follows from them.

    All renderings are deterministic: the same arguments always give the same scale.
    """

    creature: Creature
    size: int
    judge: Judge | None
    background: str | None = None
    style: str = "photo"

    @cached_property
    def images(self) -> list[Image.Image]:
        """Renderings of the creature: the truth that images are compared with."""
        return self._render([self.creature] * IMAGES, take=0)

    @cached_property
    def truth(self) -> AppearanceFeatures:
        """Features of `images`."""
        return AppearanceFeatures.from_images(self.images)

    @cached_property
    def again(self) -> list[Image.Image]:
        """Other renderings of the creature: the best result that generated images could have."""
        return self._render([self.creature] * IMAGES, take=1)

    @cached_property
    def others(self) -> np.ndarray:
        """Raw likeness of other creatures, [OTHERS]: the 0 of the scale."""
        creatures = other_creatures(OTHERS, unlike=self.creature, background=self.background)
        return self.raw(self._render(creatures, take=2))

    @cached_property
    def scale(self) -> tuple[float, float]:
        """Mean raw likeness of other creatures, and of other renderings of the same one."""
        return float(self.others.mean()), float(self.raw(self.again).mean())

    def raw(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the raw likeness of each image, [N]."""
        features, predictions = AppearanceFeatures.from_images(images), predict_attributes(self.judge, images)
        return likeness(features, predictions, self.truth, self.creature)

    def calibrated(self, raw: np.ndarray) -> np.ndarray:
        """Scale raw likeness so that on average other creatures have 0 and the same creature rendered again has 1."""
        floor, ceiling = self.scale
        return (raw - floor) / max(ceiling - floor, 1e-6)

    def calibration(self) -> dict[str, float]:
        """Return the scale, and the shares of the same and of other creatures that exceed `ITSELF`."""
        floor, ceiling = self.scale
        return {
            "floor": floor,
            "ceiling": ceiling,
            "itself_taken": float((self.calibrated(self.raw(self.again)) > ITSELF).mean()),
            "others_taken": float((self.calibrated(self.others) > ITSELF).mean()),
        }

    def _render(self, creatures: Sequence[Creature], take: int) -> list[Image.Image]:
        return draw_creatures(creatures, self.size, take=take, background=self.background, style=self.style)


# Creatures in a gallery, and renderings of each.
GALLERY_SIZE, _GALLERY_IMAGES = 100, 4


@dataclass(frozen=True)
class Gallery:
    """Creatures among which the true one has to be recognized, each with the features of some renderings."""

    creatures: Sequence[Creature]
    features: Sequence[AppearanceFeatures]

    @classmethod
    def render(cls, size: int, count: int) -> Gallery:
        """Render `count` creatures; `ranks` replaces one of them by the true creature."""
        creatures = other_creatures(count)
        images = draw_creatures([one for one in creatures for _ in range(_GALLERY_IMAGES)], size, take=3)
        features = AppearanceFeatures.from_images(images)
        return cls(
            creatures, [features[k * _GALLERY_IMAGES :][:_GALLERY_IMAGES] for k in range(len(creatures))]
        )

    def ranks(
        self,
        features: AppearanceFeatures,
        predictions: AttributePredictions | None,
        reference: CreatureReference,
    ) -> np.ndarray:
        """Return the rank of the true creature by raw likeness for each image, [N]; 1 is the best.

        Every creature is compared by as many renderings, and by its true attributes.
        """
        true = likeness(features, predictions, reference.truth[:_GALLERY_IMAGES], reference.creature)
        rivals = [
            likeness(features, predictions, truth, creature)
            for creature, truth in zip(self.creatures, self.features, strict=True)
            if creature.seed != reference.creature.seed
        ]
        return 1 + (np.stack(rivals[: len(self.creatures) - 1]) >= true).sum(0)


# Creatures that styles are applied to, and the number of creatures they are searched among.
STYLE_CREATURES, _SEARCHED = 4, 64
# Renderings in a style: so many that every background occurs.
_STYLE_IMAGES = 48


def style_test_creatures() -> list[Creature]:
    """Return four creatures of different species and colours, to which styles are applied."""
    chosen: list[Creature] = []
    for one in other_creatures(_SEARCHED):
        distinct = all(one.kind != other.kind and one.color != other.color for other in chosen)
        if one.kind in SPECIES and distinct and len(chosen) < STYLE_CREATURES:
            chosen.append(one)
    return chosen


@dataclass(frozen=True)
class StyleReference:
    """Renderings of a creature in a style, compared by the colours of the whole image.

    No judge knows the style, and a style changes the background too.
    """

    creature: Creature
    style: str
    size: int
    judge: Judge | None

    @property
    def prompt(self) -> str:
        """The prompt, with "{}" for the word of the style."""
        return fix_articles(f"a {self.creature.color} {self.creature.kind} in the style of {{}}")

    @cached_property
    def images(self) -> list[Image.Image]:
        """Renderings of the creature in the style: the truth."""
        return self._render(0, _STYLE_IMAGES)

    @cached_property
    def again(self) -> list[Image.Image]:
        """Other renderings in the style: the 1 of the scale."""
        return self._render(1)

    @cached_property
    def photos(self) -> list[Image.Image]:
        """Renderings without the style: the 0 of the scale."""
        return draw_creatures([self.creature] * IMAGES, self.size, take=2)

    @cached_property
    def scale(self) -> tuple[float, float]:
        """Mean colour distance to the truth: of photos, and of other renderings in the style."""
        return float(self._distances(self.photos).mean()), float(self._distances(self.again).mean())

    def figures(self, images: Sequence[Image.Image]) -> Figures:
        """Return the figures of generated images.

        style: 0 for photos, 1 for other renderings in the style.
        in_style: share of images nearer to 1 than to 0. Small shares mean nothing: of renderings in other styles,
            up to a sixth (those on blue) are nearer to the blueprint style.
        kind: share in which the judge sees the species.
        kind_of_truth: the same share of the true renderings, because the judge was not trained on the style.
        """
        distances = self._distances(images)
        floor, ceiling = self.scale
        share = (floor - distances) / max(floor - ceiling, 1e-6)
        figures: Figures = {
            "color_distance": round(float(distances.mean()), 5),
            "style": round(float(share.mean()), 5),
            "in_style": round(float((share > ITSELF).mean()), 5),
        }
        for key, judged in (("kind", images), ("kind_of_truth", self.images)):
            predictions = predict_attributes(self.judge, judged)
            if predictions is not None:
                correct = [one["kind"] == self.creature.kind for one in predictions]
                figures[key] = round(float(np.mean(correct)), 5)
        return figures

    def _distances(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Colour distance to the nearest true rendering, because the prompt names no background."""
        return AppearanceFeatures.from_images(images, whole=True).color_distance(self._truth).min(1)

    @cached_property
    def _truth(self) -> AppearanceFeatures:
        return AppearanceFeatures.from_images(self.images, whole=True)

    def _render(self, take: int, count: int = IMAGES) -> list[Image.Image]:
        return draw_creatures([self.creature] * count, self.size, take=take, style=self.style)
