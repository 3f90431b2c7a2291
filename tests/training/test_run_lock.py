from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import main
from ldm.training.run_folder import locked
from ldm.util import UserError

HOLD = """
import sys
from ldm.training.run_folder import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Starts a process that holds a folder."""
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


def test_a_folder_is_for_one_process_until_it_is_gone(tmp_path, hold):
    other = hold(tmp_path)
    with pytest.raises(UserError, match=rf"another process \(process {other.pid}\)"), locked(tmp_path):
        pytest.fail("held by two")
    other.kill()
    other.wait()
    with locked(tmp_path):
        pass


def test_further_processes_of_a_run_do_not_ask(tmp_path, hold):
    hold(tmp_path)
    with locked(tmp_path, hold=False):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in"), locked(tmp_path / "file" / "run"):
        pass


def test_a_second_run_in_a_folder_is_one_line(tiny_yaml, capsys, hold):
    assert main.main(["--base", str(tiny_yaml), "-t", "--max_steps", "1"]) == 0
    (run,) = Path("logs").iterdir()
    hold(run.absolute())
    state = (run / "checkpoints" / "last.ckpt").read_bytes()
    capsys.readouterr()
    assert main.main(["-r", str(run), "-t", "--max_steps", "2"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("error: another process")
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == state
