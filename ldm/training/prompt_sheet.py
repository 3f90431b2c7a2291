"""The fixed prompts of a run, and the sheet that shows what the model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ldm.images import enlarged, image_grid, labelled

# Pictures smaller than this are enlarged, so that the words below them can be read.
SMALLEST = 128


def filled(prompts: Sequence[str], model: Any) -> list[str]:
    """The prompts with each of the model's placeholders in place of `{}`; what has no `{}` stays as it is."""
    words = list(getattr(getattr(model, "embedding_manager", None), "placeholders", {})) or ["*"]
    texts = [prompt.replace("{}", word) for prompt in prompts for word in words]
    return list(dict.fromkeys(texts))


def prompt_sheet(
    inputs: Sequence[Image.Image], prompts: Sequence[str], pictures: Sequence[Image.Image]
) -> Image.Image:
    """A row for each prompt with its pictures, equally many for all, beside one of the inputs."""
    each = len(pictures) // len(prompts)
    cells: list[Image.Image] = []
    for row, prompt in enumerate(prompts):
        if inputs:
            cells.append(labelled(_large(inputs[row % len(inputs)]), "input"))
        cells += [labelled(_large(picture), prompt) for picture in pictures[row * each : (row + 1) * each]]
    return image_grid(cells, columns=len(cells) // len(prompts), padding=4)


def _large(picture: Image.Image) -> Image.Image:
    return enlarged(picture, max(1, -(-SMALLEST // picture.width)))
