"""What previews and the deterministic loss cost a run on the embedded model, in percent of its time.

    python benchmarks/overhead.py

Whole runs take turns: without either, with previews, with the deterministic loss.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from benchmarks import runs  # noqa: E402
from benchmarks.pairs import Rounds, Spread  # noqa: E402
from benchmarks.report import Report, verdict  # noqa: E402
from benchmarks.subjects import EMBEDDED  # noqa: E402
from benchmarks.turns import now  # noqa: E402
from ldm.options import Parser  # noqa: E402
from scripts.common import guarded  # noqa: E402

BARE, PREVIEWS, LOSS = "without either", "previews", "deterministic loss"
NO_PREVIEWS = "lightning.callbacks.image_logger.params.batch_frequency=0"
NO_LOSS = "lightning.callbacks.deterministic_loss=null"
# It must not end the run early.
NO_STOP = "lightning.callbacks.deterministic_loss.params.stop=null"
VARIANTS = {BARE: (NO_PREVIEWS, NO_LOSS), PREVIEWS: (NO_LOSS,), LOSS: (NO_PREVIEWS, NO_STOP)}
BAR = 10.0  # percent, of previews


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each kind (%(default)s)")
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
        ("run", "seconds", "overhead, percent", "bar"),
        {"recipe": options.recipe, "steps": options.steps, "rounds": options.rounds},
        notes=["Medians of whole runs that took turns, with the quartiles."],
    )
    rounds = Rounds(list(VARIANTS), warm_up=0)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for _ in range(options.rounds):
            rounds.add({name: seconds(Path(folder), options, words) for name, words in VARIANTS.items()})
    for name in VARIANTS:
        percent = overhead_percent(rounds, name)
        said = ("0", "") if name == BARE else (percent.text(1), "")
        if name == PREVIEWS:
            said = (said[0], verdict(percent.median, BAR, at_most=True))
        report.rows.append((name, Spread.of(rounds.seconds[name]).text(1), *said))
    report.data = {"seconds": rounds.seconds}
    report.write(options.out)
    print(report.markdown())


def seconds(workdir: Path, options: argparse.Namespace, words: Sequence[str]) -> float:
    """Of one run from the first thing it fits to its last file."""
    argv = EMBEDDED.argv(
        workdir, *words, "--max_steps", str(options.steps), "--gpus", "0", recipe=options.recipe
    )
    run = runs.prepare([*argv, "lightning.trainer.enable_progress_bar=false"])
    begun = now()
    run.fit()
    return now() - begun


def overhead_percent(rounds: Rounds, name: str) -> Spread:
    """By how many percent runs of a kind took longer than the bare one of their round."""
    pairs = zip(rounds.seconds[name], rounds.seconds[BARE], strict=True)
    return Spread.of([100 * (with_it / bare - 1) for with_it, bare in pairs])


if __name__ == "__main__":
    sys.exit(main())
