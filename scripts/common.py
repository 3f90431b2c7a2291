"""What the scripts that generate pictures have in common: their command line, and errors of one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ldm.console import Interrupted, Parser, positive, share
from ldm.util import UserError

# The embedded model and its judge, from the root of the checkout.
MODEL, JUDGE = Path("models/ldm/creatures"), Path("models/judge/creatures")


@dataclass(frozen=True)
class Profile:
    """What differs between the scripts that generate pictures: defaults, and how files are numbered."""

    prog: str = "txt2img.py"
    ckpt: str = str(MODEL / "model.safetensors")
    config: str | None = None
    outdir: str = "outputs/txt2img-samples"
    prompt: str = "a photo of a creature"
    steps: int = 50
    scale: float = 5.0
    n_iter: int = 1
    n_samples: int = 4
    precision: str = "full"
    digits: int = 4
    numbered_grids: bool = False


def guarded(command: Callable[[], object]) -> int:
    """Call a command; what the user can mend becomes one line on stderr and an exit code."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Interrupted as asked:
        return asked.exit_code
    except (MemoryError, RuntimeError) as error:
        from ldm.training.fitting import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(
            "error: out of memory; try fewer pictures at once (--n_samples, --batch_size), a smaller --H or --W, or "
            "--precision autocast",
            file=sys.stderr,
        )
        return 1
    return 0


def make_parser(profile: Profile, description: str) -> Parser:
    parser = Parser(
        prog=profile.prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--ckpt_path", "--ckpt", default=profile.ckpt, metavar="FILE", help="default: %(default)s"
    )
    own_config = profile.config or "config.yaml beside the model, or that of the published model it is"
    model.add_argument("--config", default=profile.config, metavar="YAML", help=f"default: {own_config}")
    model.add_argument(
        "--embedding_path",
        nargs="+",
        default=[],
        metavar="FILE",
        help="learned embeddings, any tool's format",
    )
    model.add_argument(
        "--precision", choices=("full", "autocast"), default=profile.precision, help="default: %(default)s"
    )

    what = parser.add_argument_group("what to draw")
    what.add_argument("--prompt", nargs="?", metavar="TEXT", help="default: a photo of what was learned")
    what.add_argument("--negative_prompt", default="", metavar="TEXT", help="what guidance leads away from")
    what.add_argument(
        "--from-file", metavar="FILE", help="a prompt on every line: one picture each and round"
    )
    what.add_argument(
        "--n_samples",
        type=positive,
        default=profile.n_samples,
        metavar="N",
        help="pictures at once, and of --prompt in a round (default: %(default)s)",
    )
    what.add_argument(
        "--n_iter", type=positive, default=profile.n_iter, metavar="N", help="rounds (default: %(default)s)"
    )
    what.add_argument("--H", type=positive, metavar="PIXELS", help="height (default: the model's own)")
    what.add_argument("--W", type=positive, metavar="PIXELS", help="width (default: the model's own)")

    how = parser.add_argument_group("how")
    how.add_argument(
        "--ddim_steps", type=positive, default=profile.steps, metavar="N", help="default: %(default)s"
    )
    sampler = how.add_mutually_exclusive_group()
    sampler.add_argument("--plms", action="store_true", help="PLMS rather than DDIM")
    sampler.add_argument("--dpm_solver", action="store_true", help="DPM-Solver++; 20 steps suffice")
    how.add_argument(
        "--ddim_eta", type=share, default=0.0, metavar="ETA", help="noise of DDIM, 0 (default) to 1"
    )
    how.add_argument("--scale", type=float, default=profile.scale, help="guidance (default: %(default)s)")
    how.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    how.add_argument("--fixed_code", action="store_true", help="every round starts from the same noise")

    out = parser.add_argument_group("files")
    out.add_argument("--outdir", default=profile.outdir, metavar="FOLDER", help="default: %(default)s")
    out.add_argument("--format", choices=("png", "jpg"), default="png", help="default: %(default)s, lossless")
    out.add_argument("--skip_save", action="store_true", help="no single pictures")
    out.add_argument("--skip_grid", action="store_true", help="no grid")
    out.add_argument(
        "--n_rows", type=positive, metavar="N", help="pictures in a row of the grid (default: n_samples)"
    )
    return parser
