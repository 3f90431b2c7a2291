"""Which creature of a hundred do pictures show?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldm.data.creatures.world import Creature
from ldm.evaluation.drawings import others, redrawn
from ldm.evaluation.identity import Readings, Subject, likeness
from ldm.evaluation.looks import Looks

AMONG, _PICTURES = 100, 4


@dataclass(frozen=True)
class Gallery:
    """Other creatures beside which the true one has to be found, each seen on a few drawings."""

    creatures: Sequence[Creature]
    looks: Sequence[Looks]

    @classmethod
    def drawn(cls, size: int, count: int) -> Gallery:
        """`count` creatures, one of which gives its place to the true one."""
        creatures = others(count)
        pictures = redrawn([one for one in creatures for _ in range(_PICTURES)], size, take=3)
        looks = Looks.of(pictures)
        return cls(creatures, [looks[k * _PICTURES : (k + 1) * _PICTURES] for k in range(len(creatures))])

    def ranks(self, looks: Looks, readings: Readings | None, subject: Subject) -> np.ndarray:
        """The true creature's place by raw likeness, [N], for each picture: 1 is the first of all.

        Each creature is compared by as many drawings in free scenes, and by the attributes it really has.
        """
        true = likeness(looks, readings, subject.truth[:_PICTURES], subject.creature)
        rivals = [
            likeness(looks, readings, seen, one)
            for one, seen in zip(self.creatures, self.looks, strict=True)
            if one.seed != subject.creature.seed
        ]
        return 1 + (np.stack(rivals[: len(self.creatures) - 1]) >= true).sum(0)
