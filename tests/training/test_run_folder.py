"""The run folder: its name, resuming, and its lock."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import main
from ldm.training import run_folder
from ldm.training.run_folder import locked
from ldm.util import UserError


def test_name_as_in_the_original(tmp_path):
    run = run_folder.new_run_folder(tmp_path, name="txt2img", data_root="data/cat/", postfix="_x")
    assert re.fullmatch(r"cat\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_txt2img_x", run.path.name)
    assert run.last == run.path / "checkpoints" / "last.ckpt"
    assert run.embeddings == run.path / "checkpoints" / "embeddings.pt"
    assert not run.path.exists()


def test_name_with_several_data_roots_and_none(tmp_path):
    assert run_folder.new_run_folder(
        tmp_path, name="", data_root={"*": "a/cat", "@": "a/dog"}
    ).path.name.startswith("cat+dog2")
    assert run_folder.new_run_folder(tmp_path, name="n").path.name.startswith("2")


def test_two_runs_in_one_second(tmp_path, monkeypatch):
    noon = datetime.datetime(2024, 1, 2, 12)
    monkeypatch.setattr(run_folder, "datetime", type("Still", (), {"now": lambda: noon}))
    first = run_folder.new_run_folder(tmp_path, name="a")
    first.path.mkdir()
    assert run_folder.new_run_folder(tmp_path, name="a").path.name == first.path.name + "-2"


def test_processes_of_one_run_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("LDM_RUN_DIR", raising=False)
    monkeypatch.setenv("LDM_RUN_DIR", "")
    first = run_folder.new_run_folder(tmp_path, name="a", several=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_folder.new_run_folder(tmp_path, name="other", several=True).path == first.path


def make_run(folder):
    (folder / "configs").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "configs" / "t-project.yaml").write_text("model: {}")
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"x")
    return folder


def test_resume_by_folder_file_and_latest(tmp_path):
    folder = make_run(tmp_path / "one")
    for place in (folder, folder / "checkpoints" / "last.ckpt", "latest"):
        run, state = run_folder.existing_run_folder(place, logdir=tmp_path)
        assert run.path.resolve() == folder.resolve()
        assert state.name == "last.ckpt"


@pytest.mark.parametrize("newer", ["a", "b", "c"])
def test_latest_is_the_run_that_was_saved_last(tmp_path, newer):
    for name in ("b", "a", "c"):
        state = make_run(tmp_path / name) / "checkpoints" / "last.ckpt"
        os.utime(state, (2000, 2000) if name == newer else (1000, 1000))
    run, _ = run_folder.existing_run_folder("latest", logdir=tmp_path)
    assert run.path.name == newer


def test_two_starts_in_one_folder_in_one_second(tmp_path, monkeypatch):
    noon = datetime.datetime(2024, 1, 2, 12)
    monkeypatch.setattr(run_folder, "datetime", type("Still", (), {"now": lambda: noon}))
    folder = make_run(tmp_path / "one")
    starts = []
    for number in range(3):
        run, _ = run_folder.existing_run_folder(folder)
        starts.append(run.now)
        (folder / "configs" / f"{run.now}-project.yaml").write_text(f"start: {number}")
        if number == 1:  # a start that failed before it wrote its YAML
            (folder / "configs" / f"{run.now}-project.yaml").unlink()
            (folder / "csv" / run.now).mkdir(parents=True)
    assert starts == ["2024-01-02T12-00-00", "2024-01-02T12-00-00.2", "2024-01-02T12-00-00.3"]
    assert [path.read_text()[-1] for path in run.saved_configs()] == ["0", "2", "}"]


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        run_folder.existing_run_folder(tmp_path / "no")
    with pytest.raises(UserError, match="no run in .* has a last.ckpt"):
        run_folder.existing_run_folder("latest", logdir=tmp_path)
    folder = make_run(tmp_path / "one")
    (folder / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(UserError, match="ended before its first save"):
        run_folder.existing_run_folder(folder)
    (folder / "configs" / "t-project.yaml").unlink()
    with pytest.raises(UserError, match="no YAML"):
        run_folder.existing_run_folder(folder)


HOLD = """
import sys
from ldm.training.run_folder import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Starts a process that holds the lock of a folder."""
    started = []

    def start(folder):
        command = [sys.executable, "-c", HOLD, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        root = Path(main.__file__).parent
        process = subprocess.Popen(command, cwd=root, text=True, **pipes)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_lock_is_held_until_its_process_ends(tmp_path, hold):
    other = hold(tmp_path)
    with pytest.raises(UserError, match=rf"another process \(process {other.pid}\)"), locked(tmp_path):
        pytest.fail("held by two")
    other.kill()
    other.wait()
    with locked(tmp_path):
        pass


def test_further_processes_of_a_run_do_not_lock(tmp_path, hold):
    hold(tmp_path)
    with locked(tmp_path, hold=False):
        pass


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in"), locked(tmp_path / "file" / "run"):
        pass


def test_second_run_in_a_folder_is_an_error(tiny_yaml, capsys, hold):
    assert main.main(["--base", str(tiny_yaml), "-t", "--max_steps", "1"]) == 0
    (run,) = Path("logs").iterdir()
    hold(run.absolute())
    state = (run / "checkpoints" / "last.ckpt").read_bytes()
    capsys.readouterr()
    assert main.main(["-r", str(run), "-t", "--max_steps", "2"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("error: another process")
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == state
