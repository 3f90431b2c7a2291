from __future__ import annotations

import math

import pytest

from ldm.training.callbacks.fixed_loss import Plateau
from ldm.util import UserError


def falling(count: int) -> list[float]:
    return [math.exp(-i / 5) for i in range(count)]


def test_a_curve_that_falls_and_lies_flat() -> None:
    rule = Plateau(window=10, threshold=0.15)
    stops = [n for n in range(1, 60) if rule.reached(falling(n))]
    # By hand: var(exp(-i/5), the last 10 of 18) / var(all 18) is the first below 0.15.
    assert stops == list(range(stops[0], 60)) and 15 <= stops[0] <= 20


def test_it_waits_for_more_than_a_window() -> None:
    assert Plateau(window=5).ratio([1.0, 0.5, 0.5, 0.5, 0.5]) == math.inf
    assert Plateau(window=5).reached([9.0, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert Plateau(window=3).ratio([1.0, 2.0, 1.0, 2.0]) == pytest.approx((2 / 9) / 0.25)


def test_a_constant_curve_is_flat() -> None:
    assert Plateau(window=2).reached([1.0, 1.0, 1.0])


@pytest.mark.parametrize(("window", "threshold", "name"), [(1, 0.1, "window"), (5, 0, "threshold")])
def test_settings_that_make_no_sense(window, threshold, name) -> None:
    with pytest.raises(UserError, match=name):
        Plateau(window, threshold)
