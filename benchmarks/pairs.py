"""Timings taken in turns, and what they say: on a machine that others use too, only ratios within a round count."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, with the quartiles around it."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """Raises ValueError where there are no numbers."""
        if not numbers:
            raise ValueError("nothing was measured")
        low, high = numbers[0], numbers[0]
        if len(numbers) > 1:
            low, _, high = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(statistics.median(numbers), low, high, len(numbers))

    def text(self, digits: int = 2) -> str:
        """As a table shows it: the median, and in brackets the quartiles."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The spread of the quotients within each round; raises ValueError where the rounds do not match."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


class Rounds:
    """Seconds by name, one each per round; the first `warm_up` rounds are forgotten."""

    def __init__(self, names: Sequence[str], warm_up: int) -> None:
        self.warm_up = warm_up
        self.done = 0
        self.seconds: dict[str, list[float]] = {name: [] for name in names}

    def add(self, round_: Mapping[str, float]) -> None:
        """Take a round; raises ValueError where it has other names."""
        if round_.keys() != self.seconds.keys():
            raise ValueError(f"a round of {sorted(round_)}, not of {sorted(self.seconds)}")
        self.done += 1
        if self.done > self.warm_up:
            for name, value in round_.items():
                self.seconds[name].append(value)

    def ratio(self, numerator: str, denominator: str) -> Spread:
        return ratio(self.seconds[numerator], self.seconds[denominator])
