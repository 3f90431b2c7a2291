"""Learning-rate schedules: factors of the base rate for `torch.optim.lr_scheduler.LambdaLR`.

YAMLs name these classes and their parameters in `scheduler_config`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import ClassVar

from ldm.util import ConfigError

logger = logging.getLogger(__name__)


class LambdaWarmUpCosineScheduler2:
    """Cycles of a linear warm-up from `f_start` to `f_max` and a half cosine down to `f_min`.

    Each parameter is a list with one entry per cycle. `cycle_lengths` are in steps and include `warm_up_steps`;
    f_* are factors of the base learning rate. The factor stays at its last value after the last cycle. The factor
    is logged every `verbosity_interval` steps of a cycle (0: never).
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ) -> None:
        lengths = {len(p) for p in (warm_up_steps, f_min, f_max, f_start, cycle_lengths)}
        if lengths != {len(cycle_lengths)} or not cycle_lengths:
            raise ConfigError(
                f"{type(self).__name__}: warm_up_steps, f_min, f_max, f_start and cycle_lengths need one entry per "
                f"cycle each, got {sorted(lengths)}"
            )
        if min(cycle_lengths) < 1:
            raise ConfigError(
                f"{type(self).__name__}: a cycle has {min(cycle_lengths)} steps; give at least 1, or "
                "scheduler_config=null for a run without a limit"
            )
        self.warm_up_steps = list(warm_up_steps)
        self.f_min, self.f_max, self.f_start = list(f_min), list(f_max), list(f_start)
        self.cycle_lengths = list(cycle_lengths)
        self.cycle_ends = list(accumulate(cycle_lengths))
        self.verbosity_interval = verbosity_interval

    def schedule(self, n: int) -> float:
        """The factor at step n."""
        last = len(self.cycle_ends) - 1
        cycle = next((c for c, end in enumerate(self.cycle_ends) if n <= end), last)
        step = min(n - self.cycle_ends[cycle] + self.cycle_lengths[cycle], self.cycle_lengths[cycle])
        warm_up = self.warm_up_steps[cycle]
        if step < warm_up:
            factor = self.f_start[cycle] + (self.f_max[cycle] - self.f_start[cycle]) * step / warm_up
        else:
            remaining = self.remaining(step, warm_up, self.cycle_lengths[cycle])
            factor = self.f_min[cycle] + (self.f_max[cycle] - self.f_min[cycle]) * remaining
        if self.verbosity_interval > 0 and step % self.verbosity_interval == 0:
            logger.info("step %d: learning-rate factor %.3g, cycle %d", n, factor, cycle)
        return factor

    def __call__(self, n: int) -> float:
        return self.schedule(n)

    @staticmethod
    def remaining(step: int, warm_up: int, length: int) -> float:
        """The position between f_max (1) and f_min (0) at a step of a cycle."""
        done = (step - warm_up) / (length - warm_up) if length > warm_up else 1.0
        return 0.5 * (1 + math.cos(math.pi * done))


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """The same cycles with a linear decay, which is measured from the start of the cycle as in the original."""

    @staticmethod
    def remaining(step: int, warm_up: int, length: int) -> float:
        return (length - step) / length


class LambdaWarmUpCosineScheduler(LambdaWarmUpCosineScheduler2):
    """One cycle: warm-up from `lr_start` to `lr_max`, then a cosine to `lr_min` at step `max_decay_steps`.

    The values multiply the base learning rate (the original's YAMLs with this class set it to 1). In the YAML of a
    run, `max_decay_steps: null` means the number of steps of the run.
    """

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int | None,
        verbosity_interval: int = 0,
    ) -> None:
        if max_decay_steps is None:
            raise ConfigError(
                f"{type(self).__name__}: max_decay_steps is null outside the YAML of a run; give steps"
            )
        super().__init__(
            [warm_up_steps], [lr_min], [lr_max], [lr_start], [max_decay_steps], verbosity_interval
        )


