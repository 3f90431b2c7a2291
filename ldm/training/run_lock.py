"""One process at a time in a run folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ldm.util import UserError

logger = logging.getLogger(__name__)

NAME = ".lock"


@contextmanager
def locked(folder: str | Path, *, hold: bool = True) -> Iterator[None]:
    """Hold a run folder for this block; UserError if another process does.

    The system gives the lock back when the process ends, however it ends. The further processes of a run on several
    devices belong to the first one, which holds the lock for all: they do not `hold`.
    """
    if not hold:
        yield
        return
    path = Path(folder) / NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(
            f"cannot write in '{folder}': {error.strerror}; choose another folder with --logdir"
        ) from error
    with file:
        try:
            _lock(file)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip()
            raise UserError(
                f"another process{f' ({holder})' if holder else ''} is training in '{folder}'; wait for it, or leave "
                "-r out to begin a run of its own"
            ) from error
        except OSError as error:
            # Some network file systems have no locks.
            logger.debug("no lock for '%s': %s", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        yield


def _lock(file: IO[str]) -> None:
    if os.name == "nt":
        import msvcrt

        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
        return
    import fcntl

    # Not flock: that would live on in the data loader's workers when the process itself is killed.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError as error:  # what some systems say for "taken"
        raise BlockingIOError from error
