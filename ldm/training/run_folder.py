"""The folder of a run: its name, its files, how a resumed run finds it, and its lock."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from ldm.util import UserError
from ldm.words import folder_name

logger = logging.getLogger(__name__)

# Environment variable with the run folder, for the processes that Lightning starts for further devices.
_SHARED = "LDM_RUN_DIR"


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run; `now` is the time of this start, in the names of its YAMLs and its CSV log."""

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
        """The state that `-r` resumes from."""
        return self.checkpoints / "last.ckpt"

    @property
    def embeddings(self) -> Path:
        """The latest embeddings; `embeddings_gs-N.pt` in the same folder are those of step N."""
        return self.checkpoints / "embeddings.pt"

    def saved_configs(self) -> list[Path]:
        """The YAMLs of all starts of the run, oldest first."""
        return sorted(self.configs.glob("*.yaml"))


def new_run_folder(
    logdir: str | Path, *, name: str, data_root: Any = None, postfix: str = "", several: bool = False
) -> RunFolder:
    """The folder `<logdir>/<data folder><time>_<name><postfix>` for a new run; nothing is written.

    With `several`, all processes of one run use the same folder.
    """
    now = _now()
    path = Path(logdir) / folder_name(f"{_data_name(data_root)}{now}{f'_{name}' if name else ''}{postfix}")
    if "LOCAL_RANK" in os.environ and _SHARED in os.environ:
        path = Path(os.environ[_SHARED])
    else:
        path = _unused_path(path)
        if several:
            os.environ[_SHARED] = str(path)
    return RunFolder(path, now)


def existing_run_folder(place: str | Path, logdir: str | Path = "logs") -> tuple[RunFolder, Path]:
    """The run folder and the state file for `-r`, which is a folder, a file in its checkpoints, or "latest".

    Raises:
        UserError: there is nothing to resume.
    """
    if place == "latest":
        runs = sorted(Path(logdir).glob("*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime)
        if not runs:
            raise UserError(f"--resume latest: no run in '{logdir}' has a last.ckpt")
        place = runs[-1].parent.parent
    place = Path(place)
    if not place.exists():
        raise UserError(f"--resume '{place}' does not exist; name a run folder such as logs/<run>")
    path = place.resolve().parent.parent if place.is_file() else place
    run = RunFolder(path, _unused_time(path))
    state = place if place.is_file() else run.last
    if not run.saved_configs():
        raise UserError(f"--resume '{place}': no YAML in '{run.configs}'; name a folder made by main.py")
    if not state.is_file():
        raise UserError(f"--resume '{place}': there is no '{run.last}'; the run ended before its first save")
    return run, state


def _data_name(data_root: Any) -> str:
    roots = data_root.values() if isinstance(data_root, Mapping) else [data_root] if data_root else []
    return "+".join(Path(os.path.normpath(str(root))).name for root in roots)


def _now() -> str:
    return datetime.now().strftime("%Y-%m-%dT%H-%M-%S")


def _unused_time(folder: Path) -> str:
    """The current time, with a number if an earlier start in this folder had the same time."""
    now, number = _now(), 2
    candidate = now
    while any(folder.glob(f"*/{candidate}")) or any(folder.glob(f"*/{candidate}-*.yaml")):
        # With a dot, "...00.2-project.yaml" is sorted after "...00-project.yaml".
        candidate = f"{now}.{number}"
        number += 1
    return candidate


def _unused_path(path: Path) -> Path:
    """The path, with a number if another run of the same second has it."""
    candidate, number = path, 2
    while candidate.exists():
        candidate = path.with_name(f"{path.name}-{number}")
        number += 1
    return candidate


LOCK_NAME = ".lock"


@contextmanager
def locked(folder: str | Path, *, hold: bool = True) -> Iterator[None]:
    """Hold the lock of a run folder for this block.

    The operating system releases the lock when the process ends for any reason. Of the processes of a run only the
    first one holds the lock; the others pass `hold=False`.

    Raises:
        UserError: another process holds the lock, or the folder is not writable.
    """
    if not hold:
        yield
        return
    path = Path(folder) / LOCK_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
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
                f"another process{f' ({holder})' if holder else ''} is training in '{folder}'; wait for it, or start a "
                "new run without -r"
            ) from error
        except OSError as error:
            # Some network file systems do not support locks.
            logger.debug("no lock for '%s': %s", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        yield


def _lock(file: IO[str]) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
        return
    import fcntl

    # Not flock, which the data loader's workers would keep after this process is killed.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError as error:  # on some systems this means that the lock is held
        raise BlockingIOError from error
