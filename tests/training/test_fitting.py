"""Runs that fail: processes, disks and data that are lost."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies.launchers import subprocess_script

import main
from ldm import embeddings, files
from ldm.data import personalized
from ldm.training.fitting import is_out_of_memory, kill_others_on_failure
from ldm.training.run_folder import locked
from ldm.util import UserError
from tests.training.runs import only_run, start, state_of

ROOT = Path(main.__file__).parent


# The thread with which Lightning watches the processes of a run; its module has no public name.
Observer = sys.modules[subprocess_script._launch_process_observer.__module__]._ChildProcessObserver


# Fails in the first process only; the other one waits for it, and handles exceptions slowly.
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
def test_first_process_kills_the_others_and_survives(error, monkeypatch) -> None:
    killed: list[int] = []
    kill = os.kill
    # Really kill the other process, but only record an attempt to kill this one.
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
def test_one_of_two_processes_fails(tiny_yaml) -> None:
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
def test_out_of_memory_messages(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


IMAGES = "lightning.callbacks.image_logger.params"


# Deletes the images after the second step.
THIEF = """
import shutil
import pytorch_lightning as pl

class Thief(pl.Callback):
    def on_train_batch_start(self, trainer, *rest):
        if trainer.global_step == 2:
            shutil.rmtree("data", ignore_errors=True)
"""


@pytest.fixture
def start_run(tiny_yaml: Path, image_folder: Path, tmp_path: Path):
    """Starts a run of 6 steps that saves every second step, with its own copy of the images in `data`."""
    shutil.copytree(image_folder, "data")
    Path("thief.py").write_text(THIEF)

    def start_run(*words: str) -> int:
        defaults = [
            "--base",
            str(tiny_yaml),
            "-t",
            "--data_root",
            "data",
            "lightning.trainer.limit_val_batches=0",
        ]
        return main.main([*defaults, "lightning.modelcheckpoint.params.every_n_train_steps=2", *words])

    return start_run


def error_of(capsys) -> str:
    shown = capsys.readouterr().err
    lines = [line for line in shown.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, shown
    assert lines[0].startswith("error: ")
    return lines[0]


def saved(step: int) -> Path:
    """The run folder, after checking that it holds the state and vectors of a step and no partial file."""
    (run,) = Path("logs").iterdir()
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
    for name in ("embeddings.pt", f"embeddings_gs-{step}.pt", "data.safetensors"):
        (concept,) = embeddings.read(run / "checkpoints" / name).concepts
        assert concept.vectors.isfinite().all()
    assert not list(run.rglob("*.part"))
    return run


def test_full_disk(start_run, capsys, monkeypatch) -> None:
    def fsync(file: int) -> None:
        if list(Path("logs").glob("*/checkpoints/last.ckpt")):  # step 2 is already saved
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", fsync)
        assert start_run() == 1
    line = error_of(capsys)
    assert "cannot write 'logs/" in line and "the disk is full; free some space" in line
    run = saved(2)
    assert main.main(["-r", str(run), "-t"]) == 0
    saved(6)


def test_unwritable_log(start_run, capsys, monkeypatch) -> None:
    save = CSVLogger.save

    def full(self) -> None:
        if list(Path("logs").glob("*/checkpoints/last.ckpt")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.csv")
        save(self)

    monkeypatch.setattr(CSVLogger, "save", full)
    assert start_run("lightning.trainer.log_every_n_steps=3") == 1
    line = error_of(capsys)
    assert (
        "No space left on device 'metrics.csv'; what was learned is in logs/" in line and "-r logs/" in line
    )
    saved(2)  # each row of the log is written at once, and the next one fails


def test_unwritable_run_folder(start_run, capsys) -> None:
    Path("taken").write_text("a file")
    assert start_run("-l", "taken/logs") == 1
    assert "cannot write in 'taken/logs': 'taken' is a file; choose another folder" in error_of(capsys)
    with pytest.raises(UserError, match="cannot write in 'taken/logs/run'"), locked("taken/logs/run"):
        pass


def test_deleted_images_with_cached_latents(start_run, capsys, monkeypatch) -> None:
    uncached = functools.partial(personalized.ImageSet, memory=0)
    monkeypatch.setattr(personalized, "ImageSet", uncached)
    previews = [f"{IMAGES}.batch_frequency=4", f"{IMAGES}.increase_log_steps=false"]
    assert start_run("lightning.callbacks.thief.target=thief.Thief", *previews) == 0
    assert "warning: step 4: no preview: image not found: data" in capsys.readouterr().err
    saved(6)


@pytest.mark.parametrize("workers", [0, 1])
def test_deleted_images_without_cache(start_run, capsys, monkeypatch, workers: int) -> None:
    uncached = functools.partial(personalized.ImageSet, memory=0)
    monkeypatch.setattr(personalized, "ImageSet", uncached)
    words = ["lightning.callbacks.thief.target=thief.Thief", "lightning.callbacks.latent_cache=null"]
    words += [f"data.params.num_workers={workers}", "data.params.train.params.repeats=20"]
    assert start_run(*words, "--max_steps", "100") == 1
    assert "image not found: data" in error_of(capsys)
    (run,) = Path("logs").iterdir()
    saved(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])


def test_out_of_memory_saves_the_state(tiny_yaml, monkeypatch, capsys):
    from ldm.models.diffusion.ddpm import LatentDiffusion

    p_losses = LatentDiffusion.p_losses

    def full(self, *args, **kwargs):
        if self.trainer.global_step == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")
        return p_losses(self, *args, **kwargs)

    monkeypatch.setattr(LatentDiffusion, "p_losses", full)
    assert start("--base", tiny_yaml, "-t") == 1
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(err) == 1 and "out of memory at step 2" in err[0] and "batch_size=1" in err[0]
    assert "configs/recipes/low-memory.yaml" in err[0]
    assert (only_run() / "checkpoints" / "embeddings_gs-2.pt").is_file()
    assert state_of(only_run())["global_step"] == 2
