"""What torch.compile costs and saves within a run: runs of main.py without it, with it, and with what it kept.

    python -m benchmarks.compiled
    python -m benchmarks.compiled --device cuda
    python -m benchmarks.compiled --device cuda --subject sd-v1 --size 512

The runs of a round are processes of their own that follow each other: plain, compiled with an empty cache, compiled
with the cache that this left, and on a GPU also recorded as a CUDA graph. A run's beginning is the time to the end of
its first epoch, in which everything is compiled; its step is the median of those after. The steps from which a compiled
run ends sooner follow from both.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from benchmarks import runs
from benchmarks.report import Report
from benchmarks.rounds import Quartiles, Rounds, now
from benchmarks.subjects import EMBEDDED, TimedModel, stable_diffusion
from ldm.commands.base import guarded
from ldm.console import Parser, positive
from ldm.training.callbacks.performance import CACHE_VARIABLE
from ldm.util import UserError

PLAIN, EMPTY, KEPT = "plain", "compiled, nothing kept", "compiled, with what was kept"
GRAPH = "CUDA graph"
COMPILED = ("lightning.callbacks.compiled.params.least_steps=0",)
SETTINGS = {
    PLAIN: (),
    EMPTY: COMPILED,
    KEPT: COMPILED,
    GRAPH: (*COMPILED, "lightning.callbacks.compiled.params.graph=true"),
}
WITHOUT = (
    "lightning.callbacks.image_logger.params.batch_frequency=0",
    "lightning.callbacks.summary_images=null",
    # Short epochs, because a beginning is one.
    "data.params.train.params.repeats=7",
)


Seconds = Mapping[str, Sequence[float]]


class Steps(Callback):
    """Notes when each step has ended, in seconds since the run began."""

    def __init__(self) -> None:
        self.ended: list[float] = []
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = now()

    def on_train_batch_end(self, *_: Any) -> None:
        self.ended.append(now() - self._began)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=("embedded", "sd-v1"), default="embedded")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--size", type=positive, default=512, help="image side of sd-v1 (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=positive, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=positive, default=150, help="of each run (default: %(default)s)")
    runs.add_options(parser)
    return guarded(lambda: compare(parser.parse_args(argv)))


def compare(options: argparse.Namespace) -> None:
    """Measure, and write the table."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing is measured")
        return
    runs.set_up(options)
    names = tuple(SETTINGS) if options.device == "cuda" else (PLAIN, EMPTY, KEPT)
    begins, steps = Rounds(names, warm_up=0), Rounds(names, warm_up=0)
    first = 0
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            found = {}
            for name in names:
                found[name] = in_a_process(Path(folder), name, options)
                print(
                    f"round {number + 1}, {name}: {found[name][0]:.1f} s, {found[name][1]:.4f} s a step",
                    flush=True,
                )
        first = found[PLAIN][2]
        begins.add({name: begin for name, (begin, _, _) in found.items()})
        steps.add({name: step for name, (_, step, _) in found.items()})
        report = new_report(options, first, begins, steps)
        report.write(options.out)
    print(report.markdown())


def new_report(options: argparse.Namespace, first: int, begins: Rounds, steps: Rounds) -> Report:
    """The table of the rounds so far; first: the steps of a beginning."""
    sd = options.subject == "sd-v1"
    title = (
        f"SD v1, random weights, {options.size} x {options.size}, batch 1"
        if sd
        else "embedded model, batch 8"
    )
    report = Report(
        "compiled" + "_sd_v1" * sd + "_cuda" * (options.device == "cuda"),
        f"What torch.compile costs and saves within a run: {title}, on the {options.device.upper()}",
        ("run", "beginning, s", "step, s", "step, of the plain run's", "sooner from"),
        {"rounds": options.rounds, "steps": options.steps, "steps of a beginning": first},
        notes=["Medians over the rounds, with the quartiles of the ratios."],
    )
    for name in begins.seconds:
        ratio = steps.ratio(name, PLAIN)
        report.rows.append(
            (
                name,
                f"{Quartiles.of(begins.seconds[name]).median:.1f}",
                f"{Quartiles.of(steps.seconds[name]).median:.4f}",
                "" if name == PLAIN else ratio.text(2),
                "" if name == PLAIN else sooner_from(first, begins.seconds, steps.seconds, name),
            )
        )
    report.data = {"beginnings": begins.seconds, "steps": steps.seconds}
    return report


def sooner_from(first: int, begins: Seconds, steps: Seconds, name: str) -> str:
    """The number of steps from which runs are shorter than plain ones, by the medians, as text.

    first: the steps of a beginning.
    """
    cost = Quartiles.of([a - b for a, b in zip(begins[name], begins[PLAIN], strict=True)]).median
    gain = Quartiles.of([b - a for a, b in zip(steps[name], steps[PLAIN], strict=True)]).median
    return f"{max(first + cost / gain, 0):,.0f} steps" if gain > 0 else "never"


def in_a_process(folder: Path, name: str, options: argparse.Namespace) -> tuple[float, float, int]:
    """The seconds of a run's beginning and of one of its later steps, and how many steps the beginning has."""
    os.environ[CACHE_VARIABLE] = str(folder / "kept")
    with ProcessPoolExecutor(1, get_context("spawn"), runs.set_up, (options,)) as pool:
        return pool.submit(timed, folder, name, options).result()


def timed(folder: Path, name: str, options: argparse.Namespace) -> tuple[float, float, int]:
    """Run main.py's training here; see `in_a_process`, which does it in a process of its own."""
    clock = Steps()
    subject = subject_of(options, folder)
    words = ["--max_steps", str(options.steps), "--gpus", "0," if options.device == "cuda" else "0"]
    run = runs.prepare(
        subject.argv(folder, *words, *WITHOUT, *SETTINGS[name], recipe=None), subject.make, callbacks=[clock]
    )
    run.fit()
    # The last batch of an epoch may be smaller, and is then compiled too.
    first = int(run.trainer.num_training_batches)
    if len(clock.ended) < 2 * first:
        raise UserError(f"--steps is {options.steps}; an epoch has {first}, give at least twice as many")
    return clock.ended[first - 1], float(np.median(np.diff(clock.ended[first - 1 :]))), first


def subject_of(options: argparse.Namespace, folder: Path) -> TimedModel:
    return EMBEDDED if options.subject == "embedded" else stable_diffusion(options.size, folder)


if __name__ == "__main__":
    sys.exit(main())
