"""What the scripts that judge pictures have in common: their options, and what these come to."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.console import positive
from ldm.util import UserError
from scripts.common import JUDGE

NONE = "none"


def add_how(parser: argparse.ArgumentParser, samples: int, steps: int, scale: float) -> None:
    """Options of generating and of judging, with a script's own defaults."""
    how = parser.add_argument_group("generating")
    how.add_argument(
        "--samples", type=positive, default=samples, metavar="N", help="per prompt (default: %(default)s)"
    )
    how.add_argument("--ddim_steps", type=positive, default=steps, metavar="N", help="default: %(default)s")
    how.add_argument("--scale", type=float, default=scale, help="guidance (default: %(default)s)")
    how.add_argument("--dpm_solver", action="store_true", help="DPM-Solver++ rather than DDIM")
    how.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    how.add_argument("--batch_size", type=positive, default=8, metavar="N", help="default: %(default)s")
    how.add_argument("--precision", choices=("full", "autocast"), default="full", help="default: %(default)s")
    judging = parser.add_argument_group("judging")
    judging.add_argument(
        "--features",
        nargs="+",
        metavar="NAME",
        help="CLIP or DINO, folders or hub names (default: the folder towers beside the model, if there)",
    )
    judging.add_argument(
        "--judge", metavar="FOLDER", help=f"reads attributes; or {NONE} (default: {JUDGE}, if there)"
    )


def check_files(*paths: str | None) -> None:
    """Raise UserError for a file that was named and is not there."""
    for path in filter(None, paths):
        if not Path(path).is_file():
            raise UserError(f"'{path}' does not exist; check the path")


def sampling_of(options: argparse.Namespace) -> Any:
    """The `Sampling` that the options describe, checked."""
    from ldm.evaluation.evaluate import Sampling

    return Sampling(
        steps=options.ddim_steps,
        scale=options.scale,
        sampler="dpm_solver" if options.dpm_solver else "ddim",
        seed=options.seed,
        batch_size=options.batch_size,
        precision=options.precision,
    )


def features_of(options: argparse.Namespace) -> list[str]:
    """Where features come from: as named, else the towers beside the model; checked, not loaded."""
    from ldm.models.features import check_features

    towers = Path(options.ckpt_path).with_name("towers")
    sources = list(options.features or ([str(towers)] if towers.is_dir() else []))
    for source in sources:
        check_features(source)
    return sources


def judge_of(options: argparse.Namespace) -> str | None:
    """Where the judge lies: as named, else the shipped one if it is there."""
    named = options.judge
    if named == NONE or (named is None and not JUDGE.is_dir()):
        return None
    if named is not None and not Path(named).is_dir():
        raise UserError(f"--judge '{named}' does not exist; name a folder with a judge, or {NONE}")
    return named or str(JUDGE)


def load_model(ckpt: str, config: str | None) -> tuple[Any, int]:
    """The model, on the GPU if there is one, and the side of its pictures as far as drawings need it."""
    import torch

    from ldm.checkpoint import config_of, load_model_from_config
    from ldm.generate.images import downsampling_factor, latent_shape
    from ldm.yaml_files import read_yaml

    node = read_yaml(config or config_of(ckpt))
    model = load_model_from_config(node, ckpt, "cuda" if torch.cuda.is_available() else "cpu")
    side = max(latent_shape(model, None, None)[1:]) * downsampling_factor(model)
    return model, min(side, 128)


def sheet_scale(rows: Sequence[Any]) -> int:
    """How much to enlarge the pictures of labelled rows for a person to see them."""
    return max(1, 96 // max(picture.width for _, pictures in rows for picture in pictures))
