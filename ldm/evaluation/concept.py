"""A folder with pictures of a concept, and the truth about it where a `concept.json` tells."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.data.creatures.builds import Build
from ldm.data.creatures.world import Creature
from ldm.images import list_images, open_image
from ldm.util import UserError

_TRUTH = "concept.json"


@dataclass(frozen=True)
class Concept:
    """Pictures, and of what: a `creature` that can be drawn again, a `style` of the world, or neither.

    `words` is the best that words can say of a creature, and `init_word` what its inversion starts from.
    """

    name: str
    folder: Path
    pictures: list[Image.Image]
    creature: Creature | None = None
    style: str | None = None
    words: str | None = None
    init_word: str | None = None


def find_concepts(folder: str | Path) -> list[Path]:
    """The folder itself if it holds pictures, else those of its subfolders that do, sorted.

    Raises UserError where there is neither.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"concept folder '{folder}' does not exist; name a folder of pictures, or one of such folders"
        )
    if _has_pictures(folder):
        return [folder]
    found = [one for one in sorted(folder.iterdir()) if one.is_dir() and _has_pictures(one)]
    if not found:
        raise UserError(f"there are no pictures in '{folder}' or right below it; name a folder of pictures")
    return found


def read_concept(folder: str | Path) -> Concept:
    """The concept in a folder; raises UserError for pictures or a `concept.json` that cannot be read."""
    folder = Path(folder)
    pictures = [open_image(path) for path in list_images(folder)]
    name, path = folder.resolve().name, folder / _TRUTH
    if not path.is_file():
        return Concept(name, folder, pictures)
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        creature = _creature(told["creature"]) if "creature" in told else None
        texts = (told.get("style"), told.get("words"), told.get("initializer_word"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"'{path}' does not tell the truth about a concept ({reason}); mend it, or remove it to go without"
        ) from error
    return Concept(name, folder, pictures, creature, *texts)


def _creature(told: Mapping[str, Any]) -> Creature:
    """The creature that `concept.json` describes, drawn by what it says rather than by the seed."""
    build = Build(**{key: _tupled(value) for key, value in told["build"].items()})
    fields = {field.name: _tupled(told[field.name]) for field in dataclasses.fields(Creature)}
    return Creature(**(fields | {"build": build}))


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _has_pictures(folder: Path) -> bool:
    try:
        return bool(list_images(folder))
    except UserError:
        return False
