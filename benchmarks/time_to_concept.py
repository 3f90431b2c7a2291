"""Training time until images with the word look like the concept: recipes `fast` and `paper`, on the embedded model.

    python -m benchmarks.time_to_concept            # continues where it was stopped
    python -m benchmarks.time_to_concept --jobs 2 --threads 1    # on two cores: takes half as long
    python -m benchmarks.time_to_concept --quick    # a test run; its figures mean nothing

The target of a concept is 90 percent of the identity that `paper` has at its end. A recipe reaches it at the first
waypoint where it and the next waypoint are at or above the target. The steps until then are the same in every run.
Their time is not, so runs that end there are timed each time, both recipes in turns. Every process trains a few steps
first that are not counted, so that neither recipe pays for imports; whole processes are compared by
`benchmarks.against_diffusers`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from benchmarks import runs, waypoints
from benchmarks.machine import ROOT
from benchmarks.report import Report, verdict
from benchmarks.rounds import now
from benchmarks.scores import Scorer, check_creatures, creatures
from ldm.checkpoint import load_model_from_config
from ldm.commands.base import JUDGE, guarded
from ldm.console import Parser, positive
from ldm.evaluation.concepts import read_concept
from ldm.evaluation.judge import AttributeJudge
from ldm.files import file_hash, images_fingerprint, write_text
from ldm.images import list_images

MODEL = ROOT / "models" / "ldm" / "creatures"
BASE = ROOT / "configs" / "latent-diffusion" / "txt2img-finetune.yaml"
RECIPES = ("paper", "fast")
SHARE, BAR, LEAST_CONCEPTS = 0.9, 10.0, 6
# Previews are off for both. The deterministic loss is off for `paper`, because the original did not have it.
OVERRIDES = {
    "paper": ("lightning.callbacks.deterministic_loss=null",),
    "fast": (),
}
QUIET = ("lightning.callbacks.image_logger.params.batch_frequency=0", "lightning.trainer.limit_val_batches=0")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--concepts", nargs="*", type=Path, help="concept folders (default: the sample creatures)"
    )
    parser.add_argument(
        "--paper_steps", type=positive, default=5000, help="maximum steps of `paper` (default: %(default)s)"
    )
    parser.add_argument(
        "--images", type=positive, default=16, help="images per identity (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=5, help="of timed runs of a concept (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one concept, 30 steps, 4 images, 1 round")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmarks" / "time_to_concept")
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="runs in parallel (default: %(default)s)"
    )
    runs.add_options(parser)
    return guarded(lambda: time_to_concept(parser.parse_args(argv)))


class Task(NamedTuple):
    """A run of one recipe on one concept, and the number of images to score it with."""

    concept: Path
    recipe: str
    paper_steps: int
    images: int
    folder: Path


def time_to_concept(options: argparse.Namespace) -> None:
    runs.set_up(options)
    concepts = options.concepts or creatures(ROOT / "data" / "concepts")
    check_creatures(concepts)
    steps, images, rounds = options.paper_steps, options.images, options.rounds
    if options.quick:
        concepts, steps, images, rounds = concepts[:1], 30, 4, 1
    settings: dict[str, Any] = {"model": file_hash(MODEL / "model.safetensors")[:12]}
    settings |= {
        "threads": torch.get_num_threads(),
        "jobs at once": options.jobs,
        "paper steps": steps,
        "images": images,
    }
    shown = {**settings, "rounds": rounds}
    report = Report(
        "time_to_concept_quick" if options.quick else "time_to_concept",
        "Seconds of training until a word looks like the concept",
        (
            "concept",
            "aim",
            "paper, steps",
            "fast, steps",
            "paper, s",
            "fast, s",
            "times as fast",
            "identity",
            "edits",
        ),
        shown,
    )
    tasks = []
    for concept in concepts:
        of_concept = {**settings, "concept": images_fingerprint(list_images(concept))}
        for recipe in RECIPES:
            folder = options.work / f"{concept.name}-{recipe}-{digest(recipe, of_concept)}"
            tasks.append(Task(concept, recipe, steps, images, folder))
    found: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), runs.set_up, (options,)) as pool:
        results = pool.map(result, tasks)
        pairs = [compared(paper, fast) for paper, fast in zip(results, results, strict=True)]
        jobs = [
            (concept, one["steps"], rounds, options.work)
            for concept, one in zip(concepts, pairs, strict=True)
        ]
        for concept, one, seconds in zip(concepts, pairs, pool.map(timed, jobs), strict=True):
            found[concept.name] = {**one, "timed": seconds}
            fill(report, found)
            report.write(options.out)
    print(report.markdown())


def result(task: Task) -> dict[str, Any]:
    """Train and score a run, or return the results of an earlier call."""
    train(task.concept, task.recipe, task.paper_steps, task.folder)
    return scored(scorer(task.images), task.concept, task.folder)


@cache
def scorer(images: int) -> Scorer:
    """Load the model and judge once per process."""
    model = load_model_from_config(MODEL / "config.yaml", MODEL / "model.safetensors")
    return Scorer(model, AttributeJudge.load(ROOT / JUDGE), images, max(2, images // 4))


def digest(recipe: str, settings: Mapping[str, Any]) -> str:
    yamls = [BASE, recipe_of(recipe), MODEL / "config.yaml"]
    files = [MODEL / "model.safetensors", ROOT / JUDGE / "model.safetensors"]
    return runs.fingerprint({**settings, "overrides": OVERRIDES[recipe]}, yamls, files)


def recipe_of(name: str) -> Path:
    return ROOT / "configs" / "recipes" / f"{name}.yaml"


def train(concept: Path, recipe: str, paper_steps: int, folder: Path) -> None:
    """Train a run with waypoints in `folder`, unless it has a finished one; an interrupted one is repeated."""
    if waypoints.read_waypoints(folder) is not None:
        return
    warm_up(folder.parent)
    print(f"{concept.name}: training with {recipe}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    run = prepared(concept, recipe, paper_steps, folder)
    run.trainer.callbacks.insert(0, waypoints.Waypoints(folder))
    run.fit()
    best = run.plan.run.checkpoints / "embeddings_best.pt"
    # The result of a recipe: its best vectors if it selects them, otherwise the last.
    last = folder / f"{run.trainer.global_step}.pt"
    shutil.copyfile(best if best.is_file() else last, folder / "result.pt")


def prepared(concept: Path, recipe: str, paper_steps: int, folder: Path, *changes: str) -> runs.PreparedRun:
    """A run of one recipe on one concept, ready to start; `changes` are further words of the command line."""
    truth = read_concept(concept)
    words = ["--base", str(BASE), str(recipe_of(recipe)), "-t"]
    words += [
        "-l",
        str(folder / "logs"),
        "--data_root",
        str(concept),
        "--init_word",
        truth.init_word or "creature",
    ]
    words += [*QUIET, *OVERRIDES[recipe], "--actual_resume", str(MODEL / "model.safetensors")]
    if recipe == "paper":
        words += ["--max_steps", str(paper_steps)]
    return runs.prepare([*words, *changes])


@cache
def warm_up(work: Path) -> None:
    """Train two steps once per process, so that its first run is no slower than the others."""
    folder = work / f"warm_up-{os.getpid()}"
    prepared(ROOT / "data" / "concepts" / "bobo", "fast", 2, folder, "--max_steps", "2").fit()
    shutil.rmtree(folder, ignore_errors=True)


def scored(scorer: Scorer, concept: Path, folder: Path) -> dict[str, Any]:
    """Score identity at every waypoint, and identity and edits of the result; `scores.json` caches the scores."""
    passed, path = waypoints.read_waypoints(folder), folder / "scores.json"
    kept: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    truth = read_concept(concept)

    def once(key: str, score: Any, vectors: Path) -> float:
        if key not in kept:
            kept[key] = score(vectors, truth)
            write_text(path, json.dumps(kept, indent=1))
        return kept[key]

    curve = [
        (step, seconds, once(str(step), scorer.identity, folder / f"{step}.pt"))
        for step, seconds in passed.items()
    ]
    result = folder / "result.pt"
    return {
        "curve": curve,
        "seconds": curve[-1][1],
        "identity": once("identity", scorer.identity, result),
        "edits": once("edits", scorer.editability, result),
    }


def reached(curve: Sequence[tuple[int, float, float]], aim: float) -> int | None:
    """Return the first waypoint (step, seconds, score) that, like the next, reaches `aim`, or None."""
    for here, there in zip(curve, [*curve[1:], curve[-1]], strict=True):
        if min(here[2], there[2]) >= aim:
            return here[0]
    return None


def compared(paper: Mapping[str, Any], fast: Mapping[str, Any]) -> dict[str, Any]:
    """Return the target, which `paper` sets at its end, and the steps in which each recipe reaches it."""
    aim = SHARE * paper["identity"]
    steps = {"paper": reached(paper["curve"], aim), "fast": reached(fast["curve"], aim)}
    return {"aim": aim, "steps": steps, "paper": paper, "fast": fast}


class EndsAt(Callback):
    """Ends a run after a step, and notes the seconds from the beginning of `fit` until then."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.seconds = step, math.inf
        self._began = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = now()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._end(trainer)

    def _end(self, trainer: pl.Trainer) -> None:
        if trainer.global_step == self.step:
            self.seconds = now() - self._began
            trainer.should_stop = True


