"""Render the sample concepts: held-out creatures and styles, five images each, described by a concept.json.

A .txt beside each image has the caption for `use_captions`: the creature's background, or what is seen in the style.
[name] stands for the concept itself.

python scripts/make_concepts.py [--out data/concepts] [--size 32]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

if not __package__:
    import checkout  # noqa: F401

from PIL import Image  # noqa: E402

from ldm.commands.base import guarded  # noqa: E402
from ldm.console import Parser  # noqa: E402
from ldm.data.creatures.captions import Description, attribute_caption, background_phrase, full_caption  # noqa: E402
from ldm.data.creatures.renderer import render, world_version  # noqa: E402
from ldm.data.creatures.world import (
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
from ldm.files import atomic_write, write_text  # noqa: E402

IMAGES = 5
# Selected from the first hundred held-out creatures so that different kinds, colours and patterns occur.
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
    """Return a held-out creature five times, with five different backgrounds: four plain ones and a scene."""
    seeds = SPLITS[split]
    one = creature(seeds[index])
    plain = [name for name in PLAIN_BACKGROUNDS if not clash(one.color, name)]
    outdoor = [name for name in SCENES if not clash(one.color, name)]
    start = index % len(plain)
    chosen = [plain[(start + k) % len(plain)] for k in range(IMAGES - 1)]
    chosen.insert(2, outdoor[index % len(outdoor)])
    scenes = [
        scene(seeds[_SCENE_SEED + index * IMAGES + k], one.color, background=name, style="photo")
        for k, name in enumerate(chosen)
    ]
    return [one] * IMAGES, scenes


def style_concept(number: int, style: str) -> tuple[list[Creature], list[Scene]]:
    """Return five creatures of different species on different backgrounds, all in a held-out style."""
    creatures: list[Creature] = []
    scenes: list[Scene] = []
    index = _STYLE_SEED + 1000 * number
    while len(creatures) < IMAGES:
        one = creature(SPLITS["concepts"][index])
        surroundings = scene(one.seed, one.color, style=style)
        new_background = surroundings.background not in [s.background for s in scenes]
        if new_background and one.kind not in [c.kind for c in creatures]:
            creatures.append(one)
            scenes.append(surroundings)
        index += 1
    return creatures, scenes


def truth(name: str, creatures: list[Creature], scenes: list[Scene], size: int) -> dict[str, Any]:
    """Return the content of concept.json: the creature or the style, and what each image shows."""
    style = scenes[0].style
    content: dict[str, Any] = {"name": name, "kind": "style" if name in STYLES else "object", "size": size}
    content["world_version"] = world_version(size)
    if name in STYLES:
        content |= {"style": style, "initializer_word": "painting"}
    else:
        content |= {"initializer_word": creatures[0].kind, "creature": dataclasses.asdict(creatures[0])}
        caption = full_caption(Description.of(creatures[0], scenes[0]))
        content["words"] = caption.removeprefix("a photo of ").removesuffix(
            " " + background_phrase(scenes[0].background)
        )
    content["pictures"] = []
    for k, (one, surroundings) in enumerate(zip(creatures, scenes, strict=True), 1):
        image: dict[str, Any] = {"file": f"{k:02d}.png", "scene": dataclasses.asdict(surroundings)}
        if name in STYLES:
            image["creature_seed"] = one.seed
        content["pictures"].append(image)
    return content


def caption_of(concept: str, one: Creature, surroundings: Scene) -> str:
    """Describe everything in an image except the concept itself."""
    if concept not in STYLES:
        return f"a photo of [name] {background_phrase(surroundings.background)}"
    attributes = [attribute for attribute in ATTRIBUTES if attribute != "style"]
    return f"{attribute_caption(Description.of(one, surroundings), attributes)} in the style of [name]"


def write_concept(folder: Path, creatures: list[Creature], scenes: list[Scene], size: int) -> None:
    """Write 01.png to 05.png, their captions and concept.json; raises UserError if writing fails."""
    for k, pixels in enumerate(render(creatures, scenes, size), 1):
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        atomic_write(
            folder / f"{k:02d}.png", lambda file, image=image: image.save(file, "PNG", optimize=True)
        )
        caption = caption_of(folder.name, creatures[k - 1], scenes[k - 1])
        write_text(folder / f"{k:02d}.txt", caption + "\n")
    content = truth(folder.name, creatures, scenes, size)
    write_text(folder / "concept.json", json.dumps(_rounded(content), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """Round all numbers in a JSON value, so that people can read it; the seeds give the exact numbers."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def main(arguments: list[str] | None = None) -> int:
    """Write every sample concept; returns the exit code."""
    parser = Parser(description="Render the sample concepts.")
    parser.add_argument("--out", default="data/concepts", help="folder to write to (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=32, choices=(32, 64, 128), help="pixels (default: %(default)s)"
    )
    return guarded(lambda: draw(parser.parse_args(arguments)))


def draw(options: argparse.Namespace) -> None:
    """Write the folder of each concept."""
    concepts = {name: creature_concept(index) for name, index in CREATURES.items()}
    concepts |= {name: style_concept(number, style) for number, (name, style) in enumerate(STYLES.items())}
    for name, (creatures, scenes) in concepts.items():
        write_concept(Path(options.out) / name, creatures, scenes, options.size)
    print(f"{len(concepts)} concepts of {IMAGES} images written to {options.out}")


if __name__ == "__main__":
    sys.exit(main())
