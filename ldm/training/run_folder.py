"""The folder of a run: its name, its files, how a resumed run finds it, and its lock."""

from __future__ import annotations

import argparse
import logging
import os
import re
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from ldm.files import file_kind, why_no_folder
from ldm.front_ends import setting
from ldm.images import IMAGE_SUFFIXES
from ldm.model_kinds import EMBEDDING, no_embedding, what_holds
from ldm.outlines import outline_of
from ldm.util import UserError
from ldm.weights import read_header
from ldm.words import file_stem, folder_name

logger = logging.getLogger(__name__)

# Environment variable with the run folder, for the processes that Lightning starts for further devices.
_SHARED = "LDM_RUN_DIR"


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run; `now` is the time of this start, in the names of its YAMLs and its CSV log.

    `label` names the run in file names, "" for that of its folder without the time.
    """

    path: Path
    now: str
    label: str = ""

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

    def word_files(self) -> list[Path]:
        """The latest `.safetensors` of each word; `<name>_gs-N` and `<name>_best` beside them are not among these."""
        found = sorted(self.checkpoints.glob("*.safetensors"))
        return [path for path in found if not re.search(r"_(gs-\d+|best)$", path.stem)]

    def is_latest(self, path: Path) -> bool:
        """Whether a file of the run holds its latest vectors, and not those of an earlier step or of the best one."""
        steps = {
            file.resolve(): int(found[1])
            for file in self.checkpoints.glob("*_gs-*")
            if (found := re.search(r"_gs-(\d+)$", file.stem))
        }
        latest = [one for one, step in steps.items() if step == max(steps.values())]
        return path.resolve() in [*latest, *(one.resolve() for one in (self.embeddings, *self.word_files()))]

    def word_stems(self, words: Sequence[str]) -> dict[str, str]:
        """The name without suffix of the files of each word.

        A word keeps the name that its file in the folder has, so that a resumed run replaces its own files, those of
        earlier versions included.
        """
        from ldm import embeddings

        held: dict[str, str] = {}
        for path in self.word_files():
            try:
                held |= dict.fromkeys(embeddings.read(path).triggers, path.stem)
            except UserError as error:
                logger.debug("%s", error)
        stems: dict[str, str] = {}
        taken = {stem.casefold() for word, stem in held.items() if word in words}
        for word in words:
            stem = name = held.get(word) or word_stem(word, self.label or _label_of(self.path))
            number = 2
            while word not in held and name.casefold() in taken:
                name, number = f"{stem}-{number}", number + 1
            taken.add(name.casefold())
            stems[word] = name
        return stems


def word_stem(word: str, run: str) -> str:
    """The name without suffix of the files of a word: the word, or the run for one without letters, such as "*".

    Programs use this name as the word in prompts.
    """
    return file_stem(word if any(map(str.isalnum, word)) else run)


_TIME = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d"


def _label_of(path: Path) -> str:
    """What a run folder's name says of the run: the data folder's name, else the run's own."""
    name = path.resolve().name
    match = re.fullmatch(rf"(.*?){_TIME}(?:-\d+)?_?(.*)", name)
    return (match[1] or match[2] or name) if match else name


def new_run_folder(
    logdir: str | Path,
    *,
    name: str,
    data_root: Any = None,
    postfix: str = "",
    several: bool = False,
    label: str = "",
) -> RunFolder:
    """The folder `<logdir>/<data folder><time>_<name><postfix>` for a new run; nothing is written.

    With `several`, all processes of one run use the same folder. `label` is that of the RunFolder.
    """
    now = _now()
    path = Path(logdir) / folder_name(f"{_data_name(data_root)}{now}{f'_{name}' if name else ''}{postfix}")
    if "LOCAL_RANK" in os.environ and _SHARED in os.environ:
        path = Path(os.environ[_SHARED])
    else:
        path = _unused_path(path)
        if several:
            os.environ[_SHARED] = str(path)
    return RunFolder(path, now, label)


