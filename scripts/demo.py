"""Invert a sample concept with the embedded model, generate with it, and show the training and generated images.

    python scripts/demo.py

Runs the two commands that a user types, main.py and scripts/txt2img.py, then writes a contact sheet with the training
images of the word above images generated with it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    import checkout  # noqa: F401

from ldm.commands.base import guarded
from ldm.console import Parser
from ldm.util import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/latent-diffusion/txt2img-finetune.yaml"
PROMPTS = (
    "a photo of *",
    "a photo of * on a blue background",
    "a photo of * on the beach",
    "a sketch of *",
)
STEPS, GUIDANCE, SAMPLES = 25, 3.0, 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, after one line on stderr if it failed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concept", type=Path, help="folder of images (default: the YAML's)")
    parser.add_argument("--init_word", help="the word that the vectors start from (default: the YAML's)")
    parser.add_argument("--outdir", type=Path, default=Path("outputs/demo"), help="default: %(default)s")
    return guarded(lambda: demo(parser.parse_args(argv)))


def demo(options: argparse.Namespace) -> None:
    """Invert, generate with the learned word and with the initial word, compare, and write the sheet."""
    from omegaconf import OmegaConf

    from ldm.evaluation.appearance import palette_overlap
    from ldm.evaluation.report import sheet
    from ldm.images import list_images, open_image

    outdir = options.outdir.absolute()
    concept = options.concept and options.concept.absolute()
    os.chdir(ROOT)  # the paths in the YAML and in the commands are relative to the checkout
    config = OmegaConf.load(CONFIG)
    concept = concept or Path(config.data_root)
    word = options.init_word or config.model.params.personalization_config.params.initializer_words[0]
    training_images = [open_image(path) for path in list_images(concept)]

    start = time.monotonic()
    runs = outdir / "logs"
    earlier = set(runs.glob("*"))
    invert = ["main.py", "--base", CONFIG, "-t", "--gpus", "0,", "-l", str(runs), "-n", concept.name]
    if options.concept:
        invert += ["--data_root", str(concept)]
    if options.init_word:
        invert += ["--init_word", word]
    _run(invert)
    seconds = time.monotonic() - start
    (run,) = set(runs.glob("*")) - earlier
    embeddings = run / "checkpoints" / "embeddings.pt"

    with_word = _generate(PROMPTS, outdir / "with-word", embeddings)
    without = _generate([f"a photo of a {word}"], outdir / "without-word", None)
    rows = [("learned from", training_images), *zip(PROMPTS, with_word, strict=True)]
    rows.append((f"without the word: a photo of a {word}", without[0]))
    image_file = outdir / "demo.png"
    sheet(rows).save(image_file)
    size = with_word[0][0].size
    small = [image.resize(size) for image in training_images]
    print(f"image:      {_relative(image_file)}")
    print(f"embeddings: {_relative(embeddings)}")
    print(
        f"inverted in {seconds:.0f} s, start-up included; colours shared with the images (0 to 1): "
        f"'*' {palette_overlap(with_word[0], small):.2f}, '{word}' {palette_overlap(without[0], small):.2f}"
    )


def _generate(prompts: Sequence[str], outdir: Path, embeddings: Path | None) -> list[list[Image]]:
    """Generate SAMPLES images of each prompt; one list per prompt."""
    from ldm.images import list_images, open_image

    shutil.rmtree(outdir, ignore_errors=True)
    outdir.mkdir(parents=True)
    lines = outdir / "prompts.txt"
    lines.write_text("".join(f"{prompt}\n" * SAMPLES for prompt in prompts))
    command = ["scripts/txt2img.py", "--from-file", str(lines), "--outdir", str(outdir), "--skip_grid"]
    command += ["--n_samples", f"{SAMPLES}", "--dpm_solver"]
    command += ["--ddim_steps", f"{STEPS}", "--scale", f"{GUIDANCE}"]
    if embeddings is not None:
        command += ["--embedding_path", str(embeddings)]
    _run(command)
    images = [open_image(path) for path in list_images(outdir / "samples")]
    return [images[start : start + SAMPLES] for start in range(0, len(images), SAMPLES)]


def _relative(path: Path) -> Path:
    """The path relative to the checkout if it is inside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _run(arguments: Sequence[str]) -> None:
    command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
    print(f"$ python {' '.join(repr(part) if ' ' in part else part for part in arguments)}", flush=True)
    # txt2img.py prints the path of every image, which the user does not need: the sheet shows them all.
    stdout = None if arguments[0] == "main.py" else subprocess.DEVNULL
    if subprocess.run(command, stdout=stdout).returncode:
        raise UserError(f"{arguments[0]} failed; its error is above")


if __name__ == "__main__":
    sys.exit(main())
