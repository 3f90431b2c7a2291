"""What a run writes about itself, and how another process reads it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldm.training.record import RunRecord, runs_in
from ldm.training.run_folder import holder
from tests.training.runs import only_run, start

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from ldm.training.run_folder import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_records_its_progress_its_log_and_its_verdict(tiny_yaml):
    logging.getLogger("ldm").setLevel(logging.INFO)
    assert start("--base", tiny_yaml, "-t", "--gpus", "0,") == 0
    record = RunRecord.read(only_run())
    assert (record.state, record.step, record.total, record.images) == ("finished", 6, 6, 3)
    assert list(record.words) == ["*"] and record.message.startswith("ended at step 6")
    assert not record.live and record.seconds_left is None
    assert "learning '*'" in record.log() and record.message in record.log()
    assert record.plot().width == 720 and str(record).startswith("finished at step 6 of 6")
    curves = record.curves()
    assert [step for step, _ in curves["fixed loss"]] == [0] and record.concepts().keys() >= {4, 6, "last"}


def test_a_mistake_is_recorded_as_its_line(tiny_yaml):
    words = "lightning.callbacks.deterministic_loss.params.every_n_train_steps=1"
    assert start("--base", tiny_yaml, "-t", "model.base_learning_rate=0", words) == 1
    runs = runs_in("logs")
    # The rate is checked before there is a folder, or by the guard: either way nothing remains that seems to train.
    assert all(run.state == "failed" and "rate" in str(run.message) for run in runs)


def test_nothing_is_written_where_another_process_trains(tiny_yaml):
    assert start("--base", tiny_yaml, "-t") == 0
    run = only_run().absolute()
    before = (run / "status.json").read_text(), (run / "run.log").read_text()
    other = subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        other.stdout.readline()
        assert holder(run) == other.pid and RunRecord.read(run).live
        assert start("-r", run, "-t", "--max_steps", 8) == 1
        assert holder(run) == other.pid
        assert before == ((run / "status.json").read_text(), (run / "run.log").read_text())
    finally:
        other.kill()
        other.communicate()
    assert holder(run) is None and RunRecord.read(run).state == "finished"


def test_a_killed_run_is_lost(tmp_path):
    (tmp_path / "status.json").write_text(
        json.dumps({"state": "training", "step": 5, "total": 9, "rate": 2.0})
    )
    record = RunRecord.read(tmp_path)
    assert (record.state, record.live, record.seconds_left) == ("lost", False, None)
    assert "resume it" in record.message
    own = RunRecord.read(tmp_path, own=True)
    assert own.live and own.seconds_left == 2.0 and own.plot() is None
    assert str(own) == "step 5 of 9, 2.0 steps/s, 2 s left"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"step": "x", "words": 3, "rate": "nan"}', "\x00"])
def test_a_damaged_status_is_no_error(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    record = RunRecord.read(tmp_path)
    assert record.step == 0 and record.rate is None and record.curves() == {} and record.previews() == []


def test_a_folder_of_an_earlier_version_is_read_by_its_files(tmp_path):
    run = tmp_path / "old"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "embeddings_gs-120.pt").touch()
    (run / "images" / "train").mkdir(parents=True)
    for step in (20, 3):
        (run / "images" / "train" / f"samples_scaled_gs-{step:06}_e-000000_b-000000.jpg").touch()
    (tmp_path / "not a run").mkdir()
    (record,) = runs_in(tmp_path)
    assert (record.state, record.step, record.message) == ("unknown", 120, None)
    assert [step for step, _ in record.previews()] == [3, 20]


def test_two_hundred_runs_are_listed_quickly(tmp_path):
    for number in range(200):
        (tmp_path / f"run{number}" / "checkpoints").mkdir(parents=True)
        status = {"state": "finished", "step": number, "started": number + 1, "message": "ended"}
        (tmp_path / f"run{number}" / "status.json").write_text(json.dumps(status))
    begun = time.monotonic()
    runs = runs_in(tmp_path)
    assert len(runs) == 200 and runs[0].step == 199 and time.monotonic() - begun < 2


def test_a_folder_that_does_not_exist_has_no_runs(tmp_path):
    assert runs_in(tmp_path / "nowhere") == []
