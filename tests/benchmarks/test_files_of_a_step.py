"""Which files a training step executes, on a tiny model and on files made for the test."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from benchmarks import files_of_a_step
from benchmarks.files_of_a_step import MOST, Recorder, record, record_step, report
from ldm.util import UserError
from tests.golden_record import Golden

SOURCES = {
    "ldm/start.py": "def start(): pass",
    "ldm/data.py": "def load(): pass",
    "ldm/before.py": "class Before:\n    def hook(self): pass",
    "ldm/model.py": "def step(forward): forward()",
    "ldm/after.py": "def after(): pass",
    "other/elsewhere.py": "def call(): pass",
}


@pytest.fixture
def modules(tmp_path: Path) -> dict:
    """The modules of SOURCES by name, imported from a folder of their own."""
    found = {}
    for name, text in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        found[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[path.stem])
    return found


def test_files_are_those_of_the_last_batch_and_of_the_step(modules, tmp_path, monkeypatch) -> None:
    start, data, before, model = (modules[name] for name in ("start", "data", "before", "model"))

    def load(name: str) -> None:
        (data.load if name == "batch" else start.start)()

    def command() -> None:
        load("first batch of another loader")
        load("batch")
        before.Before().hook()
        model.step(modules["elsewhere"].call)
        modules["after"].after()

    monkeypatch.setattr(files_of_a_step, "LOADING", load.__code__)
    monkeypatch.setattr(files_of_a_step.DDPM, "training_step", model.step)
    recorder = record(command, tmp_path)
    assert recorder.startup == {
        Path("ldm/start.py"): "start",
        Path("ldm/data.py"): "load",
        Path("ldm/before.py"): "hook",
    }
    assert recorder.step == {Path("ldm/data.py"): "load", Path("ldm/model.py"): "step"}
    assert report(recorder).endswith("from main.py to the loss: 4 files")


def test_a_run_without_a_step_is_an_error() -> None:
    with pytest.raises(UserError, match="ended before its first training step"):
        record(lambda: None)


def test_imports_do_not_count(tmp_path) -> None:
    recorder = Recorder(tmp_path, report.__code__, record.__code__)
    for source in ("x = 1", "class A:\n    y = 2"):
        recorder._enter(compile(source, str(tmp_path / "ldm" / "a.py"), "exec"))
    assert recorder.startup == {}


def test_a_step_executes_few_files(subject, tmp_path) -> None:
    Golden("clip_one_vector").write_model(tmp_path)
    subject = dataclasses.replace(subject, overrides=("--actual_resume", str(tmp_path / "model.ckpt")))
    recorder = record_step(subject, tmp_path)
    step = {str(path) for path in recorder.step}
    assert {"ldm/models/diffusion/ddpm.py", "ldm/data/personalized.py"} <= step
    assert "ldm/training/run.py" in {str(path) for path in recorder.startup} - step
    assert len(step) <= MOST
