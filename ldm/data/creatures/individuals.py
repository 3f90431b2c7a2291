"""Creatures that have a name of their own, as a few characters have in the captions of larger models.

A word that stands for one individual teaches the text encoder to hold all of a creature in one vector: what words for
its parts can tell, and what they cannot. Such a vector is what inversion looks for.
"""

from __future__ import annotations

import random

from ldm.data.creatures.chance import pick
from ldm.data.creatures.world import SPLITS, Creature, creature

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def _drawn_names(count: int) -> tuple[str, ...]:
    """Different words of two different syllables."""
    rng, names = random.Random("names"), {}
    while len(names) < count:
        first, second = (pick(rng, _CONSONANTS) + pick(rng, _VOWELS) for _ in range(2))
        if first != second:
            names[first + second] = None
    return tuple(names)


NAMES = _drawn_names(len(SPLITS["individuals"]))


def individual_of(seed: int, share: float) -> int | None:
    """Which individual the picture of a seed shows; None where it shows nobody known, as all but `share` do."""
    rng = random.Random(f"individual {seed}")
    return int(rng.random() * len(NAMES)) if rng.random() < share else None


def individual(number: int) -> Creature:
    """The creature whose name is `NAMES[number]`."""
    return creature(SPLITS["individuals"][number])
