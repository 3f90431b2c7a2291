"""How often generated images show what a prompt asks for: prompts with known attributes, and a judge's answers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from PIL import Image

from ldm.data.creatures.builds import pick
from ldm.data.creatures.captions import Description, attribute_caption
from ldm.data.creatures.world import ATTRIBUTES, COLORS, SPECIES, STYLES, clash, creature
from ldm.evaluation.edits import has_background

# Titles of the measured attributes. "corners" is a plain background, checked without the judge.
TITLES = {
    "background": "background",
    "color": "body colour",
    "kind": "species",
    "style": "style",
    "ears": "ears",
    "eyes": "eyes",
    "pattern": "pattern",
    "second": "second colour",
    "corners": "plain background, by its corners",
}
# Of every five prompts, so many ask for a style.
_STYLED_OF_FIVE = 2
_OPTIONAL = ("pattern", "eyes", "ears")


@dataclass(frozen=True)
class PromptCase:
    """A prompt, the image it describes, and the attributes that it names."""

    prompt: str
    description: Description
    attributes: tuple[str, ...]


def draw_prompts(count: int, seed: int) -> list[PromptCase]:
    """Draw `count` prompts, the same ones for a seed.

    All name species and colour. Three in five also name the background, and each of pattern, eyes and ears with
    probability 1/2. Two in five name a style instead, because a style may hide small parts; every style in turn.
    """
    rng = random.Random(f"orders {seed}")
    styles = [style for style in STYLES if style != "photo"]
    prompts = []
    for number in range(count):
        styled = number % 5 < _STYLED_OF_FIVE
        drawn = creature(rng.randrange(2**31), kind=pick(rng, SPECIES))
        backgrounds = [value for value in ATTRIBUTES["background"] if not clash(drawn.color, value)]
        style = styles[number // 5 % len(styles)] if styled else "photo"
        description = Description(
            drawn.kind, drawn.color, drawn.second, drawn.pattern, drawn.eyes, drawn.ears,
            pick(rng, backgrounds), style,
        )  # fmt: skip
        attributes = ["kind", "color", "style" if styled else "background"]
        attributes += [] if styled else [name for name in _OPTIONAL if rng.random() < 0.5]
        prompts.append(PromptCase(attribute_caption(description, attributes), description, tuple(attributes)))
    return prompts


def count_obeyed(
    prompts: Sequence[PromptCase],
    images: Iterable[Image.Image],
    predictions: Iterable[Mapping[str, Any]],
) -> dict[str, tuple[int, int]]:
    """Return (obeyed, asked for) by key of `TITLES`.

    predictions: the judge's predictions for `images`, in the order of `prompts`. Colours are counted in photos only,
        because a style may change them.
    """
    counts = dict.fromkeys(TITLES, (0, 0))

    def count(name: str, correct: bool) -> None:
        obeyed, asked = counts[name]
        counts[name] = (obeyed + bool(correct), asked + 1)

    for prompt, image, predicted in zip(prompts, images, predictions, strict=True):
        truth, photo = prompt.description, "style" not in prompt.attributes
        for name in prompt.attributes:
            if photo or name != "color":
                count(name, predicted[name] == getattr(truth, name))
        if "pattern" in prompt.attributes and truth.pattern != "plain":
            count("second", predicted["second"] == truth.second)
        if photo and truth.background in COLORS:
            count("corners", has_background(image, truth.background))
    return counts


def confidence_interval(correct: int, of: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share (Wilson, 1927); (0, 1) if `of` is 0."""
    if not of:
        return 0.0, 1.0
    z = 1.96
    share, weight = correct / of, 1 + z * z / of
    middle = (share + z * z / (2 * of)) / weight
    half = z * sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / weight
    return max(0.0, middle - half), min(1.0, middle + half)
