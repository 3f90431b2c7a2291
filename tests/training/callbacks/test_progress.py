"""The progress line."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from ldm.training.callbacks import progress
from ldm.training.callbacks.progress import RunProgress, duration
from tests.training.runs import fit_line


class TestProgress:
    def test_log_lines_without_a_terminal(self, line, numbers, tmp_path, caplog):
        caplog.set_level(logging.INFO, logger="ldm")
        fit_line(line, numbers, tmp_path, [RunProgress(every_n_steps=2, terminal=False)], steps=5)
        lines = [message for message in caplog.messages if message.startswith("step")]
        assert [text.split(",")[0] for text in lines] == ["step 1/5", "step 2/5", "step 4/5", "step 5/5"]
        assert "loss" in lines[0] and "lr 1.00e-01" in lines[0] and "left" in lines[0]

    def test_one_bar_for_the_whole_run(self, line, numbers, tmp_path, capsys):
        bar = RunProgress(terminal=True)
        fit_line(line, numbers, tmp_path, [bar], steps=7)
        shown = capsys.readouterr().err
        assert "7/7" in shown
        assert "loss" in shown.split("\r")[-1] and "lr" in shown.split("\r")[-1]

    def test_time_left_is_that_of_the_remaining_steps_at_the_pace_since_the_start(self, monkeypatch):
        times = iter([1000.0, 1060.0])
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(times)))
        shown = RunProgress(terminal=False)
        shown.on_train_start(SimpleNamespace(global_step=20), None)  # a resumed run
        assert shown._pace(step=50, total=80) == ["2.0 s/step", "60 s left"]

    @pytest.mark.parametrize(
        ("seconds", "words"), [(8, "8 s"), (300, "5 min"), (3 * 3600 + 300, "3 h 05 min")]
    )
    def test_durations(self, seconds, words):
        assert duration(seconds) == words
