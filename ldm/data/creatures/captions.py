"""Sentences about a picture: a random part of the truth, in the templates' wording and in freer ones."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Collection
from dataclasses import dataclass

from ldm.data.creatures.builds import pick
from ldm.data.creatures.world import (
    ATTRIBUTES,
    COLORS,
    CREATURE,
    EARS,
    KINDS,
    NAMES,
    PATTERNS,
    SCENES,
    STYLES,
    Creature,
    Scene,
)
from ldm.prompts import OBJECT_DUAL_TEMPLATES, OBJECT_TEMPLATES, STYLE_DUAL_TEMPLATES, STYLE_TEMPLATES, fill

NUMBERS = {1: "one", 2: "two", 3: "three"}
_MEDIA = {
    "photo": ("a photo of {}",),
    "sketch": ("a sketch of {}", "a pencil sketch of {}", "{}, sketch", "{} as a sketch", "a drawing of {}"),
    "neon": ("a neon picture of {}", "a neon sign of {}", "{}, neon", "{} made of neon light", "a neon {n}"),
    "mosaic": ("a mosaic of {}", "a tile mosaic of {}", "{}, mosaic", "{} as a mosaic", "a mosaic {n}"),
    "painting": (
        "a painting of {}",
        "an oil painting of {}",
        "{}, painting",
        "{} as a painting",
        "a painted {n}",
    ),
}
_STYLE_TAILS = ("{} in the style of {style}", "a photo of {} in the style of {style}", "{}, {style} style")
_PLACES = {
    "beach": ("on a beach", "at the beach", "on the beach"),
    "forest": ("in a forest", "in the forest"),
    "night": ("at night", "under the night sky", "in the night"),
    "snow": ("in the snow", "in snow"),
}

_BY_NAME = 0.7  # of the captions of one who has a name

_FOILED = {
    "eyes": 4.0,
    "ears": 4.0,
    "pattern": 4.0,
    "second": 3.0,
    "kind": 1.0,
    "color": 1.0,
    "background": 0.5,
}


@dataclass(frozen=True)
class Names:
    """The part of a picture that words can tell; `name` is that of an individual."""

    kind: str
    color: str
    second: str
    pattern: str
    eyes: int
    ears: str
    background: str
    style: str
    name: str | None = None

    @classmethod
    def of(cls, creature: Creature, scene: Scene, name: str | None = None) -> Names:
        """The names of a creature in a scene."""
        return cls(
            creature.kind, creature.color, creature.second, creature.pattern, creature.eyes, creature.ears,
            scene.background, scene.style, name,
        )  # fmt: skip


def caption(names: Names, rng: random.Random) -> str:
    """One sentence that is true of the picture: who it shows, or a random subset of its attributes."""
    if names.name is not None and rng.random() < _BY_NAME:
        return _by_name(names, rng)
    draw = rng.random()
    noun = CREATURE if draw < 0.025 else names.kind if draw < 0.04 else _noun(names, rng)
    if names.style == "photo":
        return _of_photo(names, noun, rng)
    return _of_style(names, noun, rng)


def foil(names: Names, seed: str) -> str:
    """The caption of the stream `seed` with one attribute told wrongly, or the caption itself where nothing can be.

    What is hard to see is made wrong more often: a contrastive loss over whole pictures learns it last.
    """
    truth = caption(names, random.Random(seed))
    rng = random.Random(f"foil {seed}")
    for key in sorted(_FOILED, key=lambda key: rng.random() / _FOILED[key]):
        # To call a fox a creature, or not to mention its stripes, is not wrong.
        options = [
            value for value in ATTRIBUTES[key] if value not in (getattr(names, key), CREATURE, "plain")
        ]
        text = caption(dataclasses.replace(names, **{key: pick(rng, options)}), random.Random(seed))
        if text != truth:
            return text
    return truth


def naming(names: Names, told: Collection[str] = tuple(ATTRIBUTES)) -> str:
    """The sentence that names these attributes and no others; a pattern brings its second colour along."""
    before = [names.color] if "color" in told else []
    traits = []
    if "pattern" in told and names.pattern == "plain":
        before.insert(0, "plain")
    elif "pattern" in told:
        traits.append(_with_pattern(names))
    if "eyes" in told:
        traits.append(_with_eyes(names))
    if "ears" in told:
        traits.append(_with_ears(names))
    kind = names.kind if "kind" in told else CREATURE
    text = _told(" ".join(before), kind, traits, place(names.background) if "background" in told else "")
    return articled(_MEDIA[names.style if "style" in told else "photo"][0].replace("{}", f"a {text}"))


def full_caption(names: Names) -> str:
    """The sentence that names every attribute: the best that words can do."""
    return naming(names)


def place(background: str, choice: int = 0) -> str:
    """The words for a background: "on a blue background", "on a beach"."""
    if background not in COLORS:
        return _PLACES[background][choice % len(_PLACES[background])]
    return (f"on a {background} background", f"in front of a {background} background")[choice % 2]


def articled(text: str) -> str:
    """`text` with "an" before the words that want it, and "a" before the others."""
    return re.sub(r"\ban? (?=(\w))", lambda m: "an " if m[1] in "aeiou" else "a ", text)


def _by_name(names: Names, rng: random.Random) -> str:
    """An individual by its name alone, with or without an article, and where it is."""
    noun = _told("", str(names.name), [], _where(names, rng))
    text = _of_photo(names, noun, rng) if names.style == "photo" else _of_style(names, noun, rng)
    return re.sub(rf"\ba (?={names.name}\b)", "", text) if rng.random() < 0.5 else text


def _noun(names: Names, rng: random.Random) -> str:
    """The creature, what it has and where it is, without an article in front."""
    kind = names.kind if rng.random() < 0.9 else CREATURE
    before, traits = [], []
    if rng.random() < 0.7:
        spoken = rng.random()
        if names.pattern == "plain":
            before += ["plain"] if spoken < 0.6 else []
        elif names.pattern == "belly" or spoken < 0.85:
            traits.append(_with_pattern(names))
        else:
            before.append({"stripes": "striped", "spots": "spotted"}[names.pattern])
    if rng.random() < 0.82:
        before.append(names.color)
    if rng.random() < 0.5:
        traits.append(_with_eyes(names))
    if rng.random() < 0.5:
        traits.append(_with_ears(names))
    if rng.random() < 0.5:
        traits.reverse()
    return _told(" ".join(before), kind, traits, _where(names, rng))


def _where(names: Names, rng: random.Random) -> str:
    # Neon is dark whatever stands behind the creature.
    told = names.style != "neon" and rng.random() < 0.66
    return place(names.background, int(rng.random() * 6)) if told else ""


def _told(before: str, kind: str, traits: list[str], where: str) -> str:
    text = f"{before} {kind}".strip()
    if traits:
        *first, last = traits
        text += " with " + (", ".join(first) + " and " if first else "") + last
    return f"{text} {where}".strip()


def _with_pattern(names: Names) -> str:
    if names.pattern == "plain":
        return ""
    return f"a {names.second} belly" if names.pattern == "belly" else f"{names.second} {names.pattern}"


def _with_eyes(names: Names) -> str:
    return f"{NUMBERS[names.eyes]} eye{'s' * (names.eyes > 1)}"


def _with_ears(names: Names) -> str:
    return {"none": "no ears", "horns": "horns"}.get(names.ears, f"{names.ears} ears")


def _of_photo(names: Names, noun: str, rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.5:
        text = fill("a photo of a {}", noun)
    elif draw < 0.82:
        text = fill(pick(rng, OBJECT_TEMPLATES), noun)
    elif draw < 0.9:
        text = f"a {noun}"
    elif draw < 0.95:
        text = noun
    else:
        text = _tags(names, rng)
    return articled(text)


def _of_style(names: Names, noun: str, rng: random.Random) -> str:
    draw = rng.random()
    subject = ("a " if rng.random() < 0.8 else "the ") + noun
    if draw < 0.6:
        text = pick(rng, _MEDIA[names.style]).replace("{n}", noun).replace("{}", subject)
    elif draw < 0.75:
        text = pick(rng, _STYLE_TAILS).replace("{style}", names.style).replace("{}", subject)
    elif draw < 0.95:
        text = fill(pick(rng, STYLE_TEMPLATES), names.style)
        if rng.random() < 0.6:
            text += f" with a {names.color} {names.kind}"
    else:
        text = _tags(names, rng)
    return articled(text)


def _tags(names: Names, rng: random.Random) -> str:
    tags = [names.kind, names.color, _with_pattern(names) or "plain", _with_ears(names), names.style]
    if names.style != "neon":
        tags.append(f"{names.background} background" if names.background in COLORS else names.background)
    kept = [tag for tag in tags if rng.random() < 0.7] or [names.kind]
    return ", ".join(kept)


def words() -> list[str]:
    """Every word, number and mark that a caption or a template can hold, sorted."""
    told = " ".join((
        *OBJECT_TEMPLATES, *OBJECT_DUAL_TEMPLATES, *STYLE_TEMPLATES, *STYLE_DUAL_TEMPLATES, *_STYLE_TAILS,
        *(line for lines in (*_MEDIA.values(), *_PLACES.values()) for line in lines),
        *COLORS, *KINDS, *SCENES, *PATTERNS, *EARS, *STYLES, *NAMES, *NUMBERS.values(), place("red"), place("red", 1),
        "an striped spotted eye eyes ears no and with , ."
    ))  # fmt: skip
    told = told.replace("{style}", "").replace("{n}", "").replace("{}", "")
    return sorted(set(re.findall(r"[a-z]+|[^\sa-z]", told)))
