"""Are prompts obeyed? Prompts that name attributes, and what a judge sees in the pictures of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from PIL import Image

from ldm.data.creatures.builds import pick
from ldm.data.creatures.captions import Names, naming
from ldm.data.creatures.world import ATTRIBUTES, COLORS, SPECIES, STYLES, clash, creature
from ldm.evaluation.edits import has_background

# What the figures are called; a kind is asked for by the name of a species.
TOLD = {
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
_STYLED_SHARE = 0.4
_SOMETIMES = ("pattern", "eyes", "ears")


@dataclass(frozen=True)
class Order:
    """A prompt and what its picture has to show: `told` are the attributes that the prompt names."""

    prompt: str
    names: Names
    told: tuple[str, ...]


def orders(count: int, seed: int) -> list[Order]:
    """`count` prompts, the same for a seed: species, colour and background always, three other attributes by halves.

    Two in five ask for a style instead of a background, in turn each of those that are no photo.
    """
    rng = random.Random(f"orders {seed}")
    styles = [style for style in STYLES if style != "photo"]
    made = []
    for number in range(count):
        styled = number % 5 < 5 * _STYLED_SHARE
        drawn = creature(rng.randrange(2**31), kind=pick(rng, SPECIES))
        places = [value for value in ATTRIBUTES["background"] if not clash(drawn.color, value)]
        style = styles[number // 5 % len(styles)] if styled else "photo"
        names = Names(
            drawn.kind, drawn.color, drawn.second, drawn.pattern, drawn.eyes, drawn.ears, pick(rng, places), style
        )  # fmt: skip
        told = ["kind", "color", "style" if styled else "background"]
        # A style may hide what is small: it is asked for in photos.
        told += [] if styled else [name for name in _SOMETIMES if rng.random() < 0.5]
        made.append(Order(naming(names, told), names, tuple(told)))
    return made


def counted(
    orders: Sequence[Order], pictures: Iterable[Image.Image], readings: Iterable[Mapping[str, Any]]
) -> dict[str, tuple[int, int]]:
    """For each key of `TOLD` (obeyed, asked for); `readings` are the judge's of `pictures`, in order.

    What a style does to colours is its own affair: colours count in photos alone.
    """
    found = dict.fromkeys(TOLD, (0, 0))

    def count(name: str, right: bool) -> None:
        obeyed, asked = found[name]
        found[name] = (obeyed + bool(right), asked + 1)

    for order, picture, seen in zip(orders, pictures, readings, strict=True):
        photo = "style" not in order.told
        for name in order.told:
            if photo or name != "color":
                count(name, seen[name] == getattr(order.names, name))
        if "pattern" in order.told and order.names.pattern != "plain":
            count("second", seen["second"] == order.names.second)
        if photo and order.names.background in COLORS:
            count("corners", has_background(picture, order.names.background))
    return found


def interval(right: int, of: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson, 1927); (0, 1) of nothing."""
    if not of:
        return 0.0, 1.0
    z = 1.96
    share, weight = right / of, 1 + z * z / of
    middle = (share + z * z / (2 * of)) / weight
    half = z * sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / weight
    return max(0.0, middle - half), min(1.0, middle + half)
