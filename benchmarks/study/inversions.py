"""Learn many held-out creatures and two held-out styles, and measure the results.

    python -m benchmarks.study.inversions all --creatures 2 --seeds 1 --steps 20 --samples 2 --edit_samples 1   # to try
    python -m benchmarks.study.inversions invert       # takes hours; continues where it was stopped
    python -m benchmarks.study.inversions measure      # continues likewise
    python -m benchmarks.study.inversions report       # writes study.json, study.md and study.png

Every inversion is a run of main.py. Results are written after each one, so a study can be interrupted at any time; the
same command continues it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.commands.base import WEIGHTS, check_files, guarded
from ldm.commands.evaluate import add_sampling_options
from ldm.console import Parser, positive
from ldm.util import UsageError

PHASES = ("invert", "measure", "report", "all")


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks.study.inversions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--out", type=Path, default=Path("outputs/study"), help="default: %(default)s")
    what = parser.add_argument_group("what is inverted")
    what.add_argument("--creatures", type=positive, default=20, metavar="N", help="default: %(default)s")
    what.add_argument(
        "--seeds", type=positive, default=3, metavar="N", help="runs per concept (default: %(default)s)"
    )
    what.add_argument("--vectors", type=positive, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    what.add_argument("--no_styles", action="store_true", help="creatures only")
    learning = parser.add_argument_group("how it is inverted")
    learning.add_argument(
        "--ckpt_path", "--ckpt", default=WEIGHTS, metavar="FILE", help="default: %(default)s"
    )
    learning.add_argument("--config", metavar="YAML", help="of the model (default: config.yaml beside it)")
    learning.add_argument(
        "--recipe", nargs="+", default=[], metavar="YAML", help="YAMLs merged over the finetuning YAML"
    )
    learning.add_argument("--steps", type=positive, metavar="N", help="default: the YAML's")
    learning.add_argument(
        "--rate", type=float, metavar="RATE", help="rate of one vector (default: the YAML's)"
    )
    learning.add_argument(
        "--rate_of_several",
        type=float,
        default=1e-2,
        metavar="RATE",
        help="learning rate of several vectors (default: %(default)s)",
    )
    learning.add_argument(
        "--captions",
        action="store_true",
        help="use captions with the background, or the content of a style's images, instead of templates",
    )
    learning.add_argument(
        "--override",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="further overrides for main.py, such as model.params.use_ema=false",
    )
    learning.add_argument(
        "--take",
        default="embeddings.pt",
        metavar="FILE",
        help="which embedding file of a run to use (default: %(default)s)",
    )
    learning.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="runs in parallel (default: %(default)s)"
    )
    learning.add_argument(
        "--threads", type=positive, default=1, metavar="N", help="threads per run (default: %(default)s)"
    )
    add_sampling_options(parser, samples=12, steps=25, scale=3.0)
    parser.add_argument(
        "--edit_samples",
        type=positive,
        default=4,
        metavar="N",
        help="images per edit and style (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, after one line on stderr if it failed."""
    return guarded(lambda: run(make_parser().parse_args(argv)))


def run(options: argparse.Namespace) -> None:
    """Check the options, then run the selected phases."""
    check_files(options.ckpt_path, options.config, *options.recipe)
    for override in options.override:
        if "=" not in override:
            raise UsageError(f"--override '{override}' is not KEY=VALUE")
    # each phase imports only what it needs
    from ldm import console

    console.set_up_logging()
    console.quieten_lightning()
    if options.phase in ("invert", "all"):
        from benchmarks.study.invert import invert

        invert(options)
    if options.phase in ("measure", "all"):
        from benchmarks.study.measure import measure

        measure(options)
    if options.phase in ("report", "all"):
        from benchmarks.study.report import report

        report(options)


if __name__ == "__main__":
    sys.exit(main())
