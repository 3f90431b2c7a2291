"""The commands for embedding files: scripts/embeddings.py and scripts/merge_embeddings.py."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ldm.commands.base import check_files, check_model, guarded, write_error
from ldm.console import Parser, check_results_written, positive, write_line
from ldm.files import in_checkout
from ldm.util import UserError, shown
from ldm.words import check_word, one_word

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ldm.embeddings import LearnedEmbeddings, Metadata
    from ldm.embeddings.inspection import ConceptReport

_DESCRIPTION = """Inspect embedding files of any tool, convert, merge and split them, and transfer words between models.

    %(prog)s inspect cat.pt --ckpt_path model.ckpt
    %(prog)s convert cat.pt --to a1111 --trigger "<my-cat>"
    %(prog)s merge cat.pt dog.safetensors --rename "*=<dog>" -o both.pt
    %(prog)s split both.pt -o words
    %(prog)s transfer cat.safetensors --from sd-v1-5.safetensors --to sd-v2-1.safetensors --out cat-sd2.safetensors

Code in a file is never executed."""

_MERGE_DESCRIPTION = """Merge embedding files of any format into one that the original's code loads.

    %(prog)s --manager_ckpts cat.pt dog.pt --output_path both.pt --rename "*=<dog>"

Where two files have different vectors for the same trigger, the later one is renamed (--rename or --auto_rename);
without these options the conflict is reported and nothing is written."""

# What is written, and the path of each.
Parts: TypeAlias = "tuple[Sequence[LearnedEmbeddings], Sequence[Path]]"

# The keys of `ldm.embeddings.FORMATS`, so that a wrong command line is reported before torch is imported.
FORMAT_NAMES = ("original", "safetensors", "diffusers", "a1111", "a1111-png", "onetrainer")

_RENAME_HELP = (
    "rename the trigger OLD of the last file that has it to NEW; given n times, those of the last n files"
)
_TOKENIZER_HELP = "original: the tokenizer's folder, whose token ids the original's code looks for"


def main(argv: Sequence[str] | None = None, prog: str = "embeddings.py") -> int:
    """Run the command line of scripts/embeddings.py; returns the exit code."""

    def command() -> None:
        options = _make_parser(prog).parse_args(argv)
        options.run(options)

    return guarded(command)


def merge_main(argv: Sequence[str] | None = None, prog: str = "merge_embeddings.py") -> int:
    """Run the command line of scripts/merge_embeddings.py; returns the exit code."""
    return guarded(lambda: _merge_originals(_make_merge_parser(prog).parse_args(argv)))


def inspect(options: argparse.Namespace) -> None:
    """Report on every file; a file that cannot be read does not prevent the report on the others."""
    from ldm.embeddings.inspection import check_text_encoder, inspect_concepts, words_of
    from ldm.embeddings.method_files import MethodFile, read_words
    from ldm.weights import TEXT_ENCODERS, located

    check_model(options.ckpt_path)
    if options.ckpt_path:
        check_text_encoder(options.ckpt_path)
    unreadable: dict[Path, UserError] = {}
    for file in options.files:  # without torch
        try:
            read_words(file, numbers=False)
        except UserError as error:
            unreadable[file] = error
    some = len(unreadable) < len(set(options.files))
    tables = _vocabulary(options) if some else {}
    folder = options.tokenizer
    if folder is None and options.ckpt_path and some:
        folder = _tokenizer_of(located(options.ckpt_path, parts=TEXT_ENCODERS))
    words = words_of(folder) if folder else None
    reports: list[dict[str, Any]] = []
    failures: list[UserError] = []
    for file in options.files:
        try:
            if file in unreadable:
                raise unreadable[file]
            learned = read_words(file)
        except UserError as error:
            failures.append(error)
            reports.append({"file": str(file), "error": str(error)})
            continue
        if isinstance(learned, MethodFile):
            names = ("method", "words", "initializers", "dials")
            sizes: dict[str, dict[str, Any]] = {
                name: {"shape": list(tensor.shape), "norm": float(tensor.float().norm(dim=-1).mean())}
                for name, tensor in learned.tensors.items()
            }
            report = {name: getattr(learned, name) for name in names}
            known = learned.metadata.known()
            reports.append({"file": str(file), **report, "metadata": known, "tensors": sizes})
            if not options.json:
                write_line(f"{file}: {learned.described()}")
                for name, size in sizes.items():
                    shape = " x ".join(map(str, size["shape"]))
                    write_line(f"  {name:<11} {shape}, mean norm {size['norm']:.3f}")
                for line in _metadata_lines(learned.metadata):
                    write_line(line)
            continue
        concepts = inspect_concepts(learned, tables, words, options.words)
        reports.append(
            {
                "file": str(file),
                "format": learned.format,
                "metadata": learned.metadata.known(),
                "concepts": [dataclasses.asdict(concept) for concept in concepts],
            }
        )
        if not options.json:
            for line in _report_lines(file, learned, concepts, tables):
                write_line(line)
    if options.json:
        # Python's escapes of what a console lacks are not those of JSON.
        narrow = not (sys.stdout.encoding or "").lower().startswith("utf")
        write_line(json.dumps(reports, indent=2, ensure_ascii=narrow))
    check_results_written()
    if failures:
        for failure in failures[:-1]:
            write_error(failure)
        raise failures[-1]


def convert(options: argparse.Namespace) -> None:
    """Write one file in the format of another tool."""
    check_files(options.file, options.preview)
    trigger = check_word(options.trigger, "--trigger") if options.trigger is not None else None

    from ldm.embeddings import read
    from ldm.images import open_image

    def converted(numbers: bool) -> Parts:
        learned = read(options.file, numbers=numbers)
        if options.encoder:
            learned = learned.with_encoder(options.encoder)
        if trigger:
            learned = learned.renamed({one_word(learned.triggers, f"'{options.file}'"): trigger})
        return _parts(learned, options, beside=options.file)

    preview = open_image(options.preview) if options.preview else None
    _write(converted, options, preview)


def merge(options: argparse.Namespace) -> None:
    """Write the words of several files to one, or to a folder in a format that holds one word per file."""
    _write(
        lambda numbers: _parts(_merged(options.files, options, numbers), options, beside=options.output),
        options,
    )


def split(options: argparse.Namespace) -> None:
    """Write every word of a file to a file of its own."""
    check_files(options.file)

    from ldm import embeddings

    def words(numbers: bool) -> Parts:
        whole = embeddings.read(options.file, "they stay together in their file, so use that", numbers)
        names = whole.triggers
        return embeddings.split(whole), embeddings.paths_for(
            names, options.output or options.file.parent, options.to
        )

    _write(words, options)


def _merge_originals(options: argparse.Namespace) -> None:
    from ldm.embeddings import write
    from ldm.embeddings.writer import check_supported

    encoder = "bert" if options.use_bert else None
    suffix = options.output_path.suffix.lower()
    format = "safetensors" if suffix == ".safetensors" else "original"
    check_supported(_merged(options.manager_ckpts, options, numbers=False, encoder=encoder), format)
    merged = _merged(options.manager_ckpts, options, numbers=True, encoder=encoder)
    path = write(_with_token_ids(merged, format), options.output_path, format)
    for concept in merged.concepts:
        write_line(f"'{concept.trigger}': {len(concept.vectors)} x {concept.width}, for {concept.models}")
    write_line(f"wrote {path}")


def _merged(
    files: Sequence[Path], options: argparse.Namespace, numbers: bool, encoder: str | None = None
) -> LearnedEmbeddings:
    """Merge files as --rename and --auto_rename request, and, with `numbers`, write a line for each renamed trigger."""
    check_files(*files)

    from ldm import embeddings

    renames = embeddings.renames_from(options.rename)
    apart = "they stay in a file of their own, which is named beside others to generate with several"
    parts = [embeddings.read(file, apart, numbers) for file in files]
    if encoder:
        parts = [part.with_encoder(encoder) for part in parts]
    merged = embeddings.merge(parts, renames, options.auto_rename)
    for step in embeddings.plan_renames(parts, renames, options.auto_rename) if numbers else ():
        write_line(f"{step.source}: '{step.old}' is now '{step.new}'")
    return merged


def _parts(learned: LearnedEmbeddings, options: argparse.Namespace, beside: Path) -> Parts:
    """What goes to --output, or beside a file: one file if it can hold everything, else a folder of files."""
    from ldm import embeddings

    chosen = embeddings.FORMATS[options.to]
    if chosen.several_triggers or (options.output and len(learned.triggers) == 1):
        return [learned], [options.output or beside.with_suffix(chosen.suffix)]
    paths = embeddings.paths_for(learned.triggers, options.output or beside.parent, options.to)
    return embeddings.split(learned), paths


def _write(make: Callable[[bool], Parts], options: argparse.Namespace, preview: Image | None = None) -> None:
    """Write each part to its path as --to says, unless a file exists, and a line for each file and how to load it.

    `make` is called without the numbers of vectors, to check all that needs no torch, and then with them.
    """
    from ldm.embeddings import files_of, write
    from ldm.embeddings.writer import check_supported

    for numbers in (False, True):
        parts, paths = make(numbers)
        for part in parts:
            check_supported(part, options.to)
        files = [files_of(part, path, options.to) for part, path in zip(parts, paths, strict=True)]
        _check_overwriting([file for each in files for file in each], options)
    parts = [_with_token_ids(part, options.to, getattr(options, "tokenizer", None)) for part in parts]
    for part, each in zip(parts, files, strict=True):
        write(part, each[0], options.to, preview)
        for file in each:
            write_line(f"wrote {file}")
        _explain_word(part.triggers[0], each[0], options.to)


def _explain_word(trigger: str, path: Path, format: str) -> None:
    """Write a line if the tools that read a format take another word than the trigger."""
    if format in ("safetensors", "a1111") and path.stem != trigger:
        write_line(
            f"  AUTOMATIC1111, ComfyUI and others take the file's name as the word: {shown(path.stem)}"
        )
    if format == "diffusers" and trigger == "*":
        write_line("  diffusers refuses '*', a word of its vocabulary: load the file with token='<my-word>'")


def transfer(options: argparse.Namespace) -> None:
    """Write the words of a file for another model, and how good the map between the text encoders is."""
    check_files(options.file)
    check_model(options.source, options.target)
    _check_overwriting([options.output], options)

    from ldm.embeddings import read, write
    from ldm.embeddings.inspection import check_text_encoder, token_tables

    instead = "the map between two models is for vectors, so train the word anew on the other model"
    read(options.file, instead, numbers=False)
    for model in (options.source, options.target):
        check_text_encoder(model)

    from ldm.embeddings.transfer import fit_models, transferred

    learned = read(options.file, instead)
    transfers = fit_models(token_tables(options.source), token_tables(options.target))
    moved = transferred(learned, transfers, Path(options.source).name, Path(options.target).name)
    for (kind, other), fit in transfers.items():
        write_line(
            f"{kind} ({fit.weight.shape[0]}) to {other} ({fit.weight.shape[1]}): cosine similarity to the true vectors "
            f"of {fit.held_out:,} tokens that were held out"
        )
        write_line(f"  this map {fit.agreement:.3f}, nearest token {fit.nearest:.3f}, mean {fit.mean:.3f}")
    format = "original" if options.output.suffix.lower() in (".pt", ".bin") else "safetensors"
    path = write(_with_token_ids(moved, format), options.output, format)
    write_line(f"wrote {path}; it was measured on tokens, not on images: train it further from there with")
    write_line(f"  python main.py --embedding_manager_ckpt {path} ...")


def _with_token_ids(
    learned: LearnedEmbeddings, format: str, tokenizer: Path | None = None
) -> LearnedEmbeddings:
    """For the original's format, look up token ids that are not known, and write a line for words that have none."""
    from ldm.embeddings.concept import quoted
    from ldm.embeddings.inspection import known_folder, token_ids, words_of
    from ldm.embeddings.pickle_formats import words_without_token

    missing = words_without_token(learned) if format == "original" else []
    if not missing:
        return learned
    bert = any(concept.encoder == "bert" for concept in learned.concepts)
    folder = tokenizer or known_folder("bert-base-uncased" if bert else "openai/clip-vit-large-patch14")
    learned = learned.with_tokens(token_ids(words_of(folder), missing) if folder else {})
    if unknown := words_without_token(learned):
        why = "no single token of the vocabulary" if folder else "no token id without --tokenizer FOLDER"
        write_line(
            f"{quoted(unknown)}: {why}; the original's code will load the file, but there the word does nothing ('*' "
            "works: --trigger '*', or --rename). Other tools do not need the id"
        )
    return learned