def place_to_resume(options: argparse.Namespace) -> tuple[str, str]:
    """What to resume, "" for a new run, and the name of a new run."""
    # diffusers' script begins anew where there is nothing to resume: a job can be started again by the same command.
    begins = options.resume in _NEWEST and options.resume_flag == "--resume_from_checkpoint"
    if begins and latest_run(options.logdir) is None:
        logger.info(
            "--resume_from_checkpoint %s: no run in '%s' to resume; a new one begins",
            options.resume,
            options.logdir,
        )
        return "", options.name
    if options.resume or not options.project:
        return options.resume, options.name
    if Path(options.project).exists():
        options.resume_flag = "--project"
        return options.project, options.name
    return "", options.project


# What names the newest run: the word of diffusers' script, and Lightning's.
_NEWEST = ("latest", "last")


def _not_writable(folder: str | Path, reason: str | None) -> UserError:
    return UserError(f"cannot write in '{folder}': {reason}; choose another folder with {setting('logdir')}")


def check_logdir(logdir: str | Path) -> None:
    """Raise UserError if the folder of runs is a file, or cannot be written or made; nothing is made."""
    if reason := why_no_folder(logdir):
        raise _not_writable(logdir, reason)


def latest_run(logdir: str | Path) -> Path | None:
    """The run in a folder whose state was saved last; None if there is none."""
    states = sorted(Path(logdir).glob("*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime)
    return states[-1].parent.parent if states else None


def existing_run_folder(
    place: str | Path, logdir: str | Path = "logs", flag: str = "-r"
) -> tuple[RunFolder, Path]:
    """The run folder and the state file for `-r`.

    `place` is a run folder, a folder or a file in it, the name of a run in `logdir`, or "latest". A `.ckpt` is the
    state itself; any other place means the run's last.ckpt. `flag` is the option of a command line.

    Raises:
        UserError: there is nothing to resume, or `place` holds vectors or a model.
    """
    asked = setting("resume", flag)
    if place in _NEWEST and not Path(place).exists():
        newest = latest_run(logdir)
        if newest is None:
            raise UserError(f"{asked} {place}: no run in '{logdir}' has a last.ckpt; name a run folder")
        place = newest
    place = Path(place)
    if not place.exists() and is_run_folder(Path(logdir) / place):
        place = Path(logdir) / place
    if not place.exists():
        one = (
            "a run keeps its last state alone; "
            if re.fullmatch(r"(checkpoint|step)[-_]\d+", place.name)
            else ""
        )
        raise UserError(
            f"{asked} '{place}' does not exist; {one}name a run folder such as {_a_run_in(Path(logdir))}, or 'latest' "
            "for the newest run"
        )
    home = next((path for path in (place, *place.resolve().parents) if is_run_folder(path)), None)
    if home is None:
        raise UserError(f"{asked} '{place}': {_no_run(place)}")
    if not place.is_absolute():
        home = Path(os.path.relpath(home))
    run = RunFolder(home, _unused_time(home))
    is_state = place.is_file() and place.suffix == ".ckpt"
    if place.is_file() and not is_state and place.parent.name != "configs":
        vectors = f"; a new run begins from vectors with {setting('begin', place)}"
        raise UserError(
            f"{asked} '{place}' is not the state of a run: {setting('resume', '-r')} {home} goes on from its last.ckpt"
            + vectors * _holds_vectors(place)
        )
    state = place if is_state else run.last
    if not state.is_file():
        remedy = "the run ended before its first save"
        if run.embeddings.is_file():
            remedy = f"begin a new run from its vectors: {setting('begin', run.embeddings)}"
        raise UserError(f"{asked} '{place}': there is no '{run.last}'; {remedy}")
    return run, state


def _a_run_in(folder: Path) -> str:
    """A run in a folder for messages: the newest one, if there is any."""
    return str(latest_run(folder) or folder / "<run>")


def _no_run(place: Path) -> str:
    """Why a place is not in a run folder, and what its user may mean."""
    if place.is_dir():
        return _no_run_folder(place)
    kind = file_kind(place)
    try:
        content = outline_of(place, kind).pickle.content if kind in ("zip", "pickle") else None
    except UserError:
        content = None
    if isinstance(content, dict) and "loops" in content:
        return "it is the state of a run outside its folder; put it back into logs/<run>/checkpoints beside configs"
    if _holds_vectors(place):
        return f"it holds vectors; a new run begins from them with {setting('begin', place)}"
    return (
        f"it is not in a run folder, beside 'configs'; a frozen model is given as {setting('frozen_model')} FILE, and "
        f"{setting('resume', '-r')} names a run folder such as logs/<run>"
    )


def _no_run_folder(place: Path) -> str:
    if latest_run(place) is not None:
        return f"it holds runs and is none; name one of them, such as {_a_run_in(place)}"
    if (place / "last.ckpt").is_file():
        return (
            "it is the checkpoints folder of a run outside of it; put it back into logs/<run> beside configs"
        )
    suffixes = {entry.suffix.lower() for entry in place.iterdir()}
    if (place / "model_index.json").is_file() or suffixes & {".ckpt", ".safetensors"}:
        return f"it holds a model and no run; a frozen model is given as {setting('frozen_model')} {place}"
    if suffixes & IMAGE_SUFFIXES:
        return f"it holds images and no run; training images are given as {setting('images')} {place}"
    vectors = next(
        (
            path
            for path in (place / "embeddings.pt", place / "checkpoints" / "embeddings.pt")
            if path.is_file()
        ),
        None,
    )
    if vectors is not None:
        return (
            "it has no YAML in 'configs', so it is no whole run; a new run begins from its vectors: "
            f"{setting('begin', vectors)}"
        )
    return f"no YAML in '{place / 'configs'}'; name a folder made by main.py, or another name for a new run"


def _holds_vectors(path: Path) -> bool:
    try:
        shapes = read_header(path).shapes
        return what_holds(shapes) == EMBEDDING and no_embedding(shapes) is None
    except UserError:
        return False


def is_run_folder(place: str | Path) -> bool:
    """Whether a folder holds the YAMLs of a run."""
    return bool(RunFolder(Path(place), "").saved_configs())


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
        raise _not_writable(folder, error.strerror) from error
    with file:
        try:
            _lock(file)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip()
            raise UserError(
                f"another process{f' ({holder})' if holder else ''} is training in '{folder}'; wait for it, or start a "
                f"new run without {setting('resume', '-r')}"
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


def holder(folder: str | Path) -> int | None:
    """The process that holds the lock of a run folder; None if none does, or if the lock cannot be asked.

    Nothing is locked by asking. A process must not ask for a lock of its own: closing the file would release it.
    """
    layouts = {"linux": "hhqqi", "darwin": "qqihh"}
    if sys.platform not in layouts:
        return _holder_by_trying(Path(folder) / LOCK_NAME)
    import fcntl

    if sys.platform == "linux":
        request = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    else:
        request = struct.pack("qqihh", 0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET)
    try:
        with (Path(folder) / LOCK_NAME).open("rb") as file:
            answer = struct.unpack(layouts[sys.platform], fcntl.fcntl(file, fcntl.F_GETLK, request))
    except OSError:
        return None
    kind, process = (answer[0], answer[4]) if sys.platform == "linux" else (answer[3], answer[2])
    return None if kind == fcntl.F_UNLCK else process


def _holder_by_trying(path: Path) -> int | None:
    try:
        with path.open("r+") as file:
            text = file.read()
            _lock(file)
    except BlockingIOError:
        numbers = [int(word) for word in text.split() if word.isdigit()]
        return numbers[0] if numbers else 0
    except OSError:
        return None
    return None
