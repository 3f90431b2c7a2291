"""Invert a sample concept with the embedded model, generate with it, and show both side by side.

    python scripts/demo.py

Runs the two commands that a user types, main.py and scripts/txt2img.py, then writes one picture: the images that
the word was learned from, above generations with it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# a checkout works without being installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.util import UserError
from scripts.common import guarded

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/latent-diffusion/txt2img-finetune.yaml"
PROMPTS = (
    "a photo of *",
    "a photo of * on a blue background",
    "a photo of * on the beach",
    "a sketch of *",
)
# Enlargement of the pictures, which are small.
SCALE = 3
STEPS, GUIDANCE, SAMPLES = 25, 3.0, 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, after one line on stderr if it failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concept", type=Path, help="folder of images (default: the YAML's)")
    parser.add_argument("--init_word", help="the word to begin at (default: the YAML's)")
    parser.add_argument("--outdir", type=Path, default=Path("outputs/demo"), help="default: %(default)s")
    return guarded(lambda: demo(parser.parse_args(argv)))


def demo(options: argparse.Namespace) -> None:
    """Invert, generate with the word and with the word it began at, compare, draw."""
    from omegaconf import OmegaConf

    from ldm.evaluation.palette import palette_overlap
    from ldm.images import list_images, open_image

    config = OmegaConf.load(ROOT / CONFIG)
    concept = options.concept or Path(config.data_root)
    manager = config.model.params.personalization_config.params
    word = options.init_word or manager.initializer_words[0]
    inputs = [open_image(path) for path in list_images(concept)]

    begun = time.monotonic()
    # options.outdir is relative to where the user stands, and so are the commands
    runs = options.outdir / "logs"
    earlier = set(runs.glob("*"))
    invert = ["main.py", "--base", CONFIG, "-t", "-l", str(runs), "-n", concept.name]
    invert += ["--data_root", str(concept), "--init_word", word]
    _run(invert)
    seconds = time.monotonic() - begun
    (run,) = (
        set(runs.glob("*")) - earlier
    )  # names begin with the concept's, so that the last one may be older
    embeddings = run / "checkpoints" / "embeddings.pt"
    rows = [("learned from", inputs)]
    for index, prompt in enumerate(PROMPTS):
        rows.append((prompt, _generate(prompt, options.outdir / f"samples-{index}", embeddings)))
    plain = _generate(f"a photo of a {word}", options.outdir / "samples-word", None)
    rows.append((f"without: a photo of a {word}", plain))
    sheet = _sheet(rows)
    picture = options.outdir / "demo.png"
    sheet.save(picture)
    size = max(image.width for image in rows[1][1])
    small = [image.resize((size, size)) for image in inputs]
    print(f"picture:    {picture}")
    print(f"embeddings: {embeddings}")
    print(
        f"inverted in {seconds:.0f} s, start-up included; colours shared with the images: "
        f"'*' {palette_overlap(rows[1][1], small):.2f}, '{word}' {palette_overlap(plain, small):.2f}"
    )


def _generate(prompt: str, outdir: Path, embeddings: Path | None) -> list:
    from ldm.images import list_images, open_image

    command = ["scripts/txt2img.py", "--prompt", prompt, "--outdir", str(outdir), "--skip_grid"]
    command += [
        "--n_samples",
        str(SAMPLES),
        "--ddim_steps",
        str(STEPS),
        "--scale",
        str(GUIDANCE),
        "--dpm_solver",
    ]
    if embeddings is not None:
        command += ["--embedding_path", str(embeddings)]
    before = set(list_images(outdir / "samples")) if (outdir / "samples").is_dir() else set()
    _run(command)
    return [open_image(path) for path in list_images(outdir / "samples") if path not in before]


def _run(arguments: Sequence[str]) -> None:
    command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
    print(f"$ python {' '.join(repr(part) if ' ' in part else part for part in arguments)}", flush=True)
    if subprocess.run(command).returncode:
        raise UserError(f"{arguments[0]} did not end well, see above")


def _sheet(rows: Sequence[tuple[str, list]]) -> object:
    from PIL import Image

    from ldm.images import image_grid, labelled

    strips = [labelled(image_grid(images, len(images), scale=SCALE), title) for title, images in rows]
    sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


if __name__ == "__main__":
    sys.exit(main())
