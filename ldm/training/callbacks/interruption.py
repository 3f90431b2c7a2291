"""Ctrl-C, SIGTERM and SIGUSR1 as requests that a run handles between two steps."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ldm.console import Interrupted

logger = logging.getLogger(__name__)

# Windows has no SIGUSR1.
_SAVE = getattr(signal, "SIGUSR1", None)


class Requests:
    """What signals asked the run to do.

    A first stop request waits for the end of the current step (`stepping`). A second one ends the run at once, except
    while the optimizer is `updating` the weights, because a half-done update must not be saved.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.save = False
        self.stepping = False
        self.updating = False
        self._stop_after_update = False

    def on_stop(self, signum: int, frame: FrameType | None = None) -> None:
        """The handler of SIGINT and SIGTERM."""
        repeated = self.stop is not None
        self.stop = signum
        if repeated and self.updating:
            self._stop_after_update = True
            return
        if repeated or not self.stepping:
            raise Interrupted(signum)
        logger.info("stopping after this step; press Ctrl-C again to stop at once")

    def on_save(self, signum: int, frame: FrameType | None = None) -> None:
        """The handler of SIGUSR1."""
        self.save = True

    def update_done(self) -> None:
        """The optimizer has finished its update: end the run if a second stop request came during it."""
        self.updating = False
        if self._stop_after_update:
            raise Interrupted(self.stop or signal.SIGTERM)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within this block a stop request ends the run at once, because there is no half-done step."""
        if self.stop is not None:
            raise Interrupted(self.stop)
        stepping, self.stepping = self.stepping, False
        try:
            yield
        finally:
            self.stepping = stepping


@contextmanager
def handle_signals(requests: Requests) -> Iterator[None]:
    """Handle the signals for this block; outside the main thread, where Python cannot, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signal.SIGINT: requests.on_stop, signal.SIGTERM: requests.on_stop}
    if _SAVE is not None:
        handlers[_SAVE] = requests.on_save
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class StepGuard(Callback):
    """Tells the requests when the optimizer updates the weights, so that no stop request interrupts the update."""

    def __init__(self, requests: Requests) -> None:
        super().__init__()
        self.requests = requests

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.requests.updating = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.requests.update_done()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.requests.updating = False


class Interruption(Callback):
    """Fulfils save and stop requests as soon as the current optimizer step is done.

    `savers` are called with the trainer. A stop request raises Interrupted from `trainer.fit`.
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
        # Between two accumulated batches there are gradients that no state file holds.
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        stop, save = self._requested(trainer)
        if not (stop or save):
            return
        for saver in self.savers:
            saver(trainer)
        self.requests.save = False
        if trainer.is_global_zero:
            logger.info("saved at step %d", trainer.global_step)
        if stop:
            raise Interrupted(self.requests.stop or signal.SIGTERM)

    def _requested(self, trainer: pl.Trainer) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and to save; the same answer in all processes."""
        stop, save = self.requests.stop is not None, self.requests.save
        if trainer.world_size > 1:
            flags = torch.tensor([stop, save], dtype=torch.uint8, device=trainer.strategy.root_device)
            stop, save = trainer.strategy.reduce(flags, reduce_op="max").bool().tolist()
        return stop, save

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.requests.stepping = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.requests.stepping = trainer.state.fn == "fit" and not trainer.sanity_checking
