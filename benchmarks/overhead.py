"""What previews and the deterministic loss cost a run on the embedded model, in percent of the rest of it.

    python benchmarks/overhead.py

Each is the time that a whole run spends in its callbacks, against the time that it spends in everything else but
these: the difference of two runs would drown in the machine's ups and downs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from pytorch_lightning.callbacks import Callback  # noqa: E402

from benchmarks import runs  # noqa: E402
from benchmarks.pairs import Rounds, Spread  # noqa: E402
from benchmarks.report import Report, verdict  # noqa: E402
from benchmarks.subjects import EMBEDDED  # noqa: E402
from benchmarks.turns import now  # noqa: E402
from ldm.commands.base import guarded  # noqa: E402
from ldm.console import Parser  # noqa: E402
from ldm.training.callbacks.fixed_loss import DeterministicLoss  # noqa: E402
from ldm.training.callbacks.image_logger import ImageLogger  # noqa: E402
from ldm.training.callbacks.summary_images import SummaryImages  # noqa: E402

PREVIEWS, LOSS, REST = "previews, with the pictures at the end", "deterministic loss", "everything else"
PARTS: dict[str, tuple[type[Callback], ...]] = {
    PREVIEWS: (ImageLogger, SummaryImages),
    LOSS: (DeterministicLoss,),
}
# It must not end the run early.
NO_STOP = "lightning.callbacks.deterministic_loss.params.stop=null"
BAR = 10.0  # percent, of previews


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs (%(default)s)")
    parser.add_argument(
        "--steps", type=int, default=400, help="of each run (%(default)s, as the YAML has it)"
    )
    parser.add_argument("--recipe", default="fast", help="of configs/recipes (%(default)s)")
    runs.add_options(parser)
    return guarded(lambda: overhead(parser.parse_args(argv)))


def overhead(options: argparse.Namespace) -> None:
    runs.begin(options)
    report = Report(
        "overhead",
        "What previews and the deterministic loss cost: embedded model",
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
        said = "" if name == REST else percent.text(1)
        report.rows.append((name, Spread.of(rounds.seconds[name]).text(1), said, bar))
    report.data = {"seconds": rounds.seconds}
    report.write(options.out)
    print(report.markdown())


def seconds(workdir: Path, options: argparse.Namespace) -> dict[str, float]:
    """Of one run by its parts, from the first thing it fits to its last file."""
    argv = EMBEDDED.argv(
        workdir, NO_STOP, "--max_steps", str(options.steps), "--gpus", "0", recipe=options.recipe
    )
    run = runs.prepare([*argv, "lightning.trainer.enable_progress_bar=false"])
    spent = dict.fromkeys(PARTS, 0.0)
    for callback in run.trainer.callbacks:
        for name, kinds in PARTS.items():
            if isinstance(callback, kinds):
                clock(callback, partial(add, spent, name))
    begun = now()
    run.fit()
    return {**spent, REST: now() - begun - sum(spent.values())}


def add(spent: dict[str, float], name: str, some: float) -> None:
    spent[name] += some


def clock(callback: Callback, done: Callable[[float], None]) -> None:
    """From here on tell `done` the seconds of each call of one of the callback's own hooks."""
    for name in dir(callback):
        if name.startswith("on_") and getattr(type(callback), name) is not getattr(Callback, name, None):
            setattr(callback, name, partial(_timed, getattr(callback, name), done))


def _timed(hook: Callable[..., Any], done: Callable[[float], None], *arguments: Any, **keywords: Any) -> Any:
    begun = now()
    try:
        return hook(*arguments, **keywords)
    finally:
        done(now() - begun)


def overhead_percent(rounds: Rounds, name: str) -> Spread:
    """How many percent of everything else a part takes, in each run."""
    pairs = zip(rounds.seconds[name], rounds.seconds[REST], strict=True)
    return Spread.of([100 * part / rest for part, rest in pairs])


if __name__ == "__main__":
    sys.exit(main())
