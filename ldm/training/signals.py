"""Ctrl-C, SIGTERM and SIGUSR1 as requests that a run meets between two steps."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

# Windows has no SIGUSR1.
_SAVE = getattr(signal, "SIGUSR1", None)


class Interrupted(BaseException):
    """A run that was asked to end; not an Exception, so that nothing takes it for a failure.

    `exit_code` is 128 plus the signal's number, as shells have it: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.exit_code = 128 + signum


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
