"""True pictures for comparison: a creature redrawn in new scenes, and other creatures, by seeds no training used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ldm.data.creatures.renderer import render
from ldm.data.creatures.world import SPLITS, Creature, clash, creature, scene

SEEDS = SPLITS["evaluation"]
# Where others and scenes begin within those seeds: a study inverts the first creatures, in scenes from 600,000 on.
_OTHERS, _SCENES = 300_000, 700_000


def redrawn(
    creatures: Sequence[Creature],
    size: int,
    *,
    take: int,
    background: str | None = None,
    style: str = "photo",
) -> list[Image.Image]:
    """Each creature once, in a scene of its own and another for another `take`, [size, size].

    Without a `background` each stands where the world puts it.
    """
    fixed: dict[str, Any] = {"style": style} | ({"background": background} if background else {})
    first = _SCENES + take * 1000
    scenes = [scene(SEEDS[first + k], one.color, **fixed) for k, one in enumerate(creatures)]
    return [
        Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in render(list(creatures), scenes, size)
    ]


def others(count: int, unlike: Creature | None = None, background: str | None = None) -> list[Creature]:
    """The first `count` creatures that are nobody's concept, less `unlike` and those lost against `background`."""
    found: list[Creature] = []
    for seed in range(SEEDS[_OTHERS], SEEDS.stop):
        one = creature(seed)
        if one != unlike and not (background and clash(one.color, background)):
            found.append(one)
        if len(found) == count:
            break
    return found
