"""Print which files of the library are executed in one training step of the embedded model, from main.py to the loss.

    python -m benchmarks.files_of_a_step

Runs main.py for one step. Only functions that are called count, not the import of a module. "Step" is loading the
batch and `training_step` up to the loss; "start-up" is everything before that. Files are listed in the order in which
they are executed first, each with the first function called in it.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from torch.utils.data import dataloader

import main as main_py
from benchmarks.machine import ROOT
from benchmarks.subjects import EMBEDDED, TimedModel
from ldm.commands.base import guarded
from ldm.console import Parser
from ldm.models.diffusion.ddpm import DDPM
from ldm.util import UserError

MOST = 20  # files of a step
LOADING = inspect.unwrap(dataloader._BaseDataLoaderIter.__next__).__code__
# One step on the CPU, with data loaded in this process, where it can be seen.
ONE_STEP = ("--max_steps", "1", "--gpus", "0", "data.params.num_workers=0")

Files = dict[Path, str]  # file -> the first function called in it, in order of first execution


class Recorder:
    """A profile function for `sys.setprofile` that records the executed files of one training step.

    Attributes:
        startup: files executed before `training_step` is called, those of loading the batch included.
        step: files executed while the batch is loaded and in `training_step`.
        done: whether `training_step` has returned.
    """

    def __init__(self, root: Path, step: CodeType, loading: CodeType) -> None:
        self.root, self._step, self._loading = str(root), step, loading
        self.startup: Files = {}
        self.step: Files = {}
        self.done = False
        self._in_step = self._in_loading = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "return" and code is self._step:
            self.done = True
            sys.setprofile(None)
        elif event == "return" and code is self._loading:
            self._in_loading = False
        elif event == "call":
            self._enter(code)

    def _enter(self, code: CodeType) -> None:
        if code is self._step:
            self._in_step = True
        elif code is self._loading:
            # Only the batch that was loaded last belongs to the step.
            self._in_loading, self.step = True, {}
        # The code of a module or class body, which runs at import, lacks this flag.
        if not code.co_flags & inspect.CO_OPTIMIZED or not code.co_filename.startswith(self.root):
            return
        path = Path(code.co_filename).relative_to(self.root)
        if path.parts[0] not in ("ldm", "main.py"):
            return
        if not self._in_step:
            self.startup.setdefault(path, code.co_name)
        if self._in_step or self._in_loading:
            self.step.setdefault(path, code.co_name)


def record(command: Callable[[], object], root: Path = ROOT) -> Recorder:
    """Run a command that trains, and record its first training step."""
    recorder = Recorder(root, DDPM.training_step.__code__, LOADING)
    sys.setprofile(recorder)
    try:
        command()
    finally:
        sys.setprofile(None)
    if not recorder.done:
        raise UserError("the run ended before its first training step; its error is above")
    return recorder


def record_step(subject: TimedModel, workdir: Path) -> Recorder:
    """Record the first step of a run of main.py."""
    argv = subject.argv(workdir, *ONE_STEP)
    return record(lambda: main_py.main(argv))


def report(recorder: Recorder) -> str:
    """The recorded files as text: of the start-up, then of the step."""
    total = len({*recorder.startup, *recorder.step})
    lines = [f"start-up: {len(recorder.startup)} files"]
    lines += [
        f"  {number:3} {path}: {name}" for number, (path, name) in enumerate(recorder.startup.items(), 1)
    ]
    lines += [f"step, from loading the batch to the loss: {len(recorder.step)} files (at most {MOST} wanted)"]
    lines += [f"  {number:3} {path}: {name}" for number, (path, name) in enumerate(recorder.step.items(), 1)]
    return "\n".join([*lines, f"from main.py to the loss: {total} files"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)

    def command() -> int:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            recorder = record_step(EMBEDDED, Path(folder))
        print(report(recorder))
        return int(len(recorder.step) > MOST)

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main())
