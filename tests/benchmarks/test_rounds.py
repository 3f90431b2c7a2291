from __future__ import annotations

import pytest
from pytorch_lightning.callbacks import Callback

from benchmarks import overhead
from benchmarks.overhead import PARTS, PREVIEWS, REST, overhead_percent
from benchmarks.rounds import Quartiles, Rounds, ratio


def test_ratios_are_computed_within_each_round():
    # The machine was slow in the second round, for both alike.
    assert ratio([3.0, 30.0, 3.0], [1.0, 10.0, 1.0]) == Quartiles(3.0, 3.0, 3.0, 3)
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])


def test_quartiles_of_numbers():
    spread = Quartiles.of([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (spread.low, spread.median, spread.high, spread.count) == (2.0, 3.0, 4.0, 5)
    assert spread.text(1) == "3.0 (2.0 to 4.0)"
    assert Quartiles.of([7.0]) == Quartiles(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="nothing was measured"):
        Quartiles.of([])


def test_warm_up_rounds_are_discarded():
    rounds = Rounds(["ours", "theirs"], warm_up=2)
    for seconds in (9.0, 8.0, 2.0, 1.0):
        rounds.add({"ours": seconds, "theirs": 2 * seconds})
    assert rounds.seconds == {"ours": [2.0, 1.0], "theirs": [4.0, 2.0]}
    assert rounds.ratio("theirs", "ours").median == 2.0
    with pytest.raises(ValueError, match="theirs"):
        rounds.add({"ours": 1.0})


def test_an_overhead_is_in_percent_of_everything_else():
    rounds = Rounds([*PARTS, REST], warm_up=0)
    rounds.add(dict.fromkeys(PARTS, 0.1) | {REST: 1.0})
    rounds.add(dict.fromkeys(PARTS, 2.0) | {REST: 10.0})
    assert overhead_percent(rounds, PREVIEWS).median == pytest.approx(15.0)


def test_calls_are_timed_and_a_call_within_another_one_is_not_counted_twice(monkeypatch):
    class Slow(Callback):
        def on_train_start(self, trainer, pl_module):
            logger.log_metrics({})

        def helper(self):
            raise AssertionError

    class Logger:
        def log_metrics(self, metrics):
            logged.append(metrics)

    logged: list[object] = []
    times = iter([5.0, 7.5, 10.0, 10.5])
    monkeypatch.setattr(overhead, "now", lambda: next(times))
    spent = {"callback": 0.0, "logger": 0.0}
    callback, logger, clock = Slow(), Logger(), overhead.Clock(spent)
    assert overhead.hooks_of(callback) == ["on_train_start"]
    clock.watch(callback, overhead.hooks_of(callback), "callback")
    clock.watch(logger, ["log_metrics"], "logger")
    callback.on_train_start(None, None)
    callback.on_train_end(None, None)
    assert spent == {"callback": 2.5, "logger": 0.0}
    logger.log_metrics({})
    assert spent == {"callback": 2.5, "logger": 0.5} and len(logged) == 2