class LambdaNamedScheduler:
    """A schedule of diffusers' `get_scheduler` by its name (diffusers/optimization.py), after a linear warm-up from 0.

    "constant_with_warmup" stays at 1. "linear" and "polynomial" fall to 0, the latter with the exponent `power`
    (diffusers ends it at a rate of 1e-7). "cosine" falls along half a cosine, "cosine_with_restarts" along `num_cycles`
    of them. All end at step `max_decay_steps`, where null in the YAML of a run means the number of its steps.

    Raises:
        ConfigError: the name is unknown, or the schedule needs the number of steps.
    """

    def __init__(
        self,
        name: str,
        warm_up_steps: int = 0,
        max_decay_steps: int | None = None,
        num_cycles: int = 1,
        power: float = 1.0,
    ) -> None:
        if name not in self.CURVES:
            known = ", ".join(self.CURVES)
            raise ConfigError(f"{type(self).__name__}: there is no schedule '{name}' (known are {known})")
        if name != "constant_with_warmup" and (max_decay_steps is None or max_decay_steps < 1):
            raise ConfigError(f"{type(self).__name__}: '{name}' needs max_decay_steps, the steps of the run")
        self.name, self.warm_up_steps, self.max_decay_steps = name, warm_up_steps, max_decay_steps or 0
        self.num_cycles, self.power = num_cycles, power

    # The factor after the warm-up, by the share of the steps that are done, from 0 to 1.
    CURVES: ClassVar[dict[str, Callable[[LambdaNamedScheduler, float], float]]] = {
        "constant_with_warmup": lambda self, done: 1.0,
        "linear": lambda self, done: 1 - done,
        "cosine": lambda self, done: 0.5 * (1 + math.cos(math.pi * done)),
        "cosine_with_restarts": lambda self, done: (
            0.5 * (1 + math.cos(math.pi * (self.num_cycles * done % 1.0))) if done < 1 else 0.0
        ),
        "polynomial": lambda self, done: (1 - done) ** self.power,
    }

    def schedule(self, n: int) -> float:
        """The factor at step n."""
        if n < self.warm_up_steps:
            return n / self.warm_up_steps
        done = (n - self.warm_up_steps) / max(1, self.max_decay_steps - self.warm_up_steps)
        return self.CURVES[self.name](self, min(1.0, done))

    def __call__(self, n: int) -> float:
        return self.schedule(n)


class LambdaStepScheduler:
    """Piecewise constant rates in the syntax of AUTOMATIC1111's web UI: "0.005:100, 1e-3:1000, 1e-4".

    Each rate is used up to the optimizer step after its colon, the last one to the end of the run. Factors are
    relative to the `first` rate, which is the base learning rate.

    Raises:
        ConfigError: the text does not have this form, or the steps do not increase.
    """

    def __init__(self, rates: str | float) -> None:
        self.rates: list[float] = []
        self.until: list[int] = []
        for part in str(rates).strip().rstrip(",").split(","):
            rate, colon, until = (piece.strip() for piece in part.partition(":"))
            try:
                self.rates.append(float(rate))
                self.until.append(int(until) if colon else -1)
            except ValueError as error:
                raise ConfigError(
                    f"learning rate '{rates}': '{part.strip()}' is not RATE:STEPS; write 0.005:100, 1e-3:1000"
                ) from error
        ends = self.until if colon else self.until[:-1]
        if any(end < 1 for end in ends) or sorted(set(ends)) != ends:
            raise ConfigError(f"learning rate '{rates}': the steps must increase, as in 0.005:100, 1e-3:1000")
        if not all(0 <= rate < math.inf for rate in self.rates) or self.rates[0] == 0:
            raise ConfigError(f"learning rate '{rates}': rates must be above 0")

    @property
    def first(self) -> float:
        return self.rates[0]

    def schedule(self, n: int) -> float:
        """The factor at step n."""
        index = next((i for i, end in enumerate(self.until[:-1]) if n < end), len(self.rates) - 1)
        return self.rates[index] / self.first

    def __call__(self, n: int) -> float:
        return self.schedule(n)
