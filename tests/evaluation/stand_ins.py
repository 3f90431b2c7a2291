"""Small judges and feature extractors in place of trained ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data.creatures.world import creature
from ldm.evaluation import identity
from ldm.images import to_tensor


def use_few_renderings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use fewer renderings for every scale: figures get less precise, and tests faster."""
    for module, name, count in (
        (identity, "IMAGES", 2),
        (identity, "OTHERS", 3),
        (identity, "GALLERY_SIZE", 5),
        (identity, "_STYLE_IMAGES", 3),
    ):
        monkeypatch.setattr(module, name, count)


class FixedJudge:
    """Predicts the same for every image: the attributes of the creature of `seed`, one background and one style."""

    def __init__(self, seed: int, **seen: Any) -> None:
        one = creature(seed)
        names = ("kind", "color", "second", "pattern", "eyes", "ears")
        self.seen = {name: getattr(one, name) for name in names}
        self.seen |= {"background": "blue", "style": "photo"} | seen
        self.batches: list[int] = []

    def predict(self, pixels: Tensor) -> list[dict[str, Any]]:
        self.batches.append(len(pixels))
        return [dict(self.seen) for _ in range(len(pixels))]


class MeanColor:
    """Features of an image are its mean colour; all texts have the same features, or none."""

    def __init__(self, name: str = "mean-color", words: bool = True) -> None:
        self.name, self.words, self.prompts = name, words, []

    def image(self, images: Sequence[Image.Image]) -> Tensor:
        return F.normalize(torch.stack([to_tensor(one).mean((1, 2)) + 1.01 for one in images]), dim=-1)

    def text(self, prompts: Sequence[str]) -> Tensor | None:
        self.prompts += prompts
        return F.normalize(torch.ones(len(prompts), 3), dim=-1) if self.words else None
