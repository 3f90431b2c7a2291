"""Make the images that show what a learned word can do, each with the command of the README that draws it.

    python scripts/edit_images.py --out outputs/edits

Learns four words with the embedded model (once: they stay in OUT/words), then runs the commands and writes a strip for
each: variations, synthesis, style, composition, bias reduction, an edit of a whole image, an edit in one place, and the
strength of the word.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    import checkout  # noqa: F401

from ldm.commands.base import JUDGE, WEIGHTS, guarded
from ldm.console import Parser, positive
from ldm.util import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

ROOT = Path(__file__).resolve().parents[1]
CONCEPTS = ROOT / "data" / "concepts"
SCALE = 3  # of the images in the strips


@dataclass(frozen=True)
class Word:
    """A word to learn: its file's name, its images, and what its vectors start from."""

    name: str
    init: str
    kind: str = "object"
    images: str | None = None  # by default those of the concept of this name


WORDS = (
    Word("bobo", "bear"),
    Word("pip", "fish"),
    Word("dusk", "painting", "style"),
    Word("patterned", "fish", images="patterned-fish"),
)
# The name of each strip, and the arguments of txt2img.py; one command for each row.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "variations": ('--embedding_path {words}/bobo.safetensors --prompt "a photo of <bobo>"',),
    "synthesis": (
        '--embedding_path {words}/bobo.safetensors --prompt "a photo of <bobo> on the beach"',
        '--embedding_path {words}/bobo.safetensors --prompt "a sketch of <bobo>"',
    ),
    "style": (
        '--embedding_path {words}/dusk.safetensors --prompt "a photo of a fish in the style of <dusk>"',
    ),
    "composition": (
        "--embedding_path {words}/bobo.safetensors {words}/dusk.safetensors "
        '--prompt "a photo of <bobo> in the style of <dusk>"',
    ),
    "bias": (
        '--prompt "a photo of a fish"',
        '--embedding_path {words}/patterned.safetensors --prompt "a photo of a <patterned>" --class_word fish '
        "--concept_strength 0.5",
    ),
    "image-edit": (
        "--embedding_path {words}/bobo.safetensors --init_img data/concepts/momo/01.png --strength 0.6 "
        '--prompt "a photo of <bobo>"',
    ),
    "local-edit": (
        "--embedding_path {words}/bobo.safetensors --init_img data/concepts/momo/01.png --mask {words}/mask.png "
        '--strength 0.7 --prompt "a photo of <bobo>"',
    ),
    "concept-strength": tuple(
        '--embedding_path {words}/bobo.safetensors --prompt "a photo of <bobo>" --class_word bear '
        f"--concept_strength {strength:g}"
        for strength in (0, 0.5, 1.5, 2.5)
    ),
}
SAMPLING = "--dpm_solver --ddim_steps 25 --scale 3"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, after one line on stderr if it failed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=WEIGHTS, help="a checkpoint or its folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/edits"), help="default: %(default)s")
    parser.add_argument(
        "--steps", type=positive, help="training steps of each word (default: those of fast.yaml)"
    )
    parser.add_argument(
        "--samples", type=positive, default=6, help="images of each command (default: %(default)s)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=sorted(EXAMPLES), default=sorted(EXAMPLES), help="strips"
    )
    return guarded(lambda: make(parser.parse_args(argv)))


def make(options: argparse.Namespace) -> None:
    """Learn the words that are missing, and write the strips."""
    from ldm.commands import generate
    from ldm.generate.images import save_image
    from ldm.generate.session import checkpoint_of
    from ldm.images import image_grid, list_images, open_image

    words = options.out / "words"
    ckpt = checkpoint_of(options.model)
    for word in WORDS:
        learn(word, words, ckpt, options.steps)
    make_mask(words / "mask.png")
    for name in options.only:
        rows: list[Image] = []
        commands: list[str] = []
        for number, text in enumerate(EXAMPLES[name]):
            folder = options.out / "drawn" / f"{name}-{number}"
            shutil.rmtree(folder, ignore_errors=True)
            arguments = [one.format(words=words) for one in shlex.split(f"{text} {SAMPLING}")]
            commands.append(shlex.join(["python", "scripts/txt2img.py", *arguments]))
            arguments = [str(ROOT / one) if one.startswith("data/") else one for one in arguments]
            arguments += ["--n_samples", str(options.samples), "--outdir", str(folder), "--ckpt_path", ckpt]
            if generate.main([*arguments, "--skip_grid"]) != 0:
                raise UserError(f"the example {name} failed; see the line above")
            given = [open_image(arguments[arguments.index(flag) + 1]) for flag in GIVEN if flag in arguments]
            drawn = [open_image(path) for path in list_images(folder / "samples")]
            rows += [*given, *drawn]
        columns = len(rows) // len(EXAMPLES[name])
        path = save_image(image_grid(rows, columns, scale=SCALE), options.out / f"{name}.png")
        print(f"{path}: " + "; ".join(commands))
        if name == "bias":
            for command, row in zip(commands, range(0, len(rows), columns), strict=True):
                print(f"{plain(rows[row : row + columns])} of {columns} are plain: {command}")


GIVEN = ("--init_img", "--mask")


def plain(images: Sequence[Image]) -> int:
    """How many images show a creature without a pattern, by the judge."""
    import torch

    from ldm.evaluation.judge import AttributeJudge
    from ldm.images import to_tensor

    pixels = torch.stack([to_tensor(image) for image in images])
    return sum(one["pattern"] == "plain" for one in AttributeJudge.load(ROOT / JUDGE).predict(pixels))


def learn(word: Word, folder: Path, ckpt: str, steps: int | None) -> None:
    """Learn a word into FOLDER/NAME.safetensors, unless it is there, of this model and as many steps."""
    from ldm.embeddings import read
    from ldm.files import file_hash
    from ldm.training.inversion import invert

    path = folder / f"{word.name}.safetensors"
    if path.is_file():
        known = read(path).metadata
        if known.base_model_hash == file_hash(Path(ckpt)) and steps in (None, known.steps):
            return
    images = CONCEPTS / word.name if word.images is None else patterned_fish(folder / word.images)
    print(f"learning <{word.name}> from {images}", flush=True)
    concept = invert(
        images,
        placeholder=f"<{word.name}>",
        init=word.init,
        model=ckpt,
        recipe="fast",
        kind=word.kind,
        steps=steps,
        logdir=folder / "logs",
    )
    concept.save(path)


def patterned_fish(folder: Path) -> Path:
    """Draw five fish, none of them plain: the model draws most fish plain, and few of those it saw were."""
    from PIL import Image

    from ldm.data.creatures.renderer import render
    from ldm.data.creatures.world import SPLITS, creature, scene

    folder.mkdir(parents=True, exist_ok=True)
    seeds = [SPLITS["concepts"][500 + number] for number in range(5)]
    patterns = ("stripes", "spots", "belly", "stripes", "spots")
    fish = [creature(seed, kind="fish", pattern=one) for seed, one in zip(seeds, patterns, strict=True)]
    scenes = [scene(seed, one.color, style="photo") for seed, one in zip(seeds, fish, strict=True)]
    for number, image in enumerate(render(fish, scenes, 32), 1):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:02d}.png")
    return folder


def make_mask(path: Path) -> None:
    """Write a mask of the middle of an image, where the creatures are."""
    from PIL import Image, ImageDraw

    with Image.open(CONCEPTS / "momo" / "01.png") as image:
        size = image.size
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((size[0] * 0.06, -size[1] * 0.2, size[0] * 0.94, size[1] * 1.2), fill=255)
    mask.save(path)


if __name__ == "__main__":
    sys.exit(main())
