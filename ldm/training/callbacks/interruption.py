"""Meets what was asked by signals, between two steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ldm.training.signals import Interrupted, Requests

logger = logging.getLogger(__name__)


class StepGuard(Callback):
    """Lets no stop, be it repeated, come between the first and the last number that the optimiser writes."""

    def __init__(self, requests: Requests) -> None:
        super().__init__()
        self.requests = requests

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.requests.writing = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.requests.written()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.requests.writing = False


class Interruption(Callback):
    """Saves on request and ends the run on request, as soon as the present optimizer step is done.

    `savers` are called with the trainer. A stop is the exception Interrupted out of `trainer.fit`.
    """

    def __init__(self, requests: Requests, savers: Sequence[Callable[[pl.Trainer], None]]) -> None:
        super().__init__()
        self.requests = requests
        self.savers = savers
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.requests.stepping = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Between two accumulated batches there is half a gradient that no file holds.
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        stop, save = self._asked(trainer)
        if not (stop or save):
            return
        for saver in self.savers:
            saver(trainer)
        self.requests.save = False
        if trainer.is_global_zero:
            logger.info("saved at step %d", trainer.global_step)
        if stop:
            raise Interrupted(self.requests.stop or 15)

    def _asked(self, trainer: pl.Trainer) -> tuple[bool, bool]:
        """Whether any process was asked to end, and any to save; all processes hear the same."""
        asked = self.requests.stop is not None, self.requests.save
        if trainer.world_size > 1:
            flags = torch.tensor(asked, dtype=torch.uint8, device=trainer.strategy.root_device)
            asked = tuple(trainer.strategy.reduce(flags, reduce_op="max").bool().tolist())
        return asked

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.requests.stepping = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.requests.stepping = trainer.state.fn == "fit" and not trainer.sanity_checking
