"""The time of a training step: ours, the original's arithmetic, and a loop like diffusers'.

    python -m benchmarks.step_time embedded
    python -m benchmarks.step_time sd-v1
    python -m benchmarks.step_time sd-v1 --device cuda --size 512

Ours is a complete run with its callbacks, except previews and the deterministic loss, which overhead.py measures.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import runs
from benchmarks.loops import DiffusersLoop, OriginalLoop, batches, twin
from benchmarks.report import Report, verdict
from benchmarks.rounds import OURS, Quartiles, Rounds, Turns
from benchmarks.subjects import EMBEDDED, TimedModel, stable_diffusion
from ldm.commands.base import guarded
from ldm.console import Parser, positive
from ldm.interop import diffusers_pipeline

# The trainer's name of each precision.
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed"}
QUIET = (
    "lightning.callbacks.image_logger.params.batch_frequency=0",
    "lightning.callbacks.deterministic_loss=null",
    # It would reset the peak memory at each epoch.
    "lightning.callbacks.cuda_callback=null",
    "lightning.trainer.enable_progress_bar=false",
)
RATE = 5e-3
ORIGINAL, DIFFUSERS = "original arithmetic, float32", "as diffusers, {}"
# The other loop, our precision, and the bar for how many times as long its step takes.
COMPARISONS = (
    ("original", "bfloat16", 3.0),
    ("original", "float32", None),
    ("diffusers", "float32", 1.6),
    ("diffusers", "bfloat16", 1.6),
)
MEMORY_BAR = 6.0  # GB


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=("embedded", "sd-v1"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--size", type=positive, default=256, help="image side of sd-v1 (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=positive, help="steps of each loop (default: 100 for embedded, 8 for sd-v1)"
    )
    parser.add_argument(
        "--warm_up", type=int, default=2, help="first rounds, which are not counted (default: %(default)s)"
    )
    runs.add_options(parser)
    return guarded(lambda: step_time(parser.parse_args(argv)))


def step_time(options: argparse.Namespace) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing is measured")
        return
    runs.set_up(options)
    rounds = options.rounds or (100 if options.subject == "embedded" else 8)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        workdir = Path(folder)
        subject = EMBEDDED if options.subject == "embedded" else stable_diffusion(options.size, workdir)
        bench = Bench(subject, workdir, torch.device(options.device), rounds, options.warm_up)
        report = new_report(options, bench)
        if options.device == "cuda":
            add_memory(report, bench.peak_memory())
        for kind, precision, bar in COMPARISONS:
            add_rows(report, bench.compare(kind, precision), precision, bar)
            report.write(options.out)
    print("\n".join(report.markdown().splitlines()))


class Bench:
    """A model with fixed weights, from which every comparison starts."""

    def __init__(
        self, subject: TimedModel, workdir: Path, device: torch.device, rounds: int, warm_up: int
    ) -> None:
        self.subject, self.workdir, self.device = subject, workdir, device
        self.rounds, self.warm_up = rounds, warm_up
        # In float32 on the CPU; never trained.
        self.weights: nn.Module | None = None

    def compare(self, kind: str, precision: str) -> Rounds:
        """Time ours in turns with the "original", or with a loop like "diffusers"' in the same precision."""
        run = self.run(precision)
        data, size = run.data.datasets["train"], run.data.batch_size
        images = batches(data, size, self.device)
        other: Callable[[], object]
        if kind == "original":
            name, other = ORIGINAL, OriginalLoop(self.weights, images, self.device, RATE)
        else:
            name = DIFFUSERS.format(precision)
            other = as_diffusers(self.weights, run.plan.config, images, self.device, precision)
        turns = Turns({name: other}, self.warm_up)
        run.trainer.callbacks.append(turns)
        run.fit()
        return turns.rounds

    def peak_memory(self) -> dict[str, float]:
        """Return the peak GPU memory, in bytes, of the steps of a run of ours in bfloat16."""
        self.run("bfloat16").fit()  # it counts anew once the images are encoded
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}

    def run(self, precision: str) -> runs.PreparedRun:
        gc.collect()
        words = self.subject.argv(
            self.workdir,
            *QUIET,
            f"lightning.trainer.precision={PRECISIONS[precision]}",
            f"lightning.trainer.max_steps={self.warm_up + self.rounds}",
            "--gpus",
            "0," if self.device.type == "cuda" else "0",
        )
        return runs.prepare(words, self._make)

    def _make(self, config: Any) -> nn.Module:
        if self.weights is None:
            self.weights = self.subject.make(config)
        return twin(self.weights)


def as_diffusers(model: Any, config: Any, images: Any, device: torch.device, precision: str) -> DiffusersLoop:
    """Make the loop like diffusers' from our model; its word starts from the first vector of ours."""
    pipeline = diffusers_pipeline.to_pipeline(model, config)
    tokenizer = model.cond_stage_model.prompt_tokenizer
    (word, rows), *_ = model.embedding_manager.export().items()
    new = {word: model.cond_stage_model.token_embedding.num_embeddings}
    return DiffusersLoop(
        pipeline, lambda texts: tokenizer.encode(texts, new), rows[0], images, device, precision, RATE
    )


def new_report(options: argparse.Namespace, bench: Bench) -> Report:
    suffix = f"_{options.device}" if options.device != "cpu" else ""
    return Report(
        f"step_time_{options.subject.replace('-', '_')}{suffix}",
        f"Time of a training step: {bench.subject.title}, on the {options.device.upper()}",
        ("loop", "ms a step", "times ours", "bar"),
        {"recipe": "fast", "rounds": bench.rounds, "warm-up": bench.warm_up},
        notes=["Medians, with the quartiles; the factors are of steps taken in turns with ours."],
    )


def add_rows(report: Report, rounds: Rounds, precision: str, bar: float | None) -> None:
    """Add ours in this precision, and the loop that took turns with it."""
    (other,) = [name for name in rounds.seconds if name != OURS]
    for name in (OURS, other):
        milliseconds = Quartiles.of([1000 * s for s in rounds.seconds[name]])
        factor = rounds.ratio(name, OURS)
        title = f"ours, {precision}" if name == OURS else name
        judged = verdict(factor.median, bar) if bar else ""
        compared = ("1", "") if name == OURS else (factor.text(), judged)
        report.rows.append((title, milliseconds.text(1), *compared))
    report.data[f"{other} | ours, {precision}"] = {"seconds": rounds.seconds, "bar": bar}


def add_memory(report: Report, peak: Mapping[str, float]) -> None:
    gigabytes = {name: value / 1e9 for name, value in peak.items()}
    judged = verdict(gigabytes["allocated"], MEMORY_BAR, at_most=True)
    report.notes.append(
        f"Peak memory of the steps of a run of ours in bfloat16: {gigabytes['allocated']:.2f} GB allocated, "
        f"{gigabytes['reserved']:.2f} GB reserved; {judged}"
    )
    report.data["peak memory"] = dict(peak)


if __name__ == "__main__":
    sys.exit(main())
