"""Disks that fill up and folders that vanish while a run goes on: one line, and what was learned is there."""

from __future__ import annotations

import errno
import functools
import os
import shutil
from pathlib import Path

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger

import main
from ldm import embeddings, files
from ldm.data import personalized

IMAGES = "lightning.callbacks.image_logger.params"
# Does away with the data after the second step.
THIEF = """
import shutil
import pytorch_lightning as pl

class Thief(pl.Callback):
    def on_train_batch_start(self, trainer, *rest):
        if trainer.global_step == 2:
            shutil.rmtree("data", ignore_errors=True)
"""


@pytest.fixture
def start(tiny_yaml: Path, pictures: Path, tmp_path: Path):
    """Starts a run of 6 steps on a data folder of its own that saves every second one."""
    shutil.copytree(pictures, "data")
    Path("thief.py").write_text(THIEF)

    def start(*words: str) -> int:
        usual = [
            "--base",
            str(tiny_yaml),
            "-t",
            "--data_root",
            "data",
            "lightning.trainer.limit_val_batches=0",
        ]
        return main.main([*usual, "lightning.modelcheckpoint.params.every_n_train_steps=2", *words])

    return start


def error_of(capsys) -> str:
    shown = capsys.readouterr().err
    lines = [line for line in shown.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, shown
    assert lines[0].startswith("error: ")
    return lines[0]


def saved(step: int) -> Path:
    """The run folder, with the state and the vectors of a step and nothing half-done."""
    (run,) = Path("logs").iterdir()
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
    for name in ("embeddings.pt", f"embeddings_gs-{step}.pt", "embedding.safetensors"):
        (concept,) = embeddings.read(run / "checkpoints" / name).concepts
        assert concept.vectors.isfinite().all()
    assert not list(run.rglob("*.part"))
    return run


def test_a_disk_that_fills_up(start, capsys, monkeypatch) -> None:
    def fsync(file: int) -> None:
        if list(Path("logs").glob("*/checkpoints/last.ckpt")):  # what step 2 saves is saved
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", fsync)
        assert start() == 1
    line = error_of(capsys)
    assert "cannot write 'logs/" in line and "the disk is full; free some space" in line
    run = saved(2)
    assert main.main(["-r", str(run), "-t"]) == 0
    saved(6)


def test_a_log_that_cannot_be_written(start, capsys, monkeypatch) -> None:
    save = CSVLogger.save

    def full(self) -> None:
        if list(Path("logs").glob("*/checkpoints/last.ckpt")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.csv")
        save(self)

    monkeypatch.setattr(CSVLogger, "save", full)
    assert start("lightning.trainer.log_every_n_steps=3") == 1
    line = error_of(capsys)
    assert (
        "No space left on device 'metrics.csv'; what was learned is in logs/" in line and "-r logs/" in line
    )
    saved(3)


def test_a_folder_that_cannot_be_made(start, capsys) -> None:
    Path("taken").write_text("a file")
    assert start("-l", "taken/logs") == 1
    assert "cannot write in 'taken/logs/" in error_of(capsys)


def test_data_that_vanish_are_not_missed_where_latents_are_cached(start, capsys, monkeypatch) -> None:
    few = functools.partial(personalized.ImageSet, memory=0)
    monkeypatch.setattr(personalized, "ImageSet", few)
    previews = [f"{IMAGES}.batch_frequency=4", f"{IMAGES}.increase_log_steps=false"]
    assert start("lightning.callbacks.thief.target=thief.Thief", *previews) == 0
    assert "warning: step 4: no preview: image not found: data" in capsys.readouterr().err
    saved(6)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_vanish_while_every_step_reads_them(start, capsys, monkeypatch, workers: int) -> None:
    few = functools.partial(personalized.ImageSet, memory=0)
    monkeypatch.setattr(personalized, "ImageSet", few)
    words = ["lightning.callbacks.thief.target=thief.Thief", "lightning.callbacks.latent_cache=null"]
    words += [f"data.params.num_workers={workers}", "data.params.train.params.repeats=20"]
    assert start(*words, "--max_steps", "100") == 1
    assert "image not found: data" in error_of(capsys)
    (run,) = Path("logs").iterdir()
    saved(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])
