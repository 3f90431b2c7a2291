"""Command lines and terminals: parsers whose errors are one line, log messages as plain lines, exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import warnings
from typing import NoReturn

from ldm.util import UsageError


class Interrupted(BaseException):
    """A run that was asked to end; not an Exception, so that nothing takes it for a failure.

    `exit_code` is 128 plus the signal's number, as shells have it: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.exit_code = 128 + signum


class Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions, so that the caller decides how a run ends."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def boolean(text: str) -> bool:
    """Yes or no, in the words people use for them."""
    word = text.lower()
    if word in ("yes", "true", "t", "y", "1", "on"):
        return True
    if word in ("no", "false", "f", "n", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def positive(text: str) -> int:
    """A whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no positive whole number")
    return number


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 1.0:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 0 to 1")
    return number


_HANDLER_NAME = "_ldm_console"


class ConsoleHandler(logging.Handler):
    """Messages as plain lines on stdout, warnings and worse on stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        stream = sys.stderr if warning else sys.stdout
        from tqdm import tqdm

        with tqdm.external_write_mode(file=stream):
            stream.write(f"{'warning: ' if warning else ''}{self.format(record)}\n")
            stream.flush()


def set_up_logging(debug: bool = False) -> None:
    """Show what `ldm` logs, and of Lightning only warnings; `debug` shows everything.

    Of a run's further processes only warnings are shown.
    """
    others = int(os.environ.get("LOCAL_RANK", 0)) > 0
    library = logging.getLogger("ldm")
    library.setLevel(logging.DEBUG if debug else logging.WARNING if others else logging.INFO)
    if not any(getattr(handler, _HANDLER_NAME, False) for handler in library.handlers):
        handler = ConsoleHandler()
        setattr(handler, _HANDLER_NAME, True)
        library.addHandler(handler)
    if debug:
        return
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from pytorch_lightning.utilities.warnings import PossibleUserWarning  # takes seconds to import

    # Advice on worker counts, log intervals and frozen modules, all of which are meant as they are.
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    # A run without validation pictures is no mistake.
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")


def write_line(text: str) -> None:
    """Write a line of a command's results to stdout, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(text)
