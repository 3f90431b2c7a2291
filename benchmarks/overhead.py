"""Where the time of a run on the embedded model goes besides its steps, and how long the commands take to start.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --recipe fast

A part is the time that a run spends in some callbacks or loggers, divided by the time of everything else in the same
run: the difference of two runs would be smaller than the machine's variation. Whole processes are timed from start
to end: an answer to --help, answers to mistakes in it and in the scripts, and a run of one step without previews, which
is nearly all start-up.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Callback

from benchmarks import runs
from benchmarks.machine import ROOT
from benchmarks.report import Report, verdict
from benchmarks.rounds import Quartiles, Rounds, now
from benchmarks.subjects import EMBEDDED
from ldm.commands.base import WEIGHTS, guarded
from ldm.console import Parser, positive
from ldm.training.callbacks.checkpoint import LastCheckpoint
from ldm.training.callbacks.embedding_saver import EmbeddingSaver
from ldm.training.callbacks.fixed_loss import DeterministicLoss
from ldm.training.callbacks.guard import TrainingGuard, VectorStats
from ldm.training.callbacks.image_logger import ImageLogger
from ldm.training.callbacks.latent_cache import LatentCache
from ldm.training.callbacks.progress import RunProgress
from ldm.training.callbacks.summary_images import SummaryImages
from ldm.training.callbacks.warm_start import WarmStart
from ldm.util import UserError, shown

PREVIEWS, LAST, REST = "previews", "images at the end", "everything else"
LOGGING = "loggers and progress bar"
# What is called outside of all others counts for its part: a callback that logs counts the logging too.
PARTS: dict[str, tuple[type[Callback], ...]] = {
    PREVIEWS: (ImageLogger,),
    LAST: (SummaryImages,),
    "deterministic loss": (DeterministicLoss,),
    "checks and statistics": (TrainingGuard, VectorStats),
    "saved vectors and states": (EmbeddingSaver, LastCheckpoint),
    "warm start": (WarmStart,),
    "encoding of the images": (LatentCache,),
    LOGGING: (RunProgress,),
}
FINETUNE = "configs/latent-diffusion/txt2img-finetune.yaml"
MOST = 0.5  # seconds
# Mistakes, as the script and its arguments.
MISTAKES: dict[str, tuple[str, ...]] = {
    "main.py, a mistake in the command line": ("main.py", "--base", "none.yaml", "-t"),
    "main.py, an unknown key of a class": ("main.py", "--base", FINETUNE, "-t", "model.params.timestep=5"),
    "txt2img.py, a word that is not loaded": ("scripts/txt2img.py", "--prompt", "a photo of *"),
    "embeddings.py, a model for an embedding": ("scripts/embeddings.py", "inspect", WEIGHTS),
    "evaluate_model.py, no such features": (
        *("scripts/evaluate_model.py", "--concept", "data/concepts/bobo", "--word", "a bear"),
        *("--features", "./none"),
    ),
    "export_diffusers.py, a rename of no word": (
        *("scripts/export_diffusers.py", "--rename", "<a>=<b>"),
        *("--out", "build/benchmarks/none"),
    ),
}
# Processes, as above, with the most seconds that one may take.
PROCESSES: dict[str, tuple[tuple[str, ...], float | None]] = {
    "main.py --help": (("main.py", "--help"), MOST),
    **{name: (words, MOST) for name, words in MISTAKES.items()},
    "main.py, a run of one step without previews": (
        (
            *("main.py", "--base", FINETUNE, "-t", "--max_steps", "1", "--gpus", "0"),
            "lightning.callbacks.image_logger.params.batch_frequency=0",
            "lightning.callbacks.summary_images=null",
        ),
        None,
    ),
}
BAR = 10.0  # percent, of previews


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=5, help="number of runs (default: %(default)s)")
    parser.add_argument("--steps", type=positive, help="steps of each run (default: the YAML's)")
    parser.add_argument("--recipe", help="recipe of configs/recipes (default: the finetuning YAML alone)")
    runs.add_options(parser)
    return guarded(lambda: overhead(parser.parse_args(argv)))


def overhead(options: argparse.Namespace) -> None:
    runs.set_up(options)
    report = Report(
        f"overhead_{options.recipe}" if options.recipe else "overhead",
        "Where the time of a run goes besides its steps: embedded model",
        ("part of a run, or a process", "seconds", "percent of everything else", "bar"),
        {
            "recipe": options.recipe or "none",
            "steps": options.steps or "of the YAML",
            "rounds": options.rounds,
        },
        notes=["Medians over the runs, with the quartiles."],
    )
    rounds, processes = Rounds([*PARTS, REST], warm_up=0), Rounds(list(PROCESSES), warm_up=1)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for _ in range(options.rounds):
            rounds.add(seconds(Path(folder), options))
        for _ in range(options.rounds + 1):
            processes.add(
                {
                    name: process(words, Path(folder), mistake=name in MISTAKES)
                    for name, (words, _) in PROCESSES.items()
                }
            )
    for name in (REST, *PARTS):
        percent = overhead_percent(rounds, name)
        bar = verdict(percent.median, BAR, at_most=True) if name == PREVIEWS else ""
        share = "" if name == REST else percent.text(1)
        report.rows.append((name, Quartiles.of(rounds.seconds[name]).text(2), share, bar))
    for name, (_, most) in PROCESSES.items():
        took = Quartiles.of(processes.seconds[name])
        bar = "" if most is None else verdict(took.median, most, at_most=True)
        report.rows.append((name, took.text(2), "", bar))
    report.data = {"seconds": rounds.seconds | processes.seconds}
    report.write(options.out)
    print(report.markdown())


def seconds(workdir: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of one run by its parts, from the start of `fit` to its last file."""
    steps = ("--max_steps", str(options.steps)) if options.steps else ()
    argv = EMBEDDED.argv(workdir, *steps, "--gpus", "0", recipe=options.recipe)
    run = runs.prepare([*argv, "lightning.trainer.enable_progress_bar=false"])
    spent = dict.fromkeys(PARTS, 0.0)
    clock = Clock(spent)
    for callback in run.trainer.callbacks:
        for name, kinds in PARTS.items():
            if isinstance(callback, kinds):
                clock.watch(callback, hooks_of(callback), name)
    for logger in run.trainer.loggers:
        clock.watch(logger, ("log_metrics", "log_hyperparams", "save", "finalize"), LOGGING)
    started = now()
    run.fit()
    return {**spent, REST: now() - started - sum(spent.values())}


