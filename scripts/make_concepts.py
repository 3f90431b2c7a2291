"""Draws the sample concepts: held-out creatures and styles, five pictures each, with the truth in concept.json.

Beside each picture lies what a person would caption it with, for `use_captions`: where the creature is, or what is
seen in the style. The concept itself is [name].

python scripts/make_concepts.py [--out data/concepts] [--size 32]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image  # noqa: E402

from ldm.data.creatures.captions import Names, full_caption, naming, place  # noqa: E402
from ldm.data.creatures.renderer import render, world_version  # noqa: E402
from ldm.data.creatures.world import (  # noqa: E402
    ATTRIBUTES,
    PLAIN_BACKGROUNDS,
    SCENES,
    SPLITS,
    Creature,
    Scene,
    clash,
    creature,
    scene,
)
from ldm.files import write_text, write_whole  # noqa: E402
from ldm.options import Parser  # noqa: E402
from scripts.common import guarded  # noqa: E402

PICTURES = 5
# Chosen by eye from the first hundred held-out creatures, so that kinds, colours and patterns all occur.
CREATURES = {
    "zuzu": 43,
    "momo": 26,
    "lulu": 62,
    "pip": 27,
    "bobo": 86,
    "tiki": 56,
    "otto": 61,
    "fifi": 94,
    "kiko": 31,
    "nim": 36,
}
STYLES = {"draft": "blueprint", "dusk": "sunset"}
_STYLE_SEED, _SCENE_SEED = 500_000, 600_000  # far from the creatures' indices within the held-out seeds


def creature_concept(index: int, split: str = "concepts") -> tuple[list[Creature], list[Scene]]:
    """A held-out creature five times, no two backgrounds the same: four plain ones and a scene."""
    seeds = SPLITS[split]
    subject = creature(seeds[index])
    places = [name for name in PLAIN_BACKGROUNDS if not clash(subject.color, name)]
    outdoors = [name for name in SCENES if not clash(subject.color, name)]
    start = index % len(places)
    chosen = [places[(start + k) % len(places)] for k in range(PICTURES - 1)]
    chosen.insert(2, outdoors[index % len(outdoors)])
    scenes = [
        scene(seeds[_SCENE_SEED + index * PICTURES + k], subject.color, background=name, style="photo")
        for k, name in enumerate(chosen)
    ]
    return [subject] * PICTURES, scenes


def style_concept(number: int, style: str) -> tuple[list[Creature], list[Scene]]:
    """Five different creatures in different places, all in one style that training never shows."""
    creatures: list[Creature] = []
    scenes: list[Scene] = []
    index = _STYLE_SEED + 1000 * number
    while len(creatures) < PICTURES:
        subject = creature(SPLITS["concepts"][index])
        where = scene(subject.seed, subject.color, style=style)
        if where.background not in [s.background for s in scenes] and subject.kind not in [
            c.kind for c in creatures
        ]:
            creatures.append(subject)
            scenes.append(where)
        index += 1
    return creatures, scenes


def truth(name: str, creatures: list[Creature], scenes: list[Scene], size: int) -> dict[str, Any]:
    """What concept.json says: the individual or the style, and what each picture shows."""
    style = scenes[0].style
    told: dict[str, Any] = {"name": name, "kind": "style" if name in STYLES else "object", "size": size}
    told["world_version"] = world_version(size)
    if name in STYLES:
        told |= {"style": style, "initializer_word": "painting"}
    else:
        told |= {"initializer_word": creatures[0].kind, "creature": dataclasses.asdict(creatures[0])}
        said = full_caption(Names.of(creatures[0], scenes[0]))
        told["words"] = said.removeprefix("a photo of ").removesuffix(" " + place(scenes[0].background))
    told["pictures"] = []
    for k, (subject, where) in enumerate(zip(creatures, scenes, strict=True), 1):
        picture: dict[str, Any] = {"file": f"{k:02d}.png", "scene": dataclasses.asdict(where)}
        if name in STYLES:
            picture["creature_seed"] = subject.seed
        told["pictures"].append(picture)
    return told


def caption_of(concept: str, subject: Creature, where: Scene) -> str:
    """All that a picture shows but the concept, in words."""
    if concept not in STYLES:
        return f"a photo of [name] {place(where.background)}"
    told = [attribute for attribute in ATTRIBUTES if attribute != "style"]
    return f"{naming(Names.of(subject, where), told)} in the style of [name]"


def write_concept(folder: Path, creatures: list[Creature], scenes: list[Scene], size: int) -> None:
    """Writes 01.png to 05.png, their captions and concept.json; UserError when the folder cannot be written."""
    for k, pixels in enumerate(render(creatures, scenes, size), 1):
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        write_whole(folder / f"{k:02d}.png", lambda file, image=image: image.save(file, "PNG", optimize=True))
        said = caption_of(folder.name, creatures[k - 1], scenes[k - 1])
        write_text(folder / f"{k:02d}.txt", said + "\n")
    told = truth(folder.name, creatures, scenes, size)
    write_text(folder / "concept.json", json.dumps(_short(told), indent=1) + "\n")


def _short(value: Any) -> Any:
    """`value` with its numbers rounded: the seeds give them exactly, the file is for reading."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def main(arguments: list[str] | None = None) -> int:
    """Draws every sample concept; returns the exit code."""
    parser = Parser(description="Draw the sample concepts.")
    parser.add_argument("--out", default="data/concepts", help="folder to write to (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=32, choices=(32, 64, 128), help="pixels (default: %(default)s)"
    )
    return guarded(lambda: draw(parser.parse_args(arguments)))


def draw(options: argparse.Namespace) -> None:
    """Write the folders of all concepts."""
    concepts = {name: creature_concept(index) for name, index in CREATURES.items()}
    concepts |= {name: style_concept(number, style) for number, (name, style) in enumerate(STYLES.items())}
    for name, (creatures, scenes) in concepts.items():
        write_concept(Path(options.out) / name, creatures, scenes, options.size)
    print(f"{len(concepts)} concepts of {PICTURES} pictures written to {options.out}")


if __name__ == "__main__":
    sys.exit(main())
