"""How pictures to be judged are generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
        self, model: Any, prompts: Sequence[str], count: int, done: Callable[[], object] | None = None
    ) -> Iterator[list[Image.Image]]:
        """`count` pictures of each prompt in turn, all prompts from the same noises.

        As many prompts as fit into a batch are drawn together. `done` is called after each picture.
        """
        together = max(1, self.batch_size // count)
        for first in range(0, len(prompts), together):
            some = prompts[first : first + together]
            pictures = generate(
                model,
                [prompt for prompt in some for _ in range(count)],
                numbers=[*range(count)] * len(some),
                steps=self.steps,
                scale=self.scale,
                sampler=self.sampler,
                seed=self.seed,
                batch_size=self.batch_size,
                precision=self.precision,
                on_image=None if done is None else lambda place, picture: done(),
            )
            yield from (pictures[i * count :][:count] for i in range(len(some)))
