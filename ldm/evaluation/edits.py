"""Edit prompts, which ask for a background, scene or style, and whether images show what was asked for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ldm.data.creatures.captions import background_phrase, fix_articles
from ldm.data.creatures.world import COLORS, PLAIN_BACKGROUNDS, SCENES, STYLES, Creature, clash
from ldm.evaluation.identity import AttributePredictions

# Edits per creature with a plain background, and with a scene.
PLAIN_EDITS, SCENE_EDITS = 4, 2
# Corners that must have the colour: the creature may cover the fourth.
_CORNERS = 3
_STYLE_PROMPTS = {
    "sketch": "a sketch of {}",
    "neon": "a neon picture of {}",
    "mosaic": "a mosaic of {}",
    "painting": "a painting of {}",
}


@dataclass(frozen=True)
class Edit:
    """A prompt with "{}" for the concept, and the attribute value that its images must show."""

    prompt: str
    attribute: str
    value: str

    @property
    def background(self) -> str | None:
        return self.value if self.attribute == "background" else None

    @property
    def style(self) -> str:
        return self.value if self.attribute == "style" else "photo"

    @property
    def plain(self) -> bool:
        """Whether it asks for a background of one colour, which can be checked without a judge."""
        return self.attribute == "background" and self.value in COLORS

    @property
    def group(self) -> str:
        """The kind of edit: "plain", "scene" or "style"."""
        return "plain" if self.plain else "scene" if self.attribute == "background" else "style"


def edits_of(creature: Creature, seen: Collection[str] = ()) -> list[Edit]:
    """Return edits to four plain backgrounds, two scenes and every style except photo.

    Backgrounds on which the creature is hard to see are left out. The creature's seed selects from the others, so
    that all of them occur over several creatures.

    seen: backgrounds of the training images, which a word may hold; they are taken only where there are too few others.
    """

    def chosen(names: Sequence[str], count: int) -> list[str]:
        possible = _rotate([b for b in names if not clash(creature.color, b)], creature.seed)
        return sorted(possible, key=lambda name: name in seen)[:count]

    backgrounds = [
        Edit(fix_articles(f"a photo of {{}} {background_phrase(b)}"), "background", b)
        for b in (*chosen(PLAIN_BACKGROUNDS, PLAIN_EDITS), *chosen(SCENES, SCENE_EDITS))
    ]
    return backgrounds + [Edit(_STYLE_PROMPTS[style], "style", style) for style in STYLES if style != "photo"]


def obeyed(
    edit: Edit, images: Sequence[Image.Image], predictions: AttributePredictions | None
) -> np.ndarray | None:
    """Return whether each image shows what was asked for, bool [N]; None if that needs a judge and there is none.

    A plain background must be seen in the corners and, if there is a judge, by the judge.
    """
    seen = (
        None if predictions is None else np.array([one[edit.attribute] == edit.value for one in predictions])
    )
    if not edit.plain:
        return seen
    corners = np.array([has_background(image, edit.value) for image in images])
    return corners if seen is None else corners & seen


def has_background(image: Image.Image, color: str) -> bool:
    """Return whether at least three corners are nearer to this colour than to any other plain background."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    side = max(2, min(pixels.shape[:2]) // 10)
    names = list(PLAIN_BACKGROUNDS)
    known = np.array([COLORS[name] for name in names], dtype=np.float32)
    found = 0
    for rows in (slice(None, side), slice(-side, None)):
        for columns in (slice(None, side), slice(-side, None)):
            corner = np.median(pixels[rows, columns].reshape(-1, 3), axis=0)
            found += names[int(np.linalg.norm(known - corner, axis=1).argmin())] == color
    return found >= _CORNERS


def _rotate(names: list[str], by: int) -> list[str]:
    start = by % len(names)
    return names[start:] + names[:start]
