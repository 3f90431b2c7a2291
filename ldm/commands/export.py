"""The command that writes a model as a pipeline of diffusers: scripts/export_diffusers.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ldm.commands.base import (
    WEIGHTS,
    check_files,
    check_model,
    guarded,
    load_latent_diffusion,
)
from ldm.console import Parser, write_line
from ldm.files import check_new, in_checkout
from ldm.util import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

_DESCRIPTION = """Write a model, with learned words if given, as a folder that the pipelines of diffusers load.

    %(prog)s --ckpt_path model.ckpt --config model.yaml --out my-pipeline
    %(prog)s --embedding_path embeddings.pt --rename "*=<my-cat>" --out my-pipeline

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained("my-pipeline")
    pipeline("a photo of <my-cat>").images[0]

A word can also be added later: convert its file with scripts/embeddings.py convert --to diffusers, then call
pipeline.load_textual_inversion. With DDIM, the folder's scheduler, and a number of steps that divides the model's
number of timesteps, the pipeline generates the same image from the same noise as scripts/txt2img.py. Every part of the
pipeline is compared with the model before anything is written."""


def main(argv: Sequence[str] | None = None, prog: str = "export_diffusers.py") -> int:
    """Run the command line of scripts/export_diffusers.py; returns the exit code."""
    return guarded(lambda: export(_make_parser(prog).parse_args(argv)))


def export(options: argparse.Namespace) -> None:
    """Load the model and its embeddings, convert them, compare, and write the folder."""
    check_model(options.ckpt_path, options.vae)
    check_files(options.config, *options.embedding_path)

    config, renames = check(options)

    # Both libraries warn about image processors and new token embeddings, which do not matter here.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")

    from ldm.base_models import check_classes
    from ldm.generate.embeddings import load_embeddings, personalization_of
    from ldm.generate.request import read_all
    from ldm.interop import diffusers_pipeline

    check_classes(config, options.config)
    words = read_all(config, options.embedding_path)
    model = load_latent_diffusion(config, options.ckpt_path, "cpu", vae=options.vae)
    vectors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    if words:
        names = renamed(load_embeddings(model, words), renames)
        vectors = personalization_of(model).export()
    for word in names.keys() - vectors.keys():
        raise UserError(f"'{word}' has no vectors that diffusers can use; export without --embedding_path")
    pipeline = diffusers_pipeline.to_pipeline(model, config)
    if names:
        diffusers_pipeline.add_words(pipeline, {new: vectors[old] for old, new in names.items()})
    diffusers_pipeline.compare_with_model(model, pipeline, names)
    write_line(f"wrote {diffusers_pipeline.save_pipeline(pipeline, options.out)}")
    for name in names.values():
        write_line(f'in prompts: "a photo of {name}"')


def check(options: argparse.Namespace) -> tuple[DictConfig, dict[str, list[str]]]:
    """Check what needs no torch; returns the model's config and the renames."""
    from ldm.base_models import check_weights, config_of, read_config
    from ldm.embeddings import merge, renames_from
    from ldm.embeddings.method_files import MethodFile, read_words
    from ldm.embeddings.payload import more_than_vectors
    from ldm.generate.request import check_encoder, of_own_class

    renames = renames_from(options.rename)
    check_new(options.out)
    options.config = options.config or config_of(options.ckpt_path)
    config = read_config(options.ckpt_path, options.config)
    check_weights(config["model"], options.ckpt_path, options.vae)
    held = []
    for path in options.embedding_path if not of_own_class(config) else ():
        words = read_words(path, numbers=False)
        if isinstance(words, MethodFile):
            reason = more_than_vectors(words.method, "diffusers has none for them, so export without it")
            raise UserError(f"'{path}': {reason}")
        held.append(words)
    if held or not options.embedding_path:
        check_encoder(config, held)
        renamed(merge(held).triggers if held else [], renames)
    return config, renames


def renamed(words: Sequence[str], renames: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The new names of words; UserError for a rename of another word, or two words of one name."""
    for old, new in renames.items():
        if old not in words or len(new) > 1:
            loaded = ", ".join(f"'{name}'" for name in words) or "none"
            raise UserError(f"--rename '{old}={new[-1]}': name each learned word once (loaded: {loaded})")
    names = {word: renames.get(word, [word])[0] for word in words}
    if len(set(names.values())) < len(names):
        raise UserError(f"--rename gives two words the same name ({', '.join(names.values())})")
    return names


def _make_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--ckpt_path",
        "--ckpt",
        type=in_checkout,
        default=WEIGHTS,
        metavar="MODEL",
        help="a checkpoint, a folder of diffusers or a hub id (default: %(default)s)",
    )
    parser.add_argument(
        "--vae",
        type=in_checkout,
        metavar="MODEL",
        help="first stage in place of the model's: a file, a folder or a hub id",
    )
    parser.add_argument(
        "--config",
        type=in_checkout,
        metavar="YAML",
        help="default: config.yaml beside the model, or that of the published model",
    )
    parser.add_argument(
        "--embedding_path",
        nargs="+",
        default=[],
        metavar="FILE",
        help="embedding files in the format of any tool",
    )
    parser.add_argument(
        "--rename", action="append", metavar="OLD=NEW", help="rename a learned word in the pipeline"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    return parser
