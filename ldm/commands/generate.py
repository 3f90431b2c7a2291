"""The commands that generate images from prompts: scripts/txt2img.py and scripts/stable_txt2img.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm import console
from ldm.commands.base import (
    WEIGHTS,
    add_dial_option,
    check_files,
    check_model,
    guarded,
    load_latent_diffusion,
    naming_the_checkpoint,
)
from ldm.console import Parser, argument, write_line
from ldm.files import in_checkout
from ldm.util import UsageError, UserError, shown

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from PIL.Image import Image

    from ldm.generate.editing import InitImage
    from ldm.generate.request import ClassWords, Prompts
    from ldm.models.diffusion.ddpm import LatentDiffusion

_DESCRIPTION = """Generate images from prompts, with learned embeddings.

    %(prog)s --embedding_path logs/RUN/checkpoints/embeddings.pt --prompt "a photo of *"
    %(prog)s --embedding_path cat.pt dog.safetensors --prompt "<cat> beside <dog>" --dpm_solver

Images are numbered in OUTDIR/samples, and OUTDIR holds a grid of them that is named after the prompt. Every path is
printed. An image depends on the seed, its number in the run, the prompt and the settings, and on nothing else."""

_STABLE_DESCRIPTION = """Generate images with Stable Diffusion and embeddings that were learned for it.

    %(prog)s --ckpt sd-v1-4.ckpt --embedding_path embeddings.pt --prompt "a photo of *" --plms

The same as scripts/txt2img.py, with Stable Diffusion's defaults. Images are numbered in OUTDIR/samples, and OUTDIR
holds a numbered grid of them that is named after the prompt. Every path is printed."""


@dataclass(frozen=True)
class Profile:
    """What differs between the commands that generate images: defaults, and how files are numbered."""

    description: str = _DESCRIPTION
    ckpt: str = WEIGHTS
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


STABLE = Profile(
    description=_STABLE_DESCRIPTION,
    ckpt="models/ldm/stable-diffusion-v1/model.ckpt",
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


def main(argv: Sequence[str] | None = None, prog: str = "txt2img.py") -> int:
    """Run the command line of scripts/txt2img.py; returns the exit code."""
    profile = Profile()
    return guarded(lambda: run(make_parser(profile, prog).parse_args(argv), profile))


def stable_main(argv: Sequence[str] | None = None, prog: str = "stable_txt2img.py") -> int:
    """Run the command line of scripts/stable_txt2img.py; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    profile = LAION if "--laion400m" in argv else STABLE
    parser = make_parser(profile, prog)
    parser.add_argument(
        "--laion400m", action="store_true", help="the LDM text2img-large model and its output folder"
    )
    for flag, meaning in (("--C", "latent channels"), ("--f", "downsampling factor")):
        parser.add_argument(
            flag, type=int, help=f"{meaning}: accepted for old commands; the model's own is used"
        )
    return guarded(lambda: run(parser.parse_args(argv), profile))


