"""Steps of several loops taken in turns, and statistics of their times and of paired differences.

Other processes slow the machine down, so only ratios within a round are compared.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of some numbers."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Quartiles:
        """Compute them; raises ValueError if there are no numbers."""
        if not numbers:
            raise ValueError("nothing was measured")
        low, high = numbers[0], numbers[0]
        if len(numbers) > 1:
            low, _, high = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(statistics.median(numbers), low, high, len(numbers))

    def text(self, digits: int = 2) -> str:
        """Format as median, with the quartiles in brackets."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Quartiles:
    """Return the quartiles of the quotients of each round; raises ValueError if the numbers of rounds differ."""
    return Quartiles.of([a / b for a, b in zip(numerator, denominator, strict=True)])


class Rounds:
    """Seconds by name, one value per round; the first `warm_up` rounds are discarded."""

    def __init__(self, names: Sequence[str], warm_up: int) -> None:
        self.warm_up = warm_up
        self.done = 0
        self.seconds: dict[str, list[float]] = {name: [] for name in names}

    def add(self, round_: Mapping[str, float]) -> None:
        """Add a round; raises ValueError if it has other names."""
        if round_.keys() != self.seconds.keys():
            raise ValueError(f"a round of {sorted(round_)}, not of {sorted(self.seconds)}")
        self.done += 1
        if self.done > self.warm_up:
            for name, value in round_.items():
                self.seconds[name].append(value)

    def ratio(self, numerator: str, denominator: str) -> Quartiles:
        return ratio(self.seconds[numerator], self.seconds[denominator])


OURS = "ours"


class Turns(Callback):
    """A callback that runs one step of every other loop after each optimizer step of its own run.

    It must be the last callback. The time of the run's own step is all the time between two calls, without the steps
    of the others: loading the batch, the step, the optimizer, Lightning's loop and all callbacks.
    """

    def __init__(self, others: Mapping[str, Callable[[], object]], warm_up: int) -> None:
        super().__init__()
        self.others = dict(others)
        self.rounds = Rounds([OURS, *others], warm_up)
        self._started = 0.0
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self._started = now()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # gradients are accumulated over several batches
            return
        self._step = trainer.global_step
        round_ = {OURS: now() - self._started}
        for name, step in self.others.items():
            started = now()
            step()
            round_[name] = now() - started
        self.rounds.add(round_)
        self._started = now()


def now() -> float:
    """Return the time in seconds, after all work on the GPU is finished."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


# Above so many creatures, sign flips are drawn rather than all taken.
_MOST_EXACT = 14


def paired(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, standard error, and two-sided p of differences by flipping their signs, all ways if they are few."""
    array = np.array(values)
    if len(array) <= _MOST_EXACT:
        signs = np.array(list(itertools.product((1, -1), repeat=len(array))))
    else:
        signs = np.random.default_rng(0).choice((1, -1), (2**_MOST_EXACT, len(array)))
        signs[0] = 1
    means = np.abs(signs @ array) / len(array)
    share = float((means >= abs(array.mean()) - 1e-12).mean())
    return float(array.mean()), float(array.std(ddof=1) / len(array) ** 0.5), share


def holm(values: Mapping[Any, float]) -> dict[Any, float]:
    """Holm's (1979) corrected p values."""
    corrected: dict[Any, float] = {}
    largest = 0.0
    for place, (key, value) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, value * (len(values) - place)))
        corrected[key] = largest
    return corrected