def _check_overwriting(paths: Sequence[Path], options: argparse.Namespace) -> None:
    for path in paths:
        if path.exists() and not options.overwrite:
            raise UserError(f"'{path}' exists already; choose another with -o, or add --overwrite")


def _vocabulary(options: argparse.Namespace) -> dict[str, Tensor]:
    """Read the vocabulary's vectors by text encoder: of the checkpoint, or beside the tokenizer; empty without any."""
    from ldm.embeddings.inspection import token_tables
    from ldm.weights import Folder

    if options.ckpt_path:
        return token_tables(options.ckpt_path)
    if options.tokenizer and Folder(options.tokenizer).own_weights():
        return token_tables(options.tokenizer)
    return {}


def _tokenizer_of(ckpt: Path) -> Path | None:
    """Find the folder of the tokenizer that the config of a checkpoint names; None if there is no such folder.

    A model's folder as diffusers writes it has its own.
    """
    from omegaconf import OmegaConf

    from ldm.base_models import config_of
    from ldm.embeddings.inspection import known_folder
    from ldm.yaml_files import read_yaml

    if ckpt.is_dir():
        return ckpt / "tokenizer" if (ckpt / "tokenizer").is_dir() else None
    try:
        node = OmegaConf.select(read_yaml(config_of(str(ckpt))), "model.params.cond_stage_config")
    except UserError:
        return None  # the report then shows token ids instead of words
    if not isinstance(node, Mapping):
        return None
    params = node.get("params") or {}
    default = "bert-base-uncased" if "BERT" in str(node.get("target")) else "openai/clip-vit-large-patch14"
    return known_folder(str(params.get("version") or params.get("tokenizer") or default))


