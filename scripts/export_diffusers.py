"""Write a model, and words it has learned, as a folder that diffusers' pipelines load.

    python scripts/export_diffusers.py --ckpt_path model.ckpt --config model.yaml --out my-pipeline
    python scripts/export_diffusers.py --embedding_path embeddings.pt --rename "*=<my-cat>" --out my-pipeline

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained("my-pipeline")
    pipeline("a photo of <my-cat>").images[0]

A word can also be added later: pipeline.load_textual_inversion of what scripts/embeddings.py convert --to diffusers
wrote. With DDIM, the folder's scheduler, and a number of steps that divides the model's, the pipeline draws from the
same noise the picture that scripts/txt2img.py draws. Every part is compared with the model before it is written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# a checkout works without being installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.console import Parser
from ldm.util import UserError
from scripts.common import Profile, guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, after one line on stderr if it failed."""
    return guarded(lambda: export(_parser().parse_args(argv)))


def export(options: argparse.Namespace) -> None:
    for path in filter(None, [options.ckpt_path, options.config, *options.embedding_path]):
        if not Path(path).is_file():
            raise UserError(f"'{path}' does not exist; check the path")

    # what the two libraries say about image processors and new rows means nothing here
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")

    from ldm.checkpoint import config_of, load_model_from_config
    from ldm.embeddings import renames_from
    from ldm.generate.embeddings import load_embeddings
    from ldm.interop import diffusers_pipeline
    from ldm.yaml_files import read_yaml

    renames = renames_from(options.rename)
    config = read_yaml(options.config or config_of(options.ckpt_path))
    model = load_model_from_config(config, options.ckpt_path)
    placeholders = load_embeddings(model, options.embedding_path) if options.embedding_path else []
    for old, new in renames.items():
        if old not in placeholders or len(new) > 1:
            there = ", ".join(f"'{name}'" for name in placeholders) or "none"
            raise UserError(f"--rename '{old}={new[-1]}': name each learned word once (there is {there})")
    names = {word: renames.get(word, [word])[0] for word in placeholders}
    if len(set(names.values())) < len(names):
        raise UserError(f"--rename gives two words one name; there is {', '.join(names.values())}")
    pipeline = diffusers_pipeline.to_pipeline(model, config)
    if names:
        vectors = model.embedding_manager.export()
        diffusers_pipeline.add_words(pipeline, {new: vectors[old] for old, new in names.items()})
    diffusers_pipeline.compare_with_model(model, pipeline, names)
    print(f"wrote {diffusers_pipeline.save_pipeline(pipeline, options.out)}")
    for name in names.values():
        print(f'in prompts: "a photo of {name}"')


def _parser() -> Parser:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--ckpt_path", "--ckpt", default=Profile.ckpt, metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument("--config", metavar="YAML", help="default: config.yaml beside the model, or its own")
    parser.add_argument(
        "--embedding_path", nargs="+", default=[], metavar="FILE", help="learned words, of any tool's format"
    )
    parser.add_argument(
        "--rename", action="append", metavar="OLD=NEW", help="the name of a learned word in the pipeline"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
