"""Runs that wait for a device and runs that go on: a queue on disk, and processes that outlive the page."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm import files
from ldm.files import CHECKOUT
from ldm.front_ends import VARIABLE
from ldm.training.record import RunRecord, runs_in
from ldm.training.run_folder import holder
from ldm.util import UserError

logger = logging.getLogger(__name__)

STATE_FOLDER = ".studio"
# Seconds between two looks at the queue.
PERIOD = 1.0
_MOST_JOBS = 1000


@dataclass(frozen=True)
class Job:
    """A run that the page was asked for.

    Attributes:
        id: a few letters that end the run folder's name.
        arguments: the words after main.py, without the name of the run folder.
        device: "cpu" or "cuda:0"; of the jobs and runs of one device only one goes on at a time.
        state: "waiting", "running", or "failed" for one that ended before it had a run folder.
        folder: the run folder, as soon as it exists; that of a job that continues a run is known from the start.
        process, began: of a running job, its process and when that process began, so that a later process with the
            same number is not taken for it.
    """

    id: str
    title: str
    arguments: tuple[str, ...]
    device: str
    created: float
    state: str = "waiting"
    folder: str | None = None
    process: int | None = None
    began: str | None = None
    message: str | None = None


class Queue:
    """The jobs of one folder of runs.

    Args:
        logdir: the folder of the runs; the queue is in `.studio` in it.
        root: the folder in which runs are started, because YAMLs name relative paths.
        launcher: the words before the arguments, by default this Python with main.py.
        before_start: called with the device before a run is started on it, to free memory.
    """

    def __init__(
        self,
        logdir: str | Path,
        root: str | Path = ".",
        launcher: Sequence[str] | None = None,
        before_start: Callable[[str], object] | None = None,
    ) -> None:
        self.logdir, self.root = Path(logdir), Path(root)
        self.home = self.logdir / STATE_FOLDER
        self.launcher = list(launcher or train_command())
        self.before_start = before_start or (lambda device: None)
        self._lock = threading.RLock()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._jobs = self._read()

    # -- what a person asks for --------------------------------------------------------------------------------

    def add(self, arguments: Sequence[str], title: str, device: str, folder: str | None = None) -> Job:
        """Add a run at the end.

        Raises:
            UserError: the queue is full, or cannot be written, as on a full disk; then nothing was added.
        """
        with self._changing() as jobs:
            if len(jobs) >= _MOST_JOBS:
                raise UserError(f"{len(jobs)} runs wait already; remove some of them first")
            if folder is not None and any(job.folder == folder and job.state != "failed" for job in jobs):
                raise UserError(f"'{folder}' waits already, or goes on")
            number = next(
                n for n in iter(lambda: secrets.token_hex(2), "") if all(n != job.id for job in jobs)
            )
            job = Job(number, title, tuple(arguments), device, time.time(), folder=folder)
            jobs.append(job)
            return job

    def jobs(self) -> list[Job]:
        """All jobs in their order: those that go on, those that wait, those that failed without a run folder."""
        with self._lock:
            return list(self._jobs)

    def move(self, id: str, places: int) -> None:
        """Move a waiting job forward (negative) or back among those that wait."""
        with self._changing() as jobs:
            waiting = [place for place, job in enumerate(jobs) if job.state == "waiting"]
            here = next((n for n, place in enumerate(waiting) if jobs[place].id == id), None)
            if here is None:
                return
            there = min(max(here + places, 0), len(waiting) - 1)
            order = [jobs[place] for place in waiting]
            order.insert(there, order.pop(here))
            for place, job in zip(waiting, order, strict=True):
                jobs[place] = job

    def remove(self, id: str) -> None:
        """Forget a job that waits or failed; one that goes on is stopped instead."""
        with self._changing() as jobs:
            for job in [job for job in jobs if job.id == id]:
                if job.state == "running":
                    self.stop(job.id)
                else:
                    jobs.remove(job)

    def stop(self, id: str) -> None:
        """Ask the process of a job to save and end; a second time, to end at once."""
        job = next((job for job in self.jobs() if job.id == id), None)
        if job is None or job.process is None or not self._alive(job):
            raise UserError("this run does not go on any more")
        _send_stop(job.process)

    def stop_run(self, folder: str | Path) -> None:
        """Ask the process that trains in a run folder to save and end, whoever started it."""
        process = holder(folder)
        if process is None:
            raise UserError(f"nothing trains in '{Path(folder).name}' any more")
        if process == os.getpid():
            raise UserError(f"'{Path(folder).name}' is trained by this process itself")
        _send_stop(process)

    # -- the loop ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Look after the queue in a thread of its own until `close`."""
        self._thread = threading.Thread(target=self._loop, name="queue", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; runs go on."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _loop(self) -> None:
        while not self._stop.wait(PERIOD):
            try:
                self.tick()
            except UserError as error:
                logger.warning("the queue: %s", error)
            except Exception:  # the loop must go on, whatever a single look at the queue meets
                logger.exception("the queue could not be looked at")

    def tick(self) -> None:
        """Note what ended, and start the next job of each free device."""
        with self._changing() as jobs:
            for place in reversed(range(len(jobs))):
                if jobs[place].state == "running":
                    updated = self._looked_after(jobs[place])
                    if updated is None:
                        del jobs[place]
                    else:
                        jobs[place] = updated
            busy = {job.device for job in jobs if job.state == "running"}
            if any(job.state == "waiting" and job.device not in busy for job in jobs):
                ours = {job.folder for job in jobs if job.state == "running"}
                others = (run for run in runs_in(self.logdir) if run.live and run.folder.name not in ours)
                busy |= {run.device or "cpu" for run in others}
            for place, job in enumerate(jobs):
                if job.state == "waiting" and job.device not in busy:
                    busy.add(job.device)
                    jobs[place] = self._launched(job)

    def _looked_after(self, job: Job) -> Job | None:
        """The job with its folder; None if it ended and its run folder says how."""
        folder = job.folder or next((p.name for p in self.logdir.glob(f"*-{job.id}") if p.is_dir()), None)
        job = dataclasses.replace(job, folder=folder)
        if self._alive(job):
            return job
        child = self._children.pop(job.id, None)
        error = self._error_line(job)
        if folder is not None and (error is None or RunRecord.read(self.logdir / folder).message == error):
            return None
        if folder is not None and child is not None and child.returncode == 0:
            return None
        message = (
            error
            or "it ended before it began to train, without a message; it was killed, or memory was not enough"
        )
        return dataclasses.replace(job, state="failed", message=message, process=None)

    def _error_line(self, job: Job) -> str | None:
        try:
            lines = (self.home / f"{job.id}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return None
        found = [line.removeprefix("error: ") for line in lines[-20:] if line.startswith("error: ")]
        # A defect of the program ends in a traceback, whose last line names it.
        found = found or [line[:300] for line in lines[-20:] if re.match(r"[\w.]+(Error|Exception)\b", line)]
        return found[-1] if found else None

    def _launched(self, job: Job) -> Job:
        """Start a job's process in a session of its own: no signal to the page, nor its end, reaches it."""
        words = list(job.arguments) if job.folder else [*job.arguments, f"--postfix=-{job.id}"]
        try:
            self.before_start(job.device)
            with (self.home / f"{job.id}.log").open("wb") as log:
                child = subprocess.Popen(
                    [*self.launcher, *words],
                    cwd=self.root,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=environment(),
                )
        except OSError as error:
            reason = f"it could not be started: {error.strerror or error}"
            return dataclasses.replace(job, state="failed", message=reason)
        self._children[job.id] = child
        return dataclasses.replace(
            job, state="running", process=child.pid, began=_began(child.pid), message=None
        )

    def _alive(self, job: Job) -> bool:
        if (child := self._children.get(job.id)) is not None:
            return child.poll() is None
        if job.folder and holder(self.logdir / job.folder) == job.process:
            return True
        return job.process is not None and job.began is not None and _began(job.process) == job.began

    # -- the file ----------------------------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[list[Job]]:
        """Change the jobs in this block; they are written before anybody sees the change."""
        with self._lock:
            jobs = list(self._jobs)
            yield jobs
            if jobs != self._jobs:
                content = json.dumps([dataclasses.asdict(job) for job in jobs], indent=1)
                files.write_text(self.home / "queue.json", content)
                self._jobs = jobs

    def _read(self) -> list[Job]:
        try:
            content = json.loads((self.home / "queue.json").read_text(encoding="utf-8"))
            return [_job(entry) for entry in content]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            kept = self.home / f"queue-{time.time():.0f}.json"
            logger.warning("the queue is damaged (%s); it is kept as '%s'", error, kept)
            (self.home / "queue.json").rename(kept)
            return []


def _job(entry: Mapping[str, Any]) -> Job:
    known = {field.name for field in dataclasses.fields(Job)}
    values = {key: value for key, value in entry.items() if key in known}
    return Job(**values | {"arguments": tuple(map(str, values["arguments"]))})


def train_command() -> list[str]:
    """The words that start a training run: main.py of the checkout, or the installed command."""
    if (CHECKOUT / "main.py").is_file():
        return [sys.executable, str(CHECKOUT / "main.py")]
    return [
        sys.executable,
        "-c",
        "import sys; from ldm.commands.entry import main; sys.exit(main())",
        "train",
    ]


def environment() -> dict[str, str]:
    """The variables of a training process, whose messages the page shows."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("GRADIO_", "LDM_RUN"))}
    return own | {"PYTHONUNBUFFERED": "1", VARIABLE: "page"}


def _send_stop(process: int) -> None:
    try:
        os.kill(process, signal.SIGTERM)
    except ProcessLookupError:
        raise UserError("this run does not go on any more") from None
    except PermissionError:
        raise UserError("this run belongs to another user, who has to stop it") from None


def _began(process: int) -> str | None:
    """When a process began, as a text that no other process with the same number has; None if it ended."""
    stat = Path("/proc") / str(process) / "stat"
    if stat.parent.parent.joinpath("self").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] == "Z" else fields[19]
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"
