"""Validation draws the same random numbers each time, and takes none from the training."""

from __future__ import annotations

from contextlib import ExitStack

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ldm.training import rng

VALIDATION_SEED = 4711


class ValidationSeed(Callback):
    """Sets the generators aside while a validation runs, so that its losses can be compared over the run."""

    def __init__(self) -> None:
        super().__init__()
        self._aside = ExitStack()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._aside.enter_context(rng.isolated(VALIDATION_SEED, trainer.global_rank))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._aside.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._aside.close()