def timed(job: tuple[Path, Mapping[str, int | None], int, Path]) -> dict[str, list[float]]:
    """Time both recipes until they reach the target, in turns: the seconds of each round; inf if one never does."""
    concept, steps, rounds, work = job
    warm_up(work)
    seconds: dict[str, list[float]] = {recipe: [] for recipe in RECIPES}
    for _ in range(rounds):
        for recipe in RECIPES:
            step = steps[recipe]
            if step is None:
                seconds[recipe].append(math.inf)
                continue
            folder = work / f"timed-{os.getpid()}"
            end = EndsAt(step)
            run = prepared(concept, recipe, step + 1, folder)  # the steps are for `paper`
            run.trainer.callbacks.insert(0, end)
            run.fit()
            seconds[recipe].append(end.seconds)
            shutil.rmtree(folder, ignore_errors=True)
    return seconds


def fill(report: Report, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Fill in the table and notes for the concepts measured so far."""
    factors = {name: factor(one["timed"]) for name, one in found.items()}
    report.rows = [
        (
            name,
            f"{one['aim']:.2f}",
            *("never" if one["steps"][key] is None else str(one["steps"][key]) for key in RECIPES),
            *(f"{median(one['timed'][key]):.2f}" for key in RECIPES),
            f"{factors[name]:.1f}",
            *(f"{one['paper'][key]:.2f} / {one['fast'][key]:.2f}" for key in ("identity", "edits")),
        )
        for name, one in found.items()
    ]
    overall = median(factors.values())
    lasts = {recipe: median(one[recipe]["seconds"] for one in found.values()) for recipe in RECIPES}
    edits = {recipe: mean(one[recipe]["edits"] for one in found.values()) for recipe in RECIPES}
    report.notes = [
        f"Median: `fast` reaches the aim {overall:.1f} times as fast as `paper`; {verdict(overall, BAR)}. "
        "Seconds are medians of runs in turns, and the factor of a concept that of its rounds.",
        f"`fast` ends after {lasts['fast']:.1f} s, `paper` after {lasts['paper']:.1f} s (medians of runs at different "
        f"times): {lasts['paper'] / lasts['fast']:.0f} times as long.",
        f"Edits obeyed with the creature still itself: `paper` {edits['paper']:.2f}, `fast` {edits['fast']:.2f} "
        "(means of the results).",
        "The last two columns are `paper` / `fast`. Training time only, without previews and evaluation.",
        f"{len(found)} concepts" + (f", fewer than {LEAST_CONCEPTS}" if len(found) < LEAST_CONCEPTS else ""),
    ]
    report.data = {"concepts": found}


def factor(seconds: Mapping[str, Sequence[float]]) -> float:
    """Return how many times as fast `fast` is, the median of the rounds; 0 if it never reaches the target."""
    if math.isinf(max(seconds["fast"])):
        return 0.0
    return median(paper / fast for paper, fast in zip(seconds["paper"], seconds["fast"], strict=True))


if __name__ == "__main__":
    sys.exit(main())
