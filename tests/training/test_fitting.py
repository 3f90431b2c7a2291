"""A fit that breaks off."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from pytorch_lightning.strategies.launchers import subprocess_script

import main
from ldm.training.fitting import is_out_of_memory, kill_others_on_failure

ROOT = Path(main.__file__).parent
# What Lightning starts beside the processes of a run; it lies in a package of no name in setup.py.
Observer = sys.modules[subprocess_script._launch_process_observer.__module__]._ChildProcessObserver

# Breaks off in the first process alone, while the other goes on to wait for it; takes its time to say so.
BREAKS = """
import time
from pytorch_lightning.callbacks import Callback

class Breaks(Callback):
    def on_train_batch_end(self, trainer, *others):
        if trainer.global_step == 2 and trainer.is_global_zero:
            raise OSError(28, "No space left on device", "e.pt")

    def on_exception(self, trainer, *others):
        if not trainer.is_global_zero:
            time.sleep(600)
"""


def trainer_with(*processes: subprocess.Popen) -> SimpleNamespace:
    return SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=list(processes))))


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"])
def test_the_first_process_takes_the_others_with_it_and_lives_on(error, monkeypatch) -> None:
    killed: list[int] = []
    kill = os.kill
    # The others die for real; of this process the attempt is enough.
    monkeypatch.setattr(os, "kill", lambda pid, n: killed.append(pid) if pid == os.getpid() else kill(pid, n))
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    trainer = trainer_with(other)
    observer = Observer(os.getpid(), trainer.strategy.launcher.procs, 0.05)
    observer.start()
    try:
        with kill_others_on_failure(trainer):
            pass
        assert other.poll() is None
        with pytest.raises(type(error)), kill_others_on_failure(trainer):
            raise error
        assert other.wait(10) != 0
        time.sleep(0.5)
        assert not killed and not observer.is_alive()
    finally:
        other.kill()
        other.wait()


def test_a_single_process_has_no_launcher() -> None:
    with (
        pytest.raises(OSError),
        kill_others_on_failure(SimpleNamespace(strategy=SimpleNamespace(launcher=None))),
    ):
        raise OSError("disk full")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="gloo between processes")
def test_one_of_two_processes_breaks_off(tiny_yaml) -> None:
    Path("breaks.py").write_text(BREAKS)
    words = ["--base", str(tiny_yaml), "-t", "--max_steps", "9", "--accelerator", "cpu", "--devices", "2"]
    words += ["lightning.callbacks.breaks.target=breaks.Breaks", "data.params.train.params.repeats=20"]
    command = [sys.executable, str(ROOT / "main.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert "error: step 2: No space left on device 'e.pt'; what was learned is in" in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
    ],
)
def test_what_devices_say_of_memory(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