def make_parser(profile: Profile, prog: str) -> Parser:
    """Return the parser of a command that generates images, with the defaults of `profile`."""
    parser = Parser(
        prog=prog,
        description=profile.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--ckpt_path",
        "--ckpt",
        type=in_checkout,
        default=profile.ckpt,
        metavar="MODEL",
        help="a checkpoint, a folder of diffusers or a hub id (default: %(default)s)",
    )
    own_config = profile.config or "config.yaml beside the model, or that of the published model it is"
    model.add_argument(
        "--config", type=in_checkout, default=profile.config, metavar="YAML", help=f"default: {own_config}"
    )
    model.add_argument(
        "--vae",
        type=in_checkout,
        metavar="MODEL",
        help="first stage in place of the model's: a file, a folder or a hub id",
    )
    model.add_argument("--variant", metavar="NAME", help="of a hub id: fetch these weights, such as fp16")
    model.add_argument("--revision", metavar="NAME", help="of a hub id: a branch, a tag or a commit")
    model.add_argument(
        "--embedding_path",
        nargs="+",
        default=[],
        metavar="FILE",
        help="embedding files in the format of any tool",
    )
    model.add_argument(
        "--precision", choices=("full", "autocast"), default=profile.precision, help="default: %(default)s"
    )

    what = parser.add_argument_group("what to generate")
    what.add_argument(
        "--prompt", nargs="?", metavar="TEXT", help="default: a photo of the first learned placeholder"
    )
    what.add_argument(
        "--negative_prompt", default="", metavar="TEXT", help="prompt that guidance steers away from"
    )
    what.add_argument(
        "--prompt_syntax",
        choices=("a1111", "comfyui", "plain"),
        default="a1111",
        help="meaning of (word:1.3), [word], BREAK and embedding:NAME; plain: none (default: %(default)s)",
    )
    what.add_argument(
        "--embedding_dir",
        default="embeddings",
        metavar="FOLDER",
        help="where embedding:NAME in a prompt looks for the file, besides the current folder (default: %(default)s)",
    )
    add_dial_option(what)
    what.add_argument(
        "--from-file", metavar="FILE", help="text file with one prompt per line: one image each per round"
    )
    what.add_argument(
        "--n_samples",
        type=argument("n_samples", int),
        default=profile.n_samples,
        metavar="N",
        help="batch size, and images of --prompt per round (default: %(default)s)",
    )
    what.add_argument(
        "--n_iter",
        type=argument("n_iter", int),
        default=profile.n_iter,
        metavar="N",
        help="rounds (default: %(default)s)",
    )
    what.add_argument(
        "--H", type=argument("height", int), metavar="PIXELS", help="height (default: the model's own)"
    )
    what.add_argument(
        "--W", type=argument("width", int), metavar="PIXELS", help="width (default: the model's own)"
    )

    conditions = parser.add_argument_group(
        "size conditions of Stable Diffusion XL",
        "By default the image is whole and has the size at which it is drawn.",
    )
    for name, pair, meaning in (
        (
            "original_size",
            ("HEIGHT", "WIDTH"),
            "size of the original image; a small one means a coarse picture",
        ),
        ("crop", ("TOP", "LEFT"), "where the image was cut from it; 0 0 keeps the subject in the middle"),
        ("target_size", ("HEIGHT", "WIDTH"), "size of the image"),
    ):
        conditions.add_argument(f"--{name}", type=int, nargs=2, metavar=pair, help=meaning)

    how = parser.add_argument_group("sampling")
    how.add_argument(
        "--ddim_steps",
        type=argument("ddim_steps", int),
        default=profile.steps,
        metavar="N",
        help="default: %(default)s",
    )
    sampler = how.add_mutually_exclusive_group()
    sampler.add_argument("--plms", action="store_true", help="PLMS instead of DDIM")
    sampler.add_argument(
        "--dpm_solver", action="store_true", help="DPM-Solver++ instead of DDIM; 20 steps are enough"
    )
    how.add_argument(
        "--ddim_eta",
        type=argument("ddim_eta", float),
        default=0.0,
        metavar="ETA",
        help="noise of DDIM, 0 (default) to 1",
    )
    how.add_argument(
        "--scale",
        type=argument("scale", float),
        default=profile.scale,
        help="guidance scale (default: %(default)s)",
    )
    how.add_argument("--seed", type=argument("image_seed", int), default=42, help="default: %(default)s")
    how.add_argument("--fixed_code", action="store_true", help="use the same initial noise in every round")

    edit = parser.add_argument_group("editing")
    edit.add_argument(
        "--init_img", "--init-img", metavar="FILE", help="begin from an image; alone it is changed as a whole"
    )
    edit.add_argument(
        "--mask",
        metavar="FILE",
        help="of the size of --init_img: white is generated, black stays exactly as it is",
    )
    edit.add_argument(
        "--strength",
        type=argument("edit_strength", float),
        metavar="S",
        help="of the change to --init_img: 0 returns it as the first stage keeps it, 1 keeps almost nothing of it "
        "(default: 0.75)",
    )
    edit.add_argument(
        "--concept_strength",
        type=argument("concept_strength", float),
        default=1.0,
        metavar="S",
        help="what learned words add to their class words: 0 nothing, 1 (default) as learned, above 1 exaggerated",
    )
    edit.add_argument(
        "--class_word",
        nargs="+",
        default=[],
        metavar="WORD",
        help="class word for --concept_strength, or PLACEHOLDER=WORD (default: the initializer in the file)",
    )

    out = parser.add_argument_group("files")
    out.add_argument("--outdir", default=profile.outdir, metavar="FOLDER", help="default: %(default)s")
    out.add_argument("--format", choices=("png", "jpg"), default="png", help="default: %(default)s, lossless")
    out.add_argument("--skip_save", action="store_true", help="do not save single images")
    out.add_argument("--skip_grid", action="store_true", help="do not save a grid")
    out.add_argument(
        "--n_rows",
        type=argument("n_rows", int),
        metavar="N",
        help="images in a row of the grid (default: n_samples)",
    )
    return parser


