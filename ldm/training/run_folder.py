"""The folder of a run: its name and parts, how a resumed run finds them, and its lock."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from ldm.util import UserError

logger = logging.getLogger(__name__)

# Processes that Lightning starts for further GPUs learn the folder of the first one from here.
_SHARED = "LDM_RUN_DIR"


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. `now` is the time stamp in the names of its saved YAMLs."""

    path: Path
    now: str

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def configs(self) -> Path:
        return self.path / "configs"

    @property
    def last(self) -> Path:
        """The state that `-r` goes on from."""
        return self.checkpoints / "last.ckpt"

    @property
    def embeddings(self) -> Path:
        """The newest embeddings; `embeddings_gs-N.pt` beside it are those of step N."""
        return self.checkpoints / "embeddings.pt"

    def saved_configs(self) -> list[Path]:
        """The YAMLs of the run's starts, oldest first."""
        return sorted(self.configs.glob("*.yaml"))


def new_run_folder(
    logdir: str | Path, *, name: str, data_root: Any = None, postfix: str = "", several: bool = False
) -> RunFolder:
    """`<logdir>/<data's name><time>_<name><postfix>`; nothing is written yet.

    `several` processes of one run agree on one folder.
    """
    now = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    path = Path(logdir) / f"{_data_name(data_root)}{now}{f'_{name}' if name else ''}{postfix}"
    if "LOCAL_RANK" in os.environ and _SHARED in os.environ:
        path = Path(os.environ[_SHARED])
    else:
        path = _unused(path)
        if several:
            os.environ[_SHARED] = str(path)
    return RunFolder(path, now)


def existing_run_folder(place: str | Path, logdir: str | Path = "logs") -> tuple[RunFolder, Path]:
    """The run folder and the state that `-r` names: a folder, a file in its checkpoints, or "latest".

    Raises UserError if there is nothing to go on from.
    """
    now = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    if place == "latest":
        runs = sorted(Path(logdir).glob("*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime)
        if not runs:
            raise UserError(f"--resume latest: there is no run with a last.ckpt in '{logdir}'")
        place = runs[-1].parent.parent
    place = Path(place)
    if not place.exists():
        raise UserError(f"--resume '{place}' does not exist; name a run folder such as logs/<run>")
    run = RunFolder(place.resolve().parent.parent if place.is_file() else place, now)
    state = place if place.is_file() else run.last
    if not run.saved_configs():
        raise UserError(f"--resume '{place}': no YAML in '{run.configs}'; name a folder made by main.py")
    if not state.is_file():
        raise UserError(f"--resume '{place}': there is no '{run.last}'; the run ended before its first save")
    return run, state


def _data_name(data_root: Any) -> str:
    roots = data_root.values() if isinstance(data_root, Mapping) else [data_root] if data_root else []
    return "+".join(Path(os.path.normpath(str(root))).name for root in roots)


def _unused(path: Path) -> Path:
    """The path, or the path with a number when another run of the same second has it."""
    candidate, number = path, 2
    while candidate.exists():
        candidate = path.with_name(f"{path.name}-{number}")
        number += 1
    return candidate


LOCK_NAME = ".lock"


@contextmanager
def locked(folder: str | Path, *, hold: bool = True) -> Iterator[None]:
    """Hold a run folder for this block; UserError if another process does.

    The system gives the lock back when the process ends, however it ends. The further processes of a run on several
    devices belong to the first one, which holds the lock for all: they do not `hold`.
    """
    if not hold:
        yield
        return
    path = Path(folder) / LOCK_NAME
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