def _report_lines(
    file: Path, learned: LearnedEmbeddings, reports: Sequence[ConceptReport], tables: Mapping[str, Tensor]
) -> Iterator[str]:
    """The report on one file, as text."""
    yield f"{file}: {learned.format}"
    for report in reports:
        part = f" ({report.part})" if report.part else ""
        count = f"{report.vectors} vector{'s' if report.vectors > 1 else ''}"
        norms = ", ".join(f"{norm:.3f}" for norm in report.norms)
        spread = report.vocabulary_norms
        vocabulary = f" (vocabulary: {spread.low:.3f} to {spread.high:.3f})" if spread else ""
        yield f"  trigger     {report.trigger}{part}"
        yield f"  vectors     {count}, {report.width} wide: for {report.models}"
        yield f"  norms       {norms}{vocabulary}"
        if tables and report.nearest is None:
            widths = " and ".join(f"{table.shape[1]} wide" for table in tables.values())
            yield f"  nearest     not known: the checkpoint's vocabulary is {widths}"
        for index, row in enumerate(report.nearest or ()):
            near = ", ".join(f"{word} {similarity:.2f}" for word, similarity in row)
            yield f"  nearest {index + 1:<3} {near}"
    yield from _metadata_lines(learned.metadata)


def _metadata_lines(metadata: Metadata) -> Iterator[str]:
    for key, value in metadata.known().items():
        yield f"  {key.replace('_', ' '):<11} {value}"


