"""Does a prompt get what it asks for besides the concept: a background, a scene, a style?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ldm.data.creatures.captions import articled, place
from ldm.data.creatures.world import COLORS, PLAIN_BACKGROUNDS, SCENES, STYLES, Creature, clash
from ldm.evaluation.identity import Readings

PLAIN, OUTDOORS = 4, 2
# Corners that must show the colour: the creature may stand in one of them.
_CORNERS = 3
_IN_STYLE = {
    "sketch": "a sketch of {}",
    "neon": "a neon picture of {}",
    "mosaic": "a mosaic of {}",
    "painting": "a painting of {}",
}


@dataclass(frozen=True)
class Edit:
    """A prompt, with "{}" for the concept, and the value of one attribute that pictures of it must have."""

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
        """Whether the background is one colour, which needs no judge."""
        return self.attribute == "background" and self.value in COLORS

    @property
    def group(self) -> str:
        """What this is an edit of: "plain", "scene" or "style"."""
        return "plain" if self.plain else "scene" if self.attribute == "background" else "style"


def edits_of(creature: Creature) -> list[Edit]:
    """Four plain backgrounds, two scenes and every style but the photo, none in which the creature gets lost.

    Which ones follows from the creature's seed, so that over several creatures all occur.
    """
    plain = _turned([b for b in PLAIN_BACKGROUNDS if not clash(creature.color, b)], creature.seed)[:PLAIN]
    outdoors = _turned([b for b in SCENES if not clash(creature.color, b)], creature.seed)[:OUTDOORS]
    grounds = [Edit(articled(f"a photo of {{}} {place(b)}"), "background", b) for b in (*plain, *outdoors)]
    return grounds + [Edit(_IN_STYLE[style], "style", style) for style in STYLES if style != "photo"]


def obeyed(edit: Edit, pictures: Sequence[Image.Image], readings: Readings | None) -> np.ndarray | None:
    """Whether each picture has what was asked for, bool [N]; None where it takes a judge and there is none.

    A plain background must be seen by the judge, if there is one, and in the corners.
    """
    seen = None if readings is None else np.array([one[edit.attribute] == edit.value for one in readings])
    if not edit.plain:
        return seen
    corners = np.array([has_background(picture, edit.value) for picture in pictures])
    return corners if seen is None else corners & seen


def has_background(picture: Image.Image, color: str) -> bool:
    """Whether the corners have a plain background's colour: nearer to it than to any other, in all but one."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    side = max(2, min(pixels.shape[:2]) // 10)
    names = list(PLAIN_BACKGROUNDS)
    known = np.array([COLORS[name] for name in names], dtype=np.float32)
    found = 0
    for rows in (slice(None, side), slice(-side, None)):
        for columns in (slice(None, side), slice(-side, None)):
            corner = np.median(pixels[rows, columns].reshape(-1, 3), axis=0)
            found += names[int(np.linalg.norm(known - corner, axis=1).argmin())] == color
    return found >= _CORNERS


def _turned(names: list[str], by: int) -> list[str]:
    start = by % len(names)
    return names[start:] + names[:start]