def process(words: Sequence[str], folder: Path, mistake: bool = False) -> float:
    """Return the seconds of the process of a script, `words[0]`, from start to end; the bytecode of modules is kept.

    Raises:
        UserError: it did not end as expected: well, or for a mistake with a line that says so.
    """
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    command += ["-l", str(folder / "logs")] if "-t" in words else []
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    if (done.returncode != 0) != mistake or (mistake and "error:" not in said):
        raise UserError(f"{' '.join(words)[:80]} ended with code {done.returncode}: {shown(said, 120)}")
    return seconds


def hooks_of(callback: Callback) -> list[str]:
    """Return the names of the hooks that a callback has of its own."""
    names = [name for name in dir(callback) if name.startswith("on_")]
    return [name for name in names if getattr(type(callback), name) is not getattr(Callback, name, None)]


class Clock:
    """Adds the seconds of calls to `spent` by name; of a call within another one only the outer counts."""

    def __init__(self, spent: dict[str, float]) -> None:
        self.spent, self._busy = spent, False

    def watch(self, owner: Any, methods: Iterable[str], name: str) -> None:
        """From now on count the calls of these methods."""
        for method in methods:
            setattr(owner, method, partial(self._call, getattr(owner, method), name))

    def _call(self, method: Callable[..., Any], name: str, *arguments: Any, **keywords: Any) -> Any:
        if self._busy:
            return method(*arguments, **keywords)
        self._busy, started = True, now()
        try:
            return method(*arguments, **keywords)
        finally:
            self._busy = False
            self.spent[name] += now() - started


def overhead_percent(rounds: Rounds, name: str) -> Quartiles:
    """Return the time of a part in percent of everything else, over all runs."""
    pairs = zip(rounds.seconds[name], rounds.seconds[REST], strict=True)
    return Quartiles.of([100 * part / rest for part, rest in pairs])


if __name__ == "__main__":
    sys.exit(main())
