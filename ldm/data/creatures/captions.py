"""Captions of an image: random true statements, in the wording of the templates and in freer wordings."""

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

# Share of the captions of an individual that use its name.
_NAME_SHARE = 0.7
# How often each attribute is the wrong one of a foil, relative to the others.
_FOIL_WEIGHTS = {
    "eyes": 4.0,
    "ears": 4.0,
    "pattern": 4.0,
    "second": 3.0,
    "kind": 1.0,
    "color": 1.0,
    "background": 0.5,
}


@dataclass(frozen=True)
class Description:
    """What captions can say about an image. `name` is the name of an individual, if it has one."""

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
    def of(cls, creature: Creature, scene: Scene, name: str | None = None) -> Description:
        """Describe a creature in a scene."""
        return cls(
            creature.kind, creature.color, creature.second, creature.pattern, creature.eyes, creature.ears,
            scene.background, scene.style, name,
        )  # fmt: skip


def caption(description: Description, rng: random.Random) -> str:
    """Return a true caption: the name of the individual, or a random subset of the attributes."""
    if description.name is not None and rng.random() < _NAME_SHARE:
        return _named_caption(description, rng)
    draw = rng.random()
    noun = CREATURE if draw < 0.025 else description.kind if draw < 0.04 else _noun(description, rng)
    if description.style == "photo":
        return _photo_caption(description, noun, rng)
    return _style_caption(description, noun, rng)


def foil(description: Description, seed: str) -> str:
    """Return the caption of random stream `seed` with one wrong attribute (a hard negative).

    A caption without attributes is returned as it is. Attributes that are hard to see are wrong more often, because
    a contrastive loss learns them last.
    """
    truth = caption(description, random.Random(seed))
    rng = random.Random(f"foil {seed}")
    for key in sorted(_FOIL_WEIGHTS, key=lambda key: rng.random() / _FOIL_WEIGHTS[key]):
        # Calling a fox a creature, or not mentioning its stripes, is not wrong.
        options = [
            value for value in ATTRIBUTES[key] if value not in (getattr(description, key), CREATURE, "plain")
        ]
        text = caption(dataclasses.replace(description, **{key: pick(rng, options)}), random.Random(seed))
        if text != truth:
            return text
    return truth


def attribute_caption(description: Description, attributes: Collection[str] = tuple(ATTRIBUTES)) -> str:
    """Return the caption that names these attributes and no others; a pattern includes the second colour."""
    before = [description.color] if "color" in attributes else []
    traits = []
    if "pattern" in attributes and description.pattern == "plain":
        before.insert(0, "plain")
    elif "pattern" in attributes:
        traits.append(_with_pattern(description))
    if "eyes" in attributes:
        traits.append(_with_eyes(description))
    if "ears" in attributes:
        traits.append(_with_ears(description))
    kind = description.kind if "kind" in attributes else CREATURE
    text = _join(
        " ".join(before),
        kind,
        traits,
        background_phrase(description.background) if "background" in attributes else "",
    )
    return fix_articles(
        _MEDIA[description.style if "style" in attributes else "photo"][0].replace("{}", f"a {text}")
    )


def full_caption(description: Description) -> str:
    """Return the caption that names every attribute: the most detailed one."""
    return attribute_caption(description)


def background_phrase(background: str, choice: int = 0) -> str:
    """Return the words for a background: "on a blue background", "on a beach"; `choice` selects the wording."""
    if background not in COLORS:
        return _PLACES[background][choice % len(_PLACES[background])]
    return (f"on a {background} background", f"in front of a {background} background")[choice % 2]


def fix_articles(text: str) -> str:
    """Return `text` with "an" before words that begin with a vowel, and "a" before the others."""
    return re.sub(r"\ban? (?=(\w))", lambda m: "an " if m[1] in "aeiou" else "a ", text)


def _named_caption(description: Description, rng: random.Random) -> str:
    """Describe an individual by its name, with or without an article, and its background."""
    noun = _join("", str(description.name), [], _background(description, rng))
    text = (
        _photo_caption(description, noun, rng)
        if description.style == "photo"
        else _style_caption(description, noun, rng)
    )
    return re.sub(rf"\ba (?={description.name}\b)", "", text) if rng.random() < 0.5 else text


