"""When a curve has become flat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldm.util import UserError


class Plateau:
    """The stopping rule of DVAR (Voronov et al. 2023, arXiv 2302.04841).

    A curve is flat once the variance of its last `window` values is below `threshold` of the variance of all. DVAR
    measures every step, with 310 steps and 0.15 for textual inversion; 31 values of every tenth step are as long.
    """

    def __init__(self, window: int = 31, threshold: float = 0.15) -> None:
        if not isinstance(window, int) or window < 2:
            raise UserError(f"stop: window is {window!r}; give a number of evaluations from 2 on")
        if not 0 < threshold < 1:
            raise UserError(f"stop: threshold is {threshold!r}; give a number between 0 and 1")
        self.window = window
        self.threshold = threshold

    def ratio(self, values: Sequence[float]) -> float:
        """Variance of the window over the variance of all; infinite as long as there are no more values than that."""
        if len(values) <= self.window:
            return float("inf")
        whole = float(np.var(values))
        return float(np.var(values[-self.window :])) / whole if whole > 0 else 0.0

    def reached(self, values: Sequence[float]) -> bool:
        return self.ratio(values) < self.threshold
