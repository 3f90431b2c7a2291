"""Look into embedding files of any tool, convert them to what another tool expects, merge and split them.

    python scripts/embeddings.py inspect cat.pt --ckpt_path model.ckpt
    python scripts/embeddings.py convert cat.pt --to a1111 --trigger "<my-cat>"
    python scripts/embeddings.py merge cat.pt dog.safetensors --rename "*=<dog>" -o both.pt
    python scripts/embeddings.py split both.pt -o words

Nothing in a file is ever run, whatever it contains.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# a checkout works without being installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from ldm.checkpoint import config_of, read_state_dict
from ldm.console import Parser
from ldm.embeddings import (
    FORMATS,
    LearnedEmbeddings,
    merge,
    paths_for,
    plan_renames,
    read,
    renames_from,
    write,
    write_all,
)
from ldm.embeddings.inspection import ConceptReport, inspect_concepts, known_folder, table_of, words_of
from ldm.images import open_image
from ldm.util import UsageError, UserError


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        options = _parser().parse_args(arguments)
        options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def inspect(options: argparse.Namespace) -> None:
    """Report on every file; one that cannot be read does not keep the others from it."""
    folder = options.tokenizer
    if folder is None and options.ckpt_path:
        folder = _tokenizer_of(options.ckpt_path)
    words = words_of(folder) if folder else None
    state_dict = _vocabulary_weights(options)
    reports, failures = [], []
    for file in options.files:
        try:
            found = read(file)
            table = _table(state_dict, options, found)
        except UserError as error:
            failures.append(error)
            reports.append({"file": str(file), "error": str(error)})
            continue
        concepts = inspect_concepts(found, table, words, options.words)
        reports.append(
            {
                "file": str(file),
                "format": found.format,
                "metadata": found.metadata.known(),
                "concepts": [dataclasses.asdict(concept) for concept in concepts],
            }
        )
        if not options.json:
            _show(file, found, concepts, table)
    if options.json:
        print(json.dumps(reports, indent=2, ensure_ascii=False))
    if failures:
        for error in failures[:-1]:
            print(f"error: {error}", file=sys.stderr)
        raise failures[-1]


def convert(options: argparse.Namespace) -> None:
    found = read(options.file)
    if options.encoder:
        found = found.with_encoder(options.encoder)
    if options.trigger:
        if len(found.triggers) > 1:
            raise UsageError(
                f"--trigger: '{options.file}' has {len(found.triggers)} triggers; split it first, or use merge --rename"
            )
        found = found.renamed({found.triggers[0]: options.trigger})
    preview = open_image(options.preview) if options.preview else None
    several = len(found.triggers) > 1 and not FORMATS[options.to].several_triggers
    if options.output and not several:
        _keep_old([options.output], options)
        _report([write(found, options.output, options.to, preview)])
        return
    folder = options.output or options.file.parent
    if FORMATS[options.to].several_triggers:
        target = folder / f"{options.file.stem}{FORMATS[options.to].suffix}"
        _keep_old([target], options)
        _report([write(found, target, options.to)])
    else:
        _keep_old(paths_for(found.triggers, folder, options.to), options)
        _report(write_all(found, folder, options.to, preview))


def merge_files(options: argparse.Namespace) -> None:
    renames = renames_from(options.rename)
    parts = [read(file) for file in options.files]
    _tell_renames(parts, renames, options.auto_rename)
    merged = merge(parts, renames, options.auto_rename)
    if FORMATS[options.to].several_triggers or len(merged.triggers) == 1:
        _keep_old([options.output], options)
        _report([write(merged, options.output, options.to)])
    else:
        _keep_old(paths_for(merged.triggers, options.output, options.to), options)
        _report(write_all(merged, options.output, options.to))


def split_file(options: argparse.Namespace) -> None:
    found = read(options.file)
    folder = options.output or options.file.parent
    targets = paths_for(found.triggers, folder, options.to)
    _keep_old(targets, options)
    _report([write(found.only(t), path, options.to) for t, path in zip(found.triggers, targets, strict=True)])


def _tell_renames(parts: list[LearnedEmbeddings], renames: dict[str, list[str]], automatic: bool) -> None:
    for step in plan_renames(parts, renames, automatic):
        print(f"{step.source}: '{step.old}' is now '{step.new}'")


def _vocabulary_weights(options: argparse.Namespace) -> dict[str, Tensor] | None:
    """The state dict to take the vocabulary's vectors from: the checkpoint's, or the tokenizer folder's model's."""
    if options.ckpt_path:
        return read_state_dict(options.ckpt_path)
    if options.tokenizer:
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (options.tokenizer / name).is_file():
                return read_state_dict(options.tokenizer / name)
    return None


def _tokenizer_of(ckpt: Path) -> Path | None:
    """The folder of the tokenizer that the config of a checkpoint names, if it is known and here."""
    try:
        node = OmegaConf.select(OmegaConf.load(config_of(str(ckpt))), "model.params.cond_stage_config")
    except (UserError, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError):
        return None  # ids do in place of words
    if not isinstance(node, Mapping):
        return None
    params = node.get("params") or {}
    usual = "bert-base-uncased" if "BERT" in str(node.get("target")) else "openai/clip-vit-large-patch14"
    return known_folder(str(params.get("version") or params.get("tokenizer") or usual))


def _table(
    state_dict: dict[str, Tensor] | None, options: argparse.Namespace, found: LearnedEmbeddings
) -> Tensor | None:
    if state_dict is None:
        return None
    return table_of(state_dict, str(options.ckpt_path or options.tokenizer), found.concepts[0].width)


def _show(file: Path, found: LearnedEmbeddings, reports: list[ConceptReport], table: Tensor | None) -> None:
    print(f"{file}: {found.format}")
    for report in reports:
        part = f" ({report.part})" if report.part else ""
        count = f"{report.vectors} vector{'s' if report.vectors > 1 else ''}"
        print(f"  trigger     {report.trigger}{part}")
        print(f"  vectors     {count}, {report.width} wide: for {report.models}")
        print(f"  norms       {', '.join(f'{norm:.3f}' for norm in report.norms)}", end="")
        spread = report.vocabulary_norms
        print(f" (vocabulary: {spread.low:.3f} to {spread.high:.3f})" if spread else "")
        if table is not None and report.nearest is None:
            print(f"  nearest     not told: the checkpoint's vocabulary is {table.shape[1]} wide")
        for index, row in enumerate(report.nearest or ()):
            near = ", ".join(f"{word} {similarity:.2f}" for word, similarity in row)
            print(f"  nearest {index + 1:<3} {near}")
    for key, value in found.metadata.known().items():
        print(f"  {key.replace('_', ' '):<11} {value}")


def _keep_old(paths: Sequence[Path], options: argparse.Namespace) -> None:
    for path in paths:
        if path.exists() and not options.overwrite:
            raise UserError(f"'{path}' exists already; choose another with -o, or add --overwrite")


def _report(paths: Sequence[Path]) -> None:
    for path in paths:
        print(f"wrote {path}")


def _parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("inspect", help="say what files hold")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE")
    command.add_argument("--ckpt_path", type=Path, help="checkpoint whose vocabulary to compare with")
    command.add_argument(
        "--tokenizer",
        type=Path,
        help="folder with the vocabulary's words (and weights); default: that of the checkpoint's config",
    )
    command.add_argument("--words", type=int, default=5, help="nearest words to name (default: 5)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=inspect)

    command = commands.add_parser("convert", help="write a file in another tool's format")
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("--to", required=True, choices=FORMATS, help="the format")
    command.add_argument("--trigger", help="another prompt word")
    command.add_argument("--encoder", help="the text encoder, where the file does not say: bert, clip_g, ...")
    command.add_argument("--preview", type=Path, help="picture for a1111-png")
    _add_output(command, "file to write, or folder where several are written")
    command.set_defaults(run=convert)

    command = commands.add_parser("merge", help="join several files in one")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE")
    command.add_argument("--to", default="original", choices=FORMATS, help="the format (default: original)")
    command.add_argument(
        "--rename",
        action="append",
        metavar="OLD=NEW",
        help="name the trigger OLD of the last file that has it NEW; given n times, those of the last n files",
    )
    command.add_argument("--auto_rename", action="store_true", help="name what clashes after its file")
    _add_output(command, "file to write, or folder for formats of one word a file", required=True)
    command.set_defaults(run=merge_files)

    command = commands.add_parser("split", help="write every word of a file to its own")
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("--to", default="safetensors", choices=FORMATS, help="default: safetensors")
    _add_output(command, "folder to write to (default: the file's)")
    command.set_defaults(run=split_file)
    return parser


def _add_output(parser: argparse.ArgumentParser, text: str, required: bool = False) -> None:
    parser.add_argument("-o", "--output", type=Path, required=required, metavar="PATH", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


if __name__ == "__main__":
    main()
