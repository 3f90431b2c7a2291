"""Steps of a run and steps of others, taken in turns in one process and one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from benchmarks.pairs import Rounds

OURS = "ours"


class Turns(Callback):
    """Takes a step of every other loop after each optimizer step of the run it is a callback of.

    It must be the last callback. What counts as the run's step is everything from the moment the others are done to
    the next time this callback is called after a step: loading the batch, the step, the optimizer, Lightning's loop
    and all callbacks.
    """

    def __init__(self, others: Mapping[str, Callable[[], object]], warm_up: int) -> None:
        super().__init__()
        self.others = dict(others)
        self.rounds = Rounds([OURS, *others], warm_up)
        self._begun = 0.0
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self._begun = now()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # several batches make up one step
            return
        self._step = trainer.global_step
        round_ = {OURS: now() - self._begun}
        for name, step in self.others.items():
            begun = now()
            step()
            round_[name] = now() - begun
        self.rounds.add(round_)
        self._begun = now()


def now() -> float:
    """Seconds, after everything that was sent to a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
