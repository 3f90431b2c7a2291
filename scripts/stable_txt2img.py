"""Generate pictures with Stable Diffusion v1 and the embeddings that were learned for it.

    python scripts/stable_txt2img.py --ckpt sd-v1-4.ckpt --embedding_path embeddings.pt --prompt "a photo of *" --plms

It is scripts/txt2img.py with Stable Diffusion's defaults. Pictures are numbered in OUTDIR/samples, and OUTDIR holds a
numbered grid of them that is named after the prompt. Every path is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.common import Profile, guarded, make_parser
from scripts.txt2img import run

STABLE = Profile(
    prog="stable_txt2img.py",
    ckpt="models/ldm/stable-diffusion-v1/model.ckpt",
    config="configs/stable-diffusion/v1-inference.yaml",
    prompt="a painting of a virus monster playing guitar",
    scale=7.5,
    n_iter=2,
    n_samples=3,
    precision="autocast",
    digits=5,
    numbered_grids=True,
)
LAION = replace(
    STABLE,
    ckpt="models/ldm/text2img-large/model.ckpt",
    config="configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    outdir="outputs/txt2img-samples-laion400m",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, after one line on stderr if it failed."""
    return guarded(lambda: stable(sys.argv[1:] if argv is None else argv))


def stable(argv: Sequence[str]) -> None:
    profile = LAION if "--laion400m" in argv else STABLE
    parser = make_parser(profile, __doc__)
    parser.add_argument(
        "--laion400m", action="store_true", help="the LDM text2img-large model and its folder"
    )
    for flag, meaning in (("--C", "latent channels"), ("--f", "downsampling factor")):
        parser.add_argument(flag, type=int, help=f"{meaning}: accepted for old commands, the model knows it")
    run(parser.parse_args(argv), profile)


if __name__ == "__main__":
    sys.exit(main())
