"""Ctrl-C, SIGTERM and SIGUSR1 as requests that a run fulfils between two steps."""

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
    """What was asked of the run so far. While `stepping`, a stop waits for the step's end.

    A second stop does not wait, but while the optimiser is `writing` what it learned: half of that must not be saved.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.save = False
        self.stepping = False
        self.writing = False
        self._at_once = False

    def on_stop(self, signum: int, frame: FrameType | None = None) -> None:
        repeated = self.stop is not None
        self.stop = signum
        if repeated and self.writing:
            self._at_once = True
            return
        if repeated or not self.stepping:
            raise Interrupted(signum)
        logger.info("stopping after this step; press Ctrl-C again to stop at once")

    def written(self) -> None:
        """The optimiser is done: end the run if that was asked for repeatedly."""
        self.writing = False
        if self._at_once:
            raise Interrupted(self.stop or signal.SIGTERM)

    def on_save(self, signum: int, frame: FrameType | None = None) -> None:
        self.save = True

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A part of the run that holds no half-done state: a stop ends it at once."""
        if self.stop is not None:
            raise Interrupted(self.stop)
        stepping, self.stepping = self.stepping, False
        try:
            yield
        finally:
            self.stepping = stepping


@contextmanager
def listening(requests: Requests) -> Iterator[Requests]:
    """Take the signals over for this block; does nothing outside the main thread, where Python allows none."""
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    handlers = {signal.SIGINT: requests.on_stop, signal.SIGTERM: requests.on_stop}
    if _SAVE is not None:
        handlers[_SAVE] = requests.on_save
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield requests
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


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
