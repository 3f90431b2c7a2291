"""Join embedding files of any format into one that the original's code loads.

    python scripts/merge_embeddings.py --manager_ckpts cat.pt dog.pt --output_path both.pt --rename "*=<dog>"

Where two files have the same trigger for different vectors, the later one is renamed (--rename or --auto_rename);
without that nothing is written and the clash is reported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# a checkout works without being installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.console import Parser
from ldm.embeddings import merge, plan_renames, read, renames_from, write
from ldm.util import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        options = _parser().parse_args(arguments)
        renames = renames_from(options.rename)
        parts = [read(path) for path in options.manager_ckpts]
        if options.use_bert:
            parts = [part.with_encoder("bert") for part in parts]
        merged = merge(parts, renames, options.auto_rename)
        for step in plan_renames(parts, renames, options.auto_rename):
            print(f"{step.source}: '{step.old}' is now '{step.new}'")
        suffix = options.output_path.suffix.lower()
        write(merged, options.output_path, "safetensors" if suffix == ".safetensors" else "original")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    for concept in merged.concepts:
        print(f"'{concept.trigger}': {len(concept.vectors)} x {concept.width}, for {concept.models}")
    print(f"wrote {options.output_path}")


def _parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manager_ckpts", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output_path", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--rename",
        action="append",
        metavar="OLD=NEW",
        help="name the trigger OLD of the last file that has it NEW; given n times, those of the last n files",
    )
    parser.add_argument("--auto_rename", action="store_true", help="name what clashes after its file: <dog>")
    parser.add_argument(
        "--use_bert",
        action="store_true",
        help="say that the vectors are for LDM's BERT, where a file does not",
    )
    # The original built the whole text encoder to learn one token id; files say what they are for.
    parser.add_argument(
        "-sd", "--stable_diffusion", action="store_true", help="accepted for old commands; not needed"
    )
    parser.add_argument("--config", help="accepted for old commands; not needed")
    return parser


if __name__ == "__main__":
    main()
