from __future__ import annotations

import pytest

from benchmarks.overhead import BARE, PREVIEWS, VARIANTS, overhead_percent
from benchmarks.pairs import Rounds, Spread, ratio


def test_a_ratio_is_taken_within_each_round():
    # The machine was slow in the second round, for both alike.
    assert ratio([3.0, 30.0, 3.0], [1.0, 10.0, 1.0]) == Spread(3.0, 3.0, 3.0, 3)
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])


def test_a_spread_is_median_and_quartiles():
    spread = Spread.of([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (spread.low, spread.median, spread.high, spread.count) == (2.0, 3.0, 4.0, 5)
    assert spread.text(1) == "3.0 (2.0 to 4.0)"
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="nothing was measured"):
        Spread.of([])


def test_the_warm_up_is_forgotten():
    rounds = Rounds(["ours", "theirs"], warm_up=2)
    for seconds in (9.0, 8.0, 2.0, 1.0):
        rounds.add({"ours": seconds, "theirs": 2 * seconds})
    assert rounds.seconds == {"ours": [2.0, 1.0], "theirs": [4.0, 2.0]}
    assert rounds.ratio("theirs", "ours").median == 2.0
    with pytest.raises(ValueError, match="theirs"):
        rounds.add({"ours": 1.0})


def test_an_overhead_is_in_percent_of_the_bare_run():
    rounds = Rounds(list(VARIANTS), warm_up=0)
    rounds.add(dict.fromkeys(VARIANTS, 1.1) | {BARE: 1.0})
    rounds.add(dict.fromkeys(VARIANTS, 12.0) | {BARE: 10.0})
    assert overhead_percent(rounds, PREVIEWS).median == pytest.approx(15.0)
    assert overhead_percent(rounds, BARE).median == 0.0
