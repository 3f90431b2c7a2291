"""The time that previews and the deterministic loss add to a run on the embedded model, in percent of the rest.

    python -m benchmarks.overhead

It is the time that a run spends in these callbacks, divided by the time of everything else in the same run: the
difference of two runs would be smaller than the machine's variation.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Callback

from benchmarks import runs
from benchmarks.report import Report, verdict
from benchmarks.rounds import Quartiles, Rounds, now
from benchmarks.subjects import EMBEDDED
from ldm.commands.base import guarded
from ldm.console import Parser, positive
from ldm.training.callbacks.fixed_loss import DeterministicLoss
from ldm.training.callbacks.image_logger import ImageLogger
from ldm.training.callbacks.summary_images import SummaryImages

PREVIEWS, LOSS, REST = "previews, with the images at the end", "deterministic loss", "everything else"
PARTS: dict[str, tuple[type[Callback], ...]] = {
    PREVIEWS: (ImageLogger, SummaryImages),
    LOSS: (DeterministicLoss,),
}
# The run must not end early.
NO_STOP = "lightning.callbacks.deterministic_loss.params.stop=null"
BAR = 10.0  # percent, of previews


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=5, help="number of runs (default: %(default)s)")
    parser.add_argument(
        "--steps", type=positive, default=400, help="steps of each run (default: %(default)s, as in the YAML)"
    )
    parser.add_argument("--recipe", default="fast", help="recipe of configs/recipes (default: %(default)s)")
    runs.add_options(parser)
    return guarded(lambda: overhead(parser.parse_args(argv)))


def overhead(options: argparse.Namespace) -> None:
    runs.set_up(options)
    report = Report(
        "overhead",
        "Time that previews and the deterministic loss add: embedded model",
        ("part of a run", "seconds", "percent of everything else", "bar"),
        {"recipe": options.recipe, "steps": options.steps, "rounds": options.rounds},
        notes=["Medians over the runs, with the quartiles."],
    )
    rounds = Rounds([*PARTS, REST], warm_up=0)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for _ in range(options.rounds):
            rounds.add(seconds(Path(folder), options))
    for name in (REST, *PARTS):
        percent = overhead_percent(rounds, name)
        bar = verdict(percent.median, BAR, at_most=True) if name == PREVIEWS else ""
        share = "" if name == REST else percent.text(1)
        report.rows.append((name, Quartiles.of(rounds.seconds[name]).text(1), share, bar))
    report.data = {"seconds": rounds.seconds}
    report.write(options.out)
    print(report.markdown())


def seconds(workdir: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of one run by its parts, from the start of `fit` to its last file."""
    argv = EMBEDDED.argv(
        workdir, NO_STOP, "--max_steps", str(options.steps), "--gpus", "0", recipe=options.recipe
    )
    run = runs.prepare([*argv, "lightning.trainer.enable_progress_bar=false"])
    spent = dict.fromkeys(PARTS, 0.0)
    for callback in run.trainer.callbacks:
        for name, kinds in PARTS.items():
            if isinstance(callback, kinds):
                clock(callback, partial(add, spent, name))
    started = now()
    run.fit()
    return {**spent, REST: now() - started - sum(spent.values())}


def add(spent: dict[str, float], name: str, some: float) -> None:
    spent[name] += some


def clock(callback: Callback, done: Callable[[float], None]) -> None:
    """From now on call `done` with the seconds of each call of one of the callback's hooks."""
    for name in dir(callback):
        if name.startswith("on_") and getattr(type(callback), name) is not getattr(Callback, name, None):
            setattr(callback, name, partial(_timed, getattr(callback, name), done))


def _timed(hook: Callable[..., Any], done: Callable[[float], None], *arguments: Any, **keywords: Any) -> Any:
    started = now()
    try:
        return hook(*arguments, **keywords)
    finally:
        done(now() - started)


def overhead_percent(rounds: Rounds, name: str) -> Quartiles:
    """Return the time of a part in percent of everything else, over all runs."""
    pairs = zip(rounds.seconds[name], rounds.seconds[REST], strict=True)
    return Quartiles.of([100 * part / rest for part, rest in pairs])


if __name__ == "__main__":
    sys.exit(main())
