"""Concepts to evaluate: their images, the known truth, their embedding files, and drawings to compare with."""

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
from ldm.data.creatures.renderer import render
from ldm.data.creatures.world import SPLITS, Creature, clash, creature, scene
from ldm.images import list_images, open_image
from ldm.util import UserError

_TRUTH = "concept.json"


@dataclass(frozen=True)
class ConceptFolder:
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


def read_concept(folder: str | Path) -> ConceptFolder:
    """The concept in a folder; raises UserError for pictures or a `concept.json` that cannot be read."""
    folder = Path(folder)
    pictures = [open_image(path) for path in list_images(folder)]
    name, path = folder.resolve().name, folder / _TRUTH
    if not path.is_file():
        return ConceptFolder(name, folder, pictures)
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        creature = _creature(told["creature"]) if "creature" in told else None
        texts = (told.get("style"), told.get("words"), told.get("initializer_word"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"'{path}' does not tell the truth about a concept ({reason}); mend it, or remove it to go without"
        ) from error
    return ConceptFolder(name, folder, pictures, creature, *texts)


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


NAME = "{name}"
# Within a folder, tried in this order: files of the concept's name, runs of main.py, folders of its name.
_WITHIN = ("{name}.*", "*{name}*/checkpoints/embeddings.pt", "{name}/*embed*")


def embedding_of(place: str, concept: str, several: bool) -> Path:
    """The file for a concept: `place` itself, its newest match with "{name}" filled in, or within the folder it is.

    Raises UserError where no file is found, and for one file where there are `several` concepts.
    """
    if NAME in place:
        patterns = [place]
    elif Path(place).is_dir():
        patterns = [f"{glob.escape(place.rstrip('/'))}/{pattern}" for pattern in _WITHIN]
    elif not Path(place).is_file():
        raise UserError(f"'{place}' does not exist; check the path")
    elif several:
        raise UserError(
            f"--embedding_path '{place}' is one file for several concepts; write {NAME} for theirs"
        )
    else:
        return Path(place)
    for pattern in patterns:
        found = [Path(path) for path in glob.glob(pattern.replace(NAME, glob.escape(concept)))]
        found = [path for path in found if path.is_file()]
        if found:
            return max(found, key=lambda path: (path.stat().st_mtime, path.name))
    tried = ", ".join(f"'{pattern.replace(NAME, concept)}'" for pattern in patterns)
    raise UserError(f"no embedding for the concept '{concept}': nothing matches {tried}")


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
