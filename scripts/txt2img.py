"""Generate pictures from prompts, with the embeddings that were learned.

    python scripts/txt2img.py --embedding_path logs/RUN/checkpoints/embeddings.pt --prompt "a photo of *"
    python scripts/txt2img.py --embedding_path cat.pt dog.safetensors --prompt "<cat> beside <dog>" --dpm_solver

Pictures are numbered in OUTDIR/samples, and OUTDIR holds a grid of them that is named after the prompt. Every path
is printed. A picture depends on the seed, its number in the run, the prompt and the settings, on nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# a checkout works without being installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.util import UsageError, UserError
from scripts.common import Profile, guarded, make_parser

if TYPE_CHECKING:
    from PIL.Image import Image

# The rest of ldm brings torch and transformers, which take seconds: it is imported when the command line is checked.

MANAGER = "ldm.modules.embedding_manager.EmbeddingManager"
# Which YAML belongs to a checkpoint that lies somewhere by itself, told by its text encoder.


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, after one line on stderr if it failed."""
    return guarded(lambda: run(make_parser(Profile(), __doc__).parse_args(argv), Profile()))


def run(options: argparse.Namespace, profile: Profile) -> None:
    """Check all that can be checked without the model, load it, generate and save."""
    sampler = "plms" if options.plms else "dpm_solver" if options.dpm_solver else "ddim"
    if options.ddim_eta and sampler != "ddim":
        raise UsageError(f"--ddim_eta {options.ddim_eta} needs DDIM; leave --{sampler} out")
    named = [options.ckpt_path, options.config, options.from_file, *options.embedding_path]
    for path in filter(None, named):
        if not Path(path).is_file():
            raise UserError(f"'{path}' does not exist; check the path")
    lines = read_lines(options.from_file) if options.from_file else None

    from tqdm import tqdm

    from ldm import console
    from ldm.generate.images import ImageFolder, free_number, generate, name_of, save_grid

    console.set_up_logging()
    outdir = Path(options.outdir)
    samples = ImageFolder(outdir / "samples", options.format, profile.digits)
    model, prompts = load(options, lines, profile)
    pictures_of_round = prompts if lines else prompts * options.n_samples
    with tqdm(unit="step", desc="sampling", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        def save(place: int, picture: Image) -> None:
            tqdm.write(str(samples.save(picture)))

        pictures = generate(
            model,
            pictures_of_round * options.n_iter,
            steps=options.ddim_steps,
            scale=options.scale,
            eta=options.ddim_eta,
            sampler=sampler,
            height=options.H,
            width=options.W,
            seed=options.seed,
            batch_size=options.n_samples,
            precision=options.precision,
            negative_prompt=options.negative_prompt,
            numbers=list(range(len(pictures_of_round))) * options.n_iter if options.fixed_code else None,
            progress=progress,
            on_image=None if options.skip_save else save,
        )
    if not options.skip_grid:
        name = "grid" if lines else name_of(prompts[0])
        if lines or profile.numbered_grids:
            name = f"{name}-{free_number(outdir, f'{name}-'):04}"
        print(save_grid(pictures, options.n_rows or options.n_samples, outdir / f"{name}.{options.format}"))


def load(options: argparse.Namespace, lines: list[str] | None, profile: Profile) -> tuple[Any, list[str]]:
    """The model with the embeddings in it, and the prompts, which are checked first."""
    import torch
    from omegaconf import OmegaConf

    from ldm.checkpoint import config_of, load_model_from_config
    from ldm.embeddings import read
    from ldm.generate.embeddings import check_mentions, load_embeddings
    from ldm.yaml_files import read_yaml

    config = read_yaml(options.config or config_of(options.ckpt_path))
    node = OmegaConf.select(config, "model.params.personalization_config") or {}
    params = node.get("params") or {}
    configured = [str(word) for word in params.get("placeholder_strings") or []]
    learned = configured if params.get("embedding_manager_ckpt") else []
    prompts = lines or [options.prompt or profile.prompt]
    if node.get("target", MANAGER) == MANAGER:  # a class of the user's own knows its files and words itself
        if options.embedding_path:
            learned = [trigger for path in options.embedding_path for trigger in read(path).triggers]
        if learned and not (lines or options.prompt):
            prompts = [f"a photo of {learned[0]}"]
        check_mentions([*prompts, options.negative_prompt], learned, configured)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model_from_config(config, options.ckpt_path, device)
    if options.embedding_path:
        load_embeddings(model, options.embedding_path)
    return model, prompts


def read_lines(path: str) -> list[str]:
    """The lines of a file that are not blank."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from '{path}': it is no UTF-8 text file") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"'{path}' holds no prompt; write one on every line")
    return prompts


if __name__ == "__main__":
    sys.exit(main())
