"""Time and memory of an epoch on a GPU."""

from __future__ import annotations

import logging
import time

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

logger = logging.getLogger(__name__)


class CUDACallback(Callback):
    """Logs each epoch's time and peak memory, averaged over the GPUs; off CUDA it says so once and rests."""

    def __init__(self) -> None:
        super().__init__()
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.strategy.root_device.type != "cuda" and trainer.is_global_zero:
            logger.info("CUDACallback: not on a CUDA device, nothing to measure")
        # A run that goes on in the middle of an epoch does not start one.
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return
        torch.cuda.synchronize(device)
        figures = torch.tensor(
            [time.monotonic() - self._started, torch.cuda.max_memory_allocated(device) / 2**20], device=device
        )
        seconds, mebibytes = trainer.strategy.reduce(figures).tolist()
        if trainer.is_global_zero:
            logger.info("epoch %d: %.1f s, peak memory %.0f MiB", trainer.current_epoch, seconds, mebibytes)