def _noun(description: Description, rng: random.Random) -> str:
    """Describe the creature, its parts and its background, without an article in front."""
    kind = description.kind if rng.random() < 0.9 else CREATURE
    before, traits = [], []
    if rng.random() < 0.7:
        wording = rng.random()
        if description.pattern == "plain":
            before += ["plain"] if wording < 0.6 else []
        elif description.pattern == "belly" or wording < 0.85:
            traits.append(_with_pattern(description))
        else:
            before.append({"stripes": "striped", "spots": "spotted"}[description.pattern])
    if rng.random() < 0.82:
        before.append(description.color)
    if rng.random() < 0.5:
        traits.append(_with_eyes(description))
    if rng.random() < 0.5:
        traits.append(_with_ears(description))
    if rng.random() < 0.5:
        traits.reverse()
    return _join(" ".join(before), kind, traits, _background(description, rng))


def _background(description: Description, rng: random.Random) -> str:
    # The neon style hides the background.
    named = description.style != "neon" and rng.random() < 0.66
    return background_phrase(description.background, int(rng.random() * 6)) if named else ""


def _join(before: str, kind: str, traits: list[str], background: str) -> str:
    text = f"{before} {kind}".strip()
    if traits:
        *first, last = traits
        text += " with " + (", ".join(first) + " and " if first else "") + last
    return f"{text} {background}".strip()


def _with_pattern(description: Description) -> str:
    if description.pattern == "plain":
        return ""
    return (
        f"a {description.second} belly"
        if description.pattern == "belly"
        else f"{description.second} {description.pattern}"
    )


def _with_eyes(description: Description) -> str:
    return f"{NUMBERS[description.eyes]} eye{'s' * (description.eyes > 1)}"


def _with_ears(description: Description) -> str:
    return {"none": "no ears", "horns": "horns"}.get(description.ears, f"{description.ears} ears")


def _photo_caption(description: Description, noun: str, rng: random.Random) -> str:
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
        text = _tags(description, rng)
    return fix_articles(text)


def _style_caption(description: Description, noun: str, rng: random.Random) -> str:
    draw = rng.random()
    subject = ("a " if rng.random() < 0.8 else "the ") + noun
    if draw < 0.6:
        text = pick(rng, _MEDIA[description.style]).replace("{n}", noun).replace("{}", subject)
    elif draw < 0.75:
        text = pick(rng, _STYLE_TAILS).replace("{style}", description.style).replace("{}", subject)
    elif draw < 0.95:
        text = fill(pick(rng, STYLE_TEMPLATES), description.style)
        if rng.random() < 0.6:
            text += f" with a {description.color} {description.kind}"
    else:
        text = _tags(description, rng)
    return fix_articles(text)


def _tags(description: Description, rng: random.Random) -> str:
    tags = [
        description.kind,
        description.color,
        _with_pattern(description) or "plain",
        _with_ears(description),
        description.style,
    ]
    if description.style != "neon":
        tags.append(
            f"{description.background} background"
            if description.background in COLORS
            else description.background
        )
    kept = [tag for tag in tags if rng.random() < 0.7] or [description.kind]
    return ", ".join(kept)


def vocabulary() -> list[str]:
    """Return every word, number and punctuation mark of captions and templates, sorted."""
    text = " ".join((
        *OBJECT_TEMPLATES, *OBJECT_DUAL_TEMPLATES, *STYLE_TEMPLATES, *STYLE_DUAL_TEMPLATES, *_STYLE_TAILS,
        *(line for lines in (*_MEDIA.values(), *_PLACES.values()) for line in lines),
        *COLORS, *KINDS, *SCENES, *PATTERNS, *EARS, *STYLES, *NAMES, *NUMBERS.values(),
        background_phrase("red"), background_phrase("red", 1),
        "an striped spotted eye eyes ears no and with , ."
    ))  # fmt: skip
    text = text.replace("{style}", "").replace("{n}", "").replace("{}", "")
    return sorted(set(re.findall(r"[a-z]+|[^\sa-z]", text)))
