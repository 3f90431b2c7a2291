"""How pictures to be judged are generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ldm.evaluation.protocol import SCALE, STEPS
from ldm.generate.pictures import check_settings, generate


@dataclass(frozen=True)
class Sampling:
    """Settings of `generate`, by default those of the paper; UserError for what makes no sense."""

    steps: int = STEPS
    scale: float = SCALE
    sampler: str = "ddim"
    seed: int = 42
    batch_size: int = 8
    precision: str = "full"

    def __post_init__(self) -> None:
        check_settings(self.steps, 0.0, self.sampler, None, None, self.batch_size, self.precision)

    def draw(
        self, model: Any, prompt: str, count: int, done: Callable[[], object] | None = None
    ) -> list[Image.Image]:
        """`count` pictures of a prompt, each prompt from the same noise; `done` is called after each picture."""
        return generate(
            model,
            [prompt] * count,
            steps=self.steps,
            scale=self.scale,
            sampler=self.sampler,
            seed=self.seed,
            batch_size=self.batch_size,
            precision=self.precision,
            on_image=None if done is None else lambda place, picture: done(),
        )
