"""The world of creatures: attributes, seeds and individuals, and how seeds give creatures and scenes."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

from ldm.data.creatures.builds import Build, draw_build, pick, uniform

SPECIES = ("bear", "bird", "fish", "fox", "giraffe", "octopus", "robot", "snail")
CREATURE = "creature"  # the kind of every creature that is of no species
KINDS = (*SPECIES, CREATURE)
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 40),
    "orange": (246, 136, 20),
    "yellow": (250, 220, 50),
    "green": (52, 160, 62),
    "blue": (42, 92, 220),
    "purple": (130, 52, 180),
    "pink": (250, 144, 190),
    "brown": (126, 76, 38),
    "gray": (142, 144, 150),
    "white": (246, 246, 244),
    "black": (26, 24, 28),
}
BODY_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray")
SECOND_COLORS = tuple(COLORS)
PATTERNS = ("plain", "stripes", "spots", "belly")
EYES = (1, 2, 3)
EARS = ("none", "round", "pointed", "long", "floppy", "horns")
PLAIN_BACKGROUNDS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "gray", "black")
SCENES = ("beach", "forest", "night", "snow")
BACKGROUNDS = (*PLAIN_BACKGROUNDS, *SCENES)
STYLES = ("photo", "sketch", "neon", "mosaic", "painting")
HELD_OUT_STYLES = ("blueprint", "sunset")

# The values of each attribute that captions can name. Labels are stored in this order.
ATTRIBUTES: dict[str, tuple[Any, ...]] = {
    "kind": KINDS,
    "color": BODY_COLORS,
    "second": SECOND_COLORS,
    "pattern": PATTERNS,
    "eyes": EYES,
    "ears": EARS,
    "background": BACKGROUNDS,
    "style": STYLES,
}

FREE_SHARE = 0.35
PHOTO_SHARE = 0.8

# Colours that are hard to see in front of a scene.
_HIDDEN_IN = {
    "beach": ("yellow", "blue"),
    "forest": ("green", "brown"),
    "night": ("blue", "purple", "brown", "black"),
    "snow": ("gray", "white"),
}
_MIN_DISTANCE = 0.52  # RGB distance below which two named colours are not combined


@dataclass(frozen=True)
class Creature:
    """A creature: its attributes, and what captions cannot describe (`build` and the exact colours)."""

    seed: int
    kind: str
    color: str
    second: str
    pattern: str
    eyes: int
    ears: str
    rgb: tuple[float, float, float]
    second_rgb: tuple[float, float, float]
    build: Build


@dataclass(frozen=True)
class Scene:
    """Background, style and pose: everything that differs between two images of the same creature."""

    seed: int
    background: str
    style: str
    rgb: tuple[float, float, float]
    x: float
    y: float
    scale: float
    tilt: float
    facing: float
    swing: float
    gaze: tuple[float, float]
    light: float


@dataclass(frozen=True)
class SeedRange:
    """Seeds from `start` to `stop`, without `stop`."""

    start: int
    stop: int

    def __getitem__(self, index: int) -> int:
        """Return the seed at `index`; raises IndexError for an index outside of the range."""
        if not 0 <= index < len(self):
            raise IndexError(f"seed {index} of a range of {len(self)}")
        return self.start + index

    def __len__(self) -> int:
        return self.stop - self.start


SPLITS: dict[str, SeedRange] = {
    "train": SeedRange(0, 10_000_000),
    "validation": SeedRange(10_000_000, 11_000_000),
    "concepts": SeedRange(11_000_000, 12_000_000),
    "evaluation": SeedRange(12_000_000, 13_000_000),
    "classifier": SeedRange(13_000_000, 20_000_000),
    "individuals": SeedRange(20_000_000, 20_000_512),
}


def clash(color: str, other: str) -> bool:
    """Return whether `color` is hard to see beside `other`, a colour or a scene."""
    if other in _HIDDEN_IN:
        return color in _HIDDEN_IN[other]
    if {color, other} == {"purple", "brown"}:
        return True  # distant in RGB, but equally dark
    return (
        sum((a - b) ** 2 for a, b in zip(COLORS[color], COLORS[other], strict=True))
        < (255 * _MIN_DISTANCE) ** 2
    )


def creature(seed: int, **fixed: object) -> Creature:
    """Return the creature of a seed, the same on every machine; `fixed` fields (kind, ...) replace random ones."""
    rng = random.Random(f"creature {seed}")
    kind = CREATURE if rng.random() < FREE_SHARE else pick(rng, SPECIES)
    color = pick(rng, BODY_COLORS)
    pattern = PATTERNS[0] if rng.random() < 0.22 else pick(rng, PATTERNS[1:])
    eyes = pick(rng, EYES)
    ears = pick(rng, EARS)
    kind, color = str(fixed.get("kind", kind)), str(fixed.get("color", color))
    second = pick(rng, [name for name in SECOND_COLORS if not clash(color, name)])
    second = str(fixed.get("second", second))
    drawn = Creature(
        seed,
        kind,
        color,
        second,
        pattern,
        eyes,
        ears,
        jittered(rng, color),
        jittered(rng, second),
        draw_build(kind, rng),
    )
    return dataclasses.replace(drawn, **fixed)  # type: ignore[arg-type]


def scene(seed: int, body_color: str, **fixed: object) -> Scene:
    """Return the scene of a seed, in which `body_color` is easy to see; `fixed` fields replace random ones."""
    rng = random.Random(f"scene {seed}")
    style = STYLES[0] if rng.random() < PHOTO_SHARE else pick(rng, STYLES[1:])
    background = pick(rng, [name for name in BACKGROUNDS if not clash(body_color, name)])
    background = str(fixed.get("background", background))
    drawn = Scene(
        seed=seed,
        background=background,
        style=style,
        rgb=jittered(rng, background, 0.5) if background in COLORS else (0.0, 0.0, 0.0),
        x=uniform(rng, -0.06, 0.06),
        y=uniform(rng, -0.05, 0.05),
        scale=uniform(rng, 0.92, 1.04),
        tilt=uniform(rng, -0.1, 0.1),
        facing=-1.0 if rng.random() < 0.5 else 1.0,
        swing=uniform(rng, -1.0, 1.0),
        gaze=(uniform(rng, -1.0, 1.0), uniform(rng, -0.6, 0.6)),
        light=uniform(rng, 0.0, 1.0),
    )
    return dataclasses.replace(drawn, **fixed)  # type: ignore[arg-type]


def jittered(rng: random.Random, color: str, amount: float = 1.0) -> tuple[float, float, float]:
    """Return a random RGB in [0, 1] near the named colour, still recognisable as it."""
    value = 1 + amount * uniform(rng, -0.1, 0.06)
    return tuple(  # type: ignore[return-value]
        round(min(1.0, max(0.0, channel / 255 * value + amount * uniform(rng, -0.04, 0.04))), 4)
        for channel in COLORS[color]
    )


_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def _draw_names(count: int) -> tuple[str, ...]:
    """Draw different words of two different syllables."""
    rng = random.Random("names")
    names: dict[str, None] = {}
    while len(names) < count:
        first, second = (pick(rng, _CONSONANTS) + pick(rng, _VOWELS) for _ in range(2))
        if first != second:
            names[first + second] = None
    return tuple(names)


NAMES = _draw_names(len(SPLITS["individuals"]))


def individual_of(seed: int, share: float) -> int | None:
    """Return the number of the individual that the image of a seed shows; None for all but a `share` of the seeds."""
    rng = random.Random(f"individual {seed}")
    return int(rng.random() * len(NAMES)) if rng.random() < share else None


def individual(number: int) -> Creature:
    """Return the creature with the name `NAMES[number]`."""
    return creature(SPLITS["individuals"][number])