def run(options: argparse.Namespace, profile: Profile) -> None:
    """Check everything that can be checked without the model, load it, generate and save."""
    sampler = "plms" if options.plms else "dpm_solver" if options.dpm_solver else "ddim"
    if options.ddim_eta and sampler != "ddim":
        raise UsageError(f"--ddim_eta {options.ddim_eta} needs DDIM; remove --{sampler}")
    for flag, needed in (("mask", "init_img"), ("strength", "init_img")):
        if getattr(options, flag) is not None and options.init_img is None:
            raise UsageError(
                f"--{flag} {getattr(options, flag)} needs an image to begin from; add --{needed} FILE"
            )
    if options.class_word and options.concept_strength == 1.0:
        raise UsageError(
            f"--class_word {shown(options.class_word[0])} is for --concept_strength; add it, or remove --class_word"
        )
    check_model(options.ckpt_path, options.vae)
    check_files(options.config, options.from_file, *options.embedding_path)
    if options.variant or options.revision:
        if Path(options.ckpt_path).exists():
            raise UsageError(
                f"--variant and --revision are for a hub id; '{options.ckpt_path}' is here: leave them out"
            )
        from ldm.weights import located

        options.ckpt_path = str(located(options.ckpt_path, options.variant, options.revision))
    lines = read_lines(options.from_file) if options.from_file else None
    console.set_up_logging()
    with console.importing():
        config, found, classes, init = check(options, lines, profile)

        from tqdm import tqdm

        from ldm.generate.images import ImageFolder, free_number, generate, name_of, save_grid
        from ldm.generate.session import Labels

    outdir = Path(options.outdir)
    samples = ImageFolder(outdir / "samples", options.format, profile.digits)
    labels = Labels(options.ckpt_path)
    model = load(options, config, found)
    labels.use(found.words)
    prompts_of_round = found.prompts if lines else found.prompts * options.n_samples
    with tqdm(unit="step", desc="sampling", disable=None) as bar, naming_the_checkpoint(options.ckpt_path):

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        def save(place: int, image: Image) -> None:
            write_line(str(samples.save(image)))

        images = generate(
            model,
            prompts_of_round * options.n_iter,
            steps=options.ddim_steps,
            scale=options.scale,
            eta=options.ddim_eta,
            sampler=sampler,
            height=options.H,
            width=options.W,
            seed=options.seed,
            batch_size=options.n_samples,
            precision=options.precision,
            negative_prompt=found.negative_prompt,
            prompt_syntax=options.prompt_syntax,
            sizes=sizes_of(options),
            init=init,
            concept_strength=options.concept_strength,
            class_words=classes,
            dials=dict(options.dial),
            numbers=list(range(len(prompts_of_round))) * options.n_iter if options.fixed_code else None,
            labels=labels,
            progress=progress,
            on_image=None if options.skip_save else save,
        )
    if not options.skip_grid:
        name = "grid" if lines else name_of(found.prompts[0])
        if lines or profile.numbered_grids:
            name = f"{name}-{free_number(outdir, f'{name}-'):04}"
        path = outdir / f"{name}.{options.format}"
        write_line(str(save_grid(images, options.n_rows or options.n_samples, path)))


def check(
    options: argparse.Namespace, lines: list[str] | None, profile: Profile
) -> tuple[DictConfig, Prompts, ClassWords | None, InitImage | None]:
    """Return the model's config, the prompts, the class words if they are needed, and the image to begin from.

    Everything that needs neither the numbers in files nor a tokenizer is checked, without torch.
    """
    from ldm.base_models import check_weights, config_of, read_config
    from ldm.files import why_no_folder
    from ldm.generate.editing import InitImage
    from ldm.generate.request import check_fits, check_sizes, class_words, resolve

    samples = Path(options.outdir) / "samples"
    if reason := why_no_folder(samples):
        raise UserError(f"cannot write to the folder '{samples}' ({reason}); choose another")
    init = None
    if options.init_img is not None:
        strength = {} if options.strength is None else {"strength": options.strength}
        init = InitImage.read(options.init_img, options.mask, **strength)
    options.config = options.config or config_of(options.ckpt_path)
    config = read_config(options.ckpt_path, options.config)
    check_weights(config["model"], options.ckpt_path, options.vae)
    check_sizes(config, sizes_of(options))
    check_fits(config, options.ddim_steps, options.H, options.W)
    found = resolve(
        config,
        lines or ([options.prompt] if options.prompt else []),
        options.negative_prompt,
        options.embedding_path,
        default=profile.prompt,
        syntax=options.prompt_syntax,
        folder=options.embedding_dir,
        dials=dict(options.dial),
    )
    classes = None
    if options.concept_strength != 1.0:
        classes = class_words(found.words, found.prompts, options.class_word)
    return config, found, classes, init


def load(options: argparse.Namespace, config: DictConfig, found: Prompts) -> LatentDiffusion:
    """Return the model with the words in it; their files are read before it, and the token limit is checked after."""
    from ldm.base_models import check_classes
    from ldm.generate.embeddings import load_embeddings
    from ldm.generate.request import read_all
    from ldm.generate.session import warn_truncated

    check_classes(config, options.config)
    words = read_all(config, found.words)
    model = load_latent_diffusion(config, options.ckpt_path, vae=options.vae, precision=options.precision)
    if words:
        load_embeddings(model, words)
    warn_truncated(model, [*found.prompts, found.negative_prompt], options.prompt_syntax)
    return model


def sizes_of(options: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Size conditions of Stable Diffusion XL in place of the size of the image."""
    given = {name: getattr(options, name) for name in ("original_size", "crop", "target_size")}
    return {name: (pair[0], pair[1]) for name, pair in given.items() if pair is not None}


def read_lines(path: str | Path) -> list[str]:
    """Return the lines of a text file that are not blank; UserError if there is none."""
    from ldm.files import read_text

    prompts = [line.strip() for line in read_text(path, "prompt file").splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"'{path}' holds no prompt; write one prompt per line")
    return prompts
