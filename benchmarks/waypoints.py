"""Learned vectors of a run at chosen steps, with the training time until then."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from benchmarks.rounds import now
from ldm.files import write_text

LIST = "waypoints.json"
# Dense at first, where the vectors change quickly; later in steps of about 25 percent.
STEPS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 50, 60, 80, 100, 125, 150, 175)
STEPS += (200, 250, 300, 350, 400, 450, 500)
STEPS += (600, 700, 850, 1000, 1250, 1500, 2000, 2500, 3000, 4000, 5000)


class Waypoints(Callback):
    """Save `<step>.pt` at each of `steps` and at the end, and finally the list of them with their seconds.

    The time starts with `fit`, so it includes preparation, but not the saving by this callback. It must be the first
    callback.
    """

    def __init__(self, folder: Path, steps: Sequence[int] = STEPS) -> None:
        super().__init__()
        self.folder = folder
        self.steps = set(steps)
        self.passed: dict[int, float] = {}
        self._started = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = now()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if 0 in self.steps:
            self._save(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step in self.steps:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer, pl_module)
        write_text(self.folder / LIST, json.dumps(self.passed, indent=1))

    def _save(self, trainer: pl.Trainer, model: Any) -> None:
        step, reached = trainer.global_step, now()
        if step not in self.passed:
            self.passed[step] = reached - self._started
            model.embedding_manager.save(self.folder / f"{step}.pt")
            self._started += now() - reached


def read_waypoints(folder: Path) -> dict[int, float] | None:
    """Return the seconds by step of a finished run; None if there is none."""
    path = folder / LIST
    if not path.is_file():
        return None
    return {int(step): seconds for step, seconds in json.loads(path.read_text(encoding="utf-8")).items()}
