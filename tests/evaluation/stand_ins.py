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


def draw_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer drawings behind every scale: the figures get rough, and the tests of what is done with them quick."""
    for module, name, count in (
        (identity, "IMAGES", 2),
        (identity, "OTHERS", 3),
        (identity, "GALLERY_SIZE", 5),
        (identity, "_STYLE_IMAGES", 3),
    ):
        monkeypatch.setattr(module, name, count)


class SayingJudge:
    """Sees the same on every image: what the creature of `seed` is, in one background and style."""

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
    """Features that are an image's mean colour; of words there is one feature, or none."""

    def __init__(self, name: str = "mean-color", words: bool = True) -> None:
        self.name, self.words, self.told = name, words, []

    def image(self, images: Sequence[Image.Image]) -> Tensor:
        return F.normalize(torch.stack([to_tensor(one).mean((1, 2)) + 1.01 for one in images]), dim=-1)

    def text(self, prompts: Sequence[str]) -> Tensor | None:
        self.told += prompts
        return F.normalize(torch.ones(len(prompts), 3), dim=-1) if self.words else None
