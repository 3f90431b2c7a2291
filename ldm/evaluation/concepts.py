"""The concepts of an evaluation: their images, ground truth and embedding files, and rendered creatures."""

from __future__ import annotations

import dataclasses
import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.data.creatures.builds import Build
from ldm.data.creatures.world import SPLITS, Creature, clash, creature, scene
from ldm.front_ends import setting
from ldm.images import list_images, open_image
from ldm.util import UserError

_TRUTH_FILE = "concept.json"


@dataclass(frozen=True)
class ConceptFolder:
    """The images of a concept, and its ground truth where a `concept.json` gives one.

    creature: the creature shown, which can be rendered again.
    style: the rendering style that is the concept.
    words: the most detailed caption of the creature.
    init_word: the word whose vector training starts from.
    backgrounds: of the images.
    """

    name: str
    folder: Path
    images: list[Image.Image]
    creature: Creature | None = None
    style: str | None = None
    words: str | None = None
    init_word: str | None = None
    backgrounds: tuple[str, ...] = ()


def find_concepts(folder: str | Path) -> list[Path]:
    """Return the folder if it contains images, otherwise its direct subfolders that do, sorted.

    Raises UserError if there are none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"concept folder '{folder}' does not exist; name a folder of images, or a folder of such folders"
        )
    if _has_images(folder):
        return [folder]
    found = [path for path in sorted(folder.iterdir()) if path.is_dir() and _has_images(path)]
    if not found:
        raise UserError(f"there are no images in '{folder}' or in its subfolders; name a folder of images")
    return found


def read_concept(folder: str | Path) -> ConceptFolder:
    """Read a concept; raises UserError if an image or its `concept.json` cannot be read."""
    folder = Path(folder)
    images = [open_image(path) for path in list_images(folder)]
    name, path = folder.resolve().name, folder / _TRUTH_FILE
    if not path.is_file():
        return ConceptFolder(name, folder, images)
    try:
        truth = json.loads(path.read_text(encoding="utf-8"))
        creature = _creature_from(truth["creature"]) if "creature" in truth else None
        texts = (truth.get("style"), truth.get("words"), truth.get("initializer_word"))
        backgrounds = tuple(str(one["scene"]["background"]) for one in truth.get("pictures", ()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"'{path}' is no valid description of a concept ({reason}); correct it, or remove it to do without"
        ) from error
    return ConceptFolder(name, folder, images, creature, *texts, backgrounds)


def _creature_from(values: Mapping[str, Any]) -> Creature:
    """Build the creature from the values in `concept.json`, not from its seed."""
    build = Build(**{key: _list_to_tuple(value) for key, value in values["build"].items()})
    fields = {field.name: _list_to_tuple(values[field.name]) for field in dataclasses.fields(Creature)}
    return Creature(**(fields | {"build": build}))


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _has_images(folder: Path) -> bool:
    try:
        return bool(list_images(folder))
    except UserError:
        return False


NAME_FIELD = "{name}"
# Patterns inside a folder, in order: a file with the concept's name, a run of main.py, a folder with its name.
_FOLDER_PATTERNS = ("{name}.*", "*{name}*/checkpoints/embeddings.pt", "{name}/*embed*")


def find_embedding(place: str, concept: str, several: bool) -> Path:
    """Return the embedding file of a concept: a file, a pattern with "{name}", or a folder to search.

    Of several matches the newest one is returned. Raises UserError if no file matches, or if `place` is a single
    file although there are `several` concepts.
    """
    if NAME_FIELD in place:
        patterns = [place]
    elif Path(place).is_dir():
        patterns = [f"{glob.escape(place.rstrip('/'))}/{pattern}" for pattern in _FOLDER_PATTERNS]
    elif not Path(place).is_file():
        raise UserError(f"'{place}' does not exist; check the path")
    elif several:
        raise UserError(
            f"{setting('words')} '{place}' is one file for several concepts; write {NAME_FIELD} where the name goes"
        )
    else:
        return Path(place)
    for pattern in patterns:
        found = [Path(path) for path in glob.glob(pattern.replace(NAME_FIELD, glob.escape(concept)))]
        found = [path for path in found if path.is_file()]
        if found:
            return max(found, key=lambda path: (path.stat().st_mtime, path.name))
    tried = ", ".join(f"'{pattern.replace(NAME_FIELD, concept)}'" for pattern in patterns)
    raise UserError(f"no embedding for the concept '{concept}': nothing matches {tried}")


EVALUATION_SEEDS = SPLITS["evaluation"]
# First indices of other creatures and of scenes within these seeds. Studies use the creatures from 0 and the scenes
# from 600,000, so nothing is used twice.
_FIRST_OTHER, _FIRST_SCENE = 300_000, 700_000


def draw_creatures(
    creatures: Sequence[Creature],
    size: int,
    *,
    take: int,
    background: str | None = None,
    style: str = "photo",
) -> list[Image.Image]:
    """Render each creature once, each in a different scene, as images of [size, size].

    Another `take` (below 1000) gives other scenes. Without a `background` each scene has a random one.
    """
    from ldm.data.creatures.renderer import render

    fixed: dict[str, Any] = {"style": style} | ({"background": background} if background else {})
    first = _FIRST_SCENE + take * 1000
    scenes = [scene(EVALUATION_SEEDS[first + k], one.color, **fixed) for k, one in enumerate(creatures)]
    return [
        Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in render(list(creatures), scenes, size)
    ]


def other_creatures(
    count: int, unlike: Creature | None = None, background: str | None = None
) -> list[Creature]:
    """Return `count` creatures that are no concept, without `unlike` and those hard to see on `background`."""
    found: list[Creature] = []
    for seed in range(EVALUATION_SEEDS[_FIRST_OTHER], EVALUATION_SEEDS.stop):
        one = creature(seed)
        if one != unlike and not (background and clash(one.color, background)):
            found.append(one)
        if len(found) == count:
            break
    return found
