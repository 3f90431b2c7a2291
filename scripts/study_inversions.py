"""Invert many held-out creatures and two held-out styles, and measure what came of it.

    python scripts/study_inversions.py all --creatures 2 --seeds 1 --steps 20 --samples 2 --edit_samples 1   # to try
    python scripts/study_inversions.py invert       # hours: goes on where it stopped
    python scripts/study_inversions.py measure      # likewise
    python scripts/study_inversions.py report       # study.json, study.md and study.png

Every inversion runs main.py as a person would. Each is written when it is done, so that a study may be stopped at
any time, Ctrl-C included, and spread over days: the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    import checkout  # noqa: F401

from ldm.commands.base import WEIGHTS, check_files, guarded
from ldm.commands.evaluate import add_sampling_options
from ldm.console import Parser, positive
from ldm.util import UsageError

PHASES = ("invert", "measure", "report", "all")


def make_parser() -> Parser:
    parser = Parser(
        prog="study_inversions.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--out", type=Path, default=Path("outputs/study"), help="default: %(default)s")
    what = parser.add_argument_group("what is inverted")
    what.add_argument("--creatures", type=positive, default=20, metavar="N", help="default: %(default)s")
    what.add_argument(
        "--seeds", type=positive, default=3, metavar="N", help="runs of each (default: %(default)s)"
    )
    what.add_argument("--vectors", type=positive, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    what.add_argument("--no_styles", action="store_true", help="creatures alone")
    learning = parser.add_argument_group("how it is inverted")
    learning.add_argument(
        "--ckpt_path", "--ckpt", default=WEIGHTS, metavar="FILE", help="default: %(default)s"
    )
    learning.add_argument("--config", metavar="YAML", help="of the model (default: config.yaml beside it)")
    learning.add_argument(
        "--recipe", nargs="+", default=[], metavar="YAML", help="laid over the finetuning YAML"
    )
    learning.add_argument("--steps", type=positive, metavar="N", help="default: the YAML's")
    learning.add_argument("--rate", type=float, metavar="RATE", help="of one vector (default: the YAML's)")
    learning.add_argument(
        "--rate_of_several",
        type=float,
        default=1e-2,
        metavar="RATE",
        help="of more than one (default: %(default)s)",
    )
    learning.add_argument(
        "--captions",
        action="store_true",
        help="say where the creature is, or what is seen in the style, rather than use the templates",
    )
    learning.add_argument(
        "--override",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="more for main.py, as model.params.use_ema=false",
    )
    learning.add_argument(
        "--take",
        default="embeddings.pt",
        metavar="FILE",
        help="of a run's checkpoints (default: %(default)s)",
    )
    learning.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="at once (default: %(default)s)"
    )
    learning.add_argument(
        "--threads", type=positive, default=1, metavar="N", help="of each (default: %(default)s)"
    )
    add_sampling_options(parser, samples=12, steps=25, scale=3.0)
    parser.add_argument(
        "--edit_samples",
        type=positive,
        default=4,
        metavar="N",
        help="per edit and style (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, after one line on stderr if it failed."""
    return guarded(lambda: run(make_parser().parse_args(argv)))


def run(options: argparse.Namespace) -> None:
    """Check the command line, then go through the phases that were asked for."""
    check_files(options.ckpt_path, options.config, *options.recipe)
    for override in options.override:
        if "=" not in override:
            raise UsageError(f"--override '{override}' is no KEY=VALUE")
    # what only one phase needs comes with it
    from ldm import console

    console.set_up_logging()
    if options.phase in ("invert", "all"):
        from scripts.study_invert import invert

        invert(options)
    if options.phase in ("measure", "all"):
        from scripts.study_measure import measure

        measure(options)
    if options.phase in ("report", "all"):
        from scripts.study_report import report

        report(options)


if __name__ == "__main__":
    sys.exit(main())
