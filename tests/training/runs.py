"""Runs of a tiny model through `main`, and fits of the `Line` of conftest.py."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint, ProgressBar
from torch.utils.data import DataLoader, Dataset

import main
from ldm.training.callbacks.checkpoint import StateFile


def start(*words: object) -> int:
    """The exit code of a command line."""
    return main.main([str(word) for word in words])


def only_run(folder: str | Path = "logs") -> Path:
    """The only run folder in a folder."""
    (path,) = Path(folder).iterdir()
    return path


def state_of(folder: str | Path = "logs") -> dict[str, Any]:
    """The state of a run folder, or of the only run folder in a folder."""
    run = Path(folder)
    run = run if (run / "checkpoints").is_dir() else only_run(run)
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def killed_at(run: Path, step: int) -> Path:
    """A copy of a run that was killed after a step, of which `copy_states` copied the state."""
    killed = run.with_name(f"killed-{step}")
    for part in ("configs", "checkpoints"):
        (killed / part).mkdir(parents=True)
    for saved in (run / "configs").iterdir():
        (killed / "configs" / saved.name).write_bytes(saved.read_bytes())
    state = (run / "checkpoints" / f"step{step}.ckpt").read_bytes()
    (killed / "checkpoints" / "last.ckpt").write_bytes(state)
    return killed


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def fit_line(
    model: pl.LightningModule,
    numbers: type[Dataset[Any]],
    folder: Path,
    callbacks: list[Callback],
    steps: int = 4,
    validate: bool = False,
    ckpt: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    """Fit a model to six numbers, in batches of two."""
    defaults: dict[str, Any] = {"logger": False, "limit_val_batches": 1.0 if validate else 0}
    trainer = pl.Trainer(
        default_root_dir=folder,
        callbacks=callbacks,
        max_steps=steps,
        accelerator="cpu",
        plugins=[StateFile()],
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **defaults | options,
    )

    def loader() -> DataLoader[Any]:
        return DataLoader(numbers(), batch_size=2, generator=torch.Generator())

    with warnings.catch_warnings():
        # Runs ignore the first two as well. The third is about resuming in the middle of an epoch, as intended here.
        warnings.filterwarnings("ignore", message=".*module.s. in eval mode at the start of training")
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
        warnings.filterwarnings(
            "ignore", message="You're resuming from a checkpoint that ended before the epoch"
        )
        trainer.fit(model, loader(), loader(), ckpt_path=ckpt)
    return trainer
