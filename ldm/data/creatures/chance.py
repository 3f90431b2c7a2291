"""Draws from a random stream by `random()` alone, whose sequence Python promises not to change."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """One of `options`."""
    return options[int(rng.random() * len(options))]


def spread(rng: random.Random, low: float, high: float) -> float:
    """A number between `low` and `high`."""
    return low + (high - low) * rng.random()
