"""How the library's log messages look in a terminal."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from pytorch_lightning.utilities.warnings import PossibleUserWarning
from tqdm import tqdm

_MARK = "_ldm_console"


class ConsoleHandler(logging.Handler):
    """Messages as plain lines on stdout, warnings and worse on stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        stream = sys.stderr if warning else sys.stdout
        with tqdm.external_write_mode(file=stream):
            stream.write(f"{'warning: ' if warning else ''}{self.format(record)}\n")
            stream.flush()


def set_up(debug: bool = False) -> None:
    """Show what `ldm` logs, and of Lightning only warnings; `debug` shows everything.

    Of a run's further processes only warnings are shown.
    """
    others = int(os.environ.get("LOCAL_RANK", 0)) > 0
    library = logging.getLogger("ldm")
    library.setLevel(logging.DEBUG if debug else logging.WARNING if others else logging.INFO)
    if not any(getattr(handler, _MARK, False) for handler in library.handlers):
        handler = ConsoleHandler()
        setattr(handler, _MARK, True)
        library.addHandler(handler)
    if debug:
        return
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Advice on worker counts, log intervals and frozen modules, all of which are meant as they are.
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    # A run without validation pictures is no mistake.
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