def _make_parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("inspect", help="report what files contain")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE")
    command.add_argument(
        "--ckpt_path", type=in_checkout, help="model (file, folder or hub id) to compare with its vocabulary"
    )
    command.add_argument(
        "--tokenizer",
        type=Path,
        help="folder with the vocabulary's words (and weights); default: that of the checkpoint's config",
    )
    command.add_argument(
        "--words", type=positive, default=5, help="number of nearest words to show (default: 5)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=inspect)

    command = commands.add_parser("convert", help="write a file in another tool's format")
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("--to", required=True, choices=FORMAT_NAMES, help="the format")
    command.add_argument("--trigger", help="new prompt word")
    command.add_argument(
        "--encoder", help="the text encoder, if the file does not name it: bert, clip_g, ..."
    )
    command.add_argument("--preview", type=Path, help="image for a1111-png")
    command.add_argument("--tokenizer", type=Path, metavar="FOLDER", help=_TOKENIZER_HELP)
    _add_output(command, "file to write, or folder if several files are written")
    command.set_defaults(run=convert)

    command = commands.add_parser("merge", help="merge several files into one")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE")
    command.add_argument(
        "--to", default="original", choices=FORMAT_NAMES, help="the format (default: original)"
    )
    command.add_argument("--rename", action="append", metavar="OLD=NEW", help=_RENAME_HELP)
    command.add_argument(
        "--auto_rename", action="store_true", help="name a conflicting trigger after its file"
    )
    command.add_argument("--tokenizer", type=Path, metavar="FOLDER", help=_TOKENIZER_HELP)
    _add_output(command, "file to write, or folder for formats of one word per file", required=True)
    command.set_defaults(run=merge)

    command = commands.add_parser("split", help="write every word of a file to its own file")
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("--to", default="safetensors", choices=FORMAT_NAMES, help="default: safetensors")
    _add_output(command, "folder to write to (default: the file's)")
    command.set_defaults(run=split)

    command = commands.add_parser("transfer", help="move a word to another model, as a start for training")
    command.add_argument("file", type=Path, metavar="FILE")
    model = "a checkpoint, a folder as diffusers writes it, or a hub id"
    command.add_argument(
        "--from", dest="source", type=in_checkout, required=True, metavar="MODEL", help=f"its model: {model}"
    )
    command.add_argument(
        "--to",
        dest="target",
        type=in_checkout,
        required=True,
        metavar="MODEL",
        help="the model that it will be for",
    )
    command.add_argument(
        "-o",
        "--out",
        "--output",
        dest="output",
        type=Path,
        required=True,
        metavar="FILE",
        help="file to write: .safetensors, or .pt for the original's format",
    )
    command.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    command.set_defaults(run=transfer)
    return parser


def _add_output(parser: argparse.ArgumentParser, text: str, required: bool = False) -> None:
    parser.add_argument("-o", "--output", type=Path, required=required, metavar="PATH", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def _make_merge_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog, description=_MERGE_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--manager_ckpts", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output_path", type=Path, required=True, metavar="FILE")
    parser.add_argument("--rename", action="append", metavar="OLD=NEW", help=_RENAME_HELP)
    parser.add_argument(
        "--auto_rename", action="store_true", help="name a conflicting trigger after its file: <dog>"
    )
    parser.add_argument(
        "--use_bert",
        action="store_true",
        help="the vectors are for LDM's BERT; needed for a file that does not name its text encoder",
    )
    # The original built the whole text encoder to find one token id; embedding files name what they are for.
    parser.add_argument(
        "-sd", "--stable_diffusion", action="store_true", help="accepted for old commands; not needed"
    )
    parser.add_argument("--config", help="accepted for old commands; not needed")
    return parser
