"""One line of progress for the whole run: step, loss, learning rate, time left."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar
from torch import Tensor
from tqdm import tqdm

from ldm.training.callbacks.base import RunCallback, callbacks_of, loss_of

logger = logging.getLogger(__name__)

# The number of steps whose mean loss is shown; the loss of a single step of a diffusion model says little.
WINDOW = 50


class RunProgress(ProgressBar):
    """A progress bar on a terminal; otherwise a log line after the first step and then every `every_n_steps`.

    The loss is the mean of the last steps, and is read from the device only when it is shown.
    """

    def __init__(self, every_n_steps: int = 50, terminal: bool | None = None) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self._enabled = True
        self._bar: tqdm[Any] | None = None
        self._losses: list[Tensor] = []
        self._first_step = 0
        self._started = 0.0
        self._shown = 0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step = self._shown = trainer.global_step
        self._started = time.monotonic()
        if self._enabled and self.terminal:
            total = total_steps(trainer)
            self._bar = tqdm(
                total=total, initial=trainer.global_step, desc="training", unit="step", smoothing=0.1
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._enabled:
            return
        loss = loss_of(outputs)
        if loss is not None:
            self._losses = [*self._losses[1 - WINDOW :], loss.detach()]
        step = trainer.global_step
        if step == self._shown:
            return
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            if step % 10 == 0:
                self._bar.set_postfix_str(", ".join(self._figures(trainer)), refresh=False)
        elif step in (self._first_step + 1, total := total_steps(trainer)) or step % self.every_n_steps == 0:
            of_total = f"/{total}" if total else ""
            parts = [f"step {step}{of_total}", *self._figures(trainer), *self._pace(step, total)]
            logger.info("%s", ", ".join(parts))
        self._shown = step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close(trainer)

    def _figures(self, trainer: pl.Trainer) -> list[str]:
        """Loss and learning rate as texts, and the figures of the other callbacks."""
        loss = None
        if self._losses:
            loss = torch.stack([value.float().mean() for value in self._losses]).mean().item()
        else:
            logged = [v for key, v in trainer.callback_metrics.items() if "loss" in key and "train" in key]
            loss = float(logged[0]) if logged else None
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        shown = [] if loss is None else [f"loss {loss:.4f}"]
        shown += [f"lr {rates[0]:.2e}"] if rates else []
        others = [callback for callback in callbacks_of(trainer) if isinstance(callback, RunCallback)]
        return shown + [figure for callback in others for figure in callback.figures()]

    def _pace(self, step: int, total: int | None) -> list[str]:
        done = step - self._first_step
        seconds = (time.monotonic() - self._started) / done
        pace = f"{1 / seconds:.1f} steps/s" if seconds < 1 else f"{seconds:.1f} s/step"
        return [pace] + ([f"{duration((total - step) * seconds)} left"] if total else [])

    def _close(self, trainer: pl.Trainer) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._figures(trainer)), refresh=False)
            self._bar.close()
            self._bar = None


def total_steps(trainer: pl.Trainer) -> int | None:
    """The number of optimizer steps of the whole run, or None if it has no limit."""
    if trainer.max_steps is not None and trainer.max_steps > 0:
        return trainer.max_steps
    batches = trainer.num_training_batches
    if trainer.max_epochs is None or trainer.max_epochs < 0 or batches in (0, float("inf")):
        return None
    return -(-int(batches) // trainer.accumulate_grad_batches) * trainer.max_epochs


def duration(seconds: float) -> str:
    """A time as text: "40 s", "12 min" or "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
