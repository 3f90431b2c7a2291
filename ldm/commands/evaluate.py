"""The command that measures learned concepts, scripts/evaluate_model.py, and options shared with further studies."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import console
from ldm.commands.base import (
    JUDGE,
    WEIGHTS,
    add_dial_option,
    check_files,
    check_model,
    guarded,
    load_latent_diffusion,
    naming_the_checkpoint,
)
from ldm.console import Parser, argument, write_line
from ldm.files import in_checkout, why_no_folder
from ldm.util import UsageError, UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from ldm.evaluation.concepts import ConceptFolder
    from ldm.evaluation.evaluate import Evaluation, EvaluationPrompt, Rows, Sampling
    from ldm.models.diffusion.ddpm import LatentDiffusion

_DESCRIPTION = """Measure learned concepts in generated images: likeness, edits, and the paper's CLIP-I and CLIP-T.

    %(prog)s --concept data/concepts/bobo --embedding_path logs/RUN/checkpoints/embeddings.pt
    %(prog)s --concept data/concepts --embedding_path 'logs/{name}*/checkpoints/embeddings.pt'
    %(prog)s --concept my-photos --embedding_path my.pt --features openai/clip-vit-base-patch32

If a folder has a concept.json, which describes the concept exactly, likeness and edits are measured against that
description. For other images only CLIP-I, CLIP-T and the shared colours are measured. Writes evaluation.json,
evaluation.md and a contact sheet."""

NONE = "none"


def main(argv: Sequence[str] | None = None, prog: str = "evaluate_model.py") -> int:
    """Run the command line of scripts/evaluate_model.py; returns the exit code."""
    return guarded(lambda: run(make_parser(prog).parse_args(argv)))


def make_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is evaluated")
    what.add_argument(
        "--ckpt_path",
        "--ckpt",
        type=in_checkout,
        default=WEIGHTS,
        metavar="MODEL",
        help="default: %(default)s",
    )
    what.add_argument(
        "--config", type=in_checkout, metavar="YAML", help="default: config.yaml beside the model"
    )
    what.add_argument(
        "--concept",
        required=True,
        metavar="FOLDER",
        help="images of a concept, or a folder of such folders",
    )
    word = what.add_mutually_exclusive_group(required=True)
    word.add_argument(
        "--embedding_path",
        metavar="FILE",
        help="the learned embedding; for several concepts a path with {name} in place of their names (* and ? are "
        "wildcards, the newest match is used), or a folder with a file or run named after each concept",
    )
    word.add_argument(
        "--word", metavar="TEXT", help='words in place of a learned one, as "a robot": a baseline'
    )
    add_dial_option(what)
    what.add_argument(
        "--prompt", nargs="+", default=[], metavar="TEXT", help='further prompts, with "{}" for the concept'
    )
    what.add_argument(
        "--no_edits", action="store_true", help="measure only likeness and the prompts of --prompt"
    )
    add_sampling_options(parser, samples=64, steps=50, scale=5.0)
    parser.add_argument(
        "--outdir", type=Path, default=Path("outputs/evaluation"), help="default: %(default)s"
    )
    return parser


def add_sampling_options(parser: argparse.ArgumentParser, samples: int, steps: int, scale: float) -> None:
    """Add the options for generating and judging images, with a command's own defaults."""
    how = parser.add_argument_group("generating")

    def number(flag: str, kind: type, default: float, name: str, help: str = "") -> None:
        text = f"{help} (default: %(default)s)" if help else "default: %(default)s"
        how.add_argument(flag, type=argument(name, kind), default=default, metavar="N", help=text)

    number("--samples", int, samples, "samples", "per prompt")
    number("--ddim_steps", int, steps, "ddim_steps")
    number("--scale", float, scale, "scale", "guidance scale")
    how.add_argument("--dpm_solver", action="store_true", help="DPM-Solver++ instead of DDIM")
    number("--seed", int, 42, "image_seed")
    number("--batch_size", int, 8, "batch_size")
    how.add_argument("--precision", choices=("full", "autocast"), default="full", help="default: %(default)s")
    judging = parser.add_argument_group("judging")
    judging.add_argument(
        "--features",
        nargs="+",
        metavar="NAME",
        help="CLIP or DINO models, as folders or hub names (default: the folder `towers` beside the model, if it "
        "exists)",
    )
    judging.add_argument(
        "--judge",
        metavar="FOLDER",
        help=f"model that classifies attributes, or {NONE} (default: {JUDGE}, if it exists)",
    )


def sampling_of(options: argparse.Namespace) -> Sampling:
    """The `Sampling` that the options describe; UserError for a setting out of range."""
    from ldm.evaluation.evaluate import Sampling

    return Sampling(
        steps=options.ddim_steps,
        scale=options.scale,
        sampler="dpm_solver" if options.dpm_solver else "ddim",
        seed=options.seed,
        batch_size=options.batch_size,
        precision=options.precision,
    )


def features_of(options: argparse.Namespace) -> list[str]:
    """The sources of --features, by default the towers beside the model; checked, but not loaded."""
    from ldm.files import check_features

    towers = Path(options.ckpt_path).with_name("towers")
    sources = list(options.features or ([str(towers)] if towers.is_dir() else []))
    for source in sources:
        check_features(source)
    return sources


def judge_of(options: argparse.Namespace) -> str | None:
    """The folder of --judge, by default the shipped judge if it is there; None for no judge."""
    folder, shipped = options.judge, in_checkout(str(JUDGE))
    if folder == NONE or (folder is None and not Path(shipped).is_dir()):
        return None
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--judge '{folder}' does not exist; name a folder with a judge, or {NONE}")
    return folder or shipped


def load_model(ckpt: str, config: str | None) -> tuple[LatentDiffusion, int]:
    """The model, on the GPU if there is one, and the side length in pixels for renderings to compare with."""
    from ldm.base_models import read_config
    from ldm.generate.images import downsampling_factor, latent_shape

    model = load_latent_diffusion(read_config(ckpt, config), ckpt)
    side = max(latent_shape(model, None, None)[1:]) * downsampling_factor(model)
    return model, min(side, 128)


def sheet_scale(rows: Rows) -> int:
    """The factor by which to enlarge the images of labelled rows so that small ones can be seen."""
    return max(1, 96 // max(image.width for _, images in rows for image in images))


def run(options: argparse.Namespace) -> None:
    """Check everything that can be checked without the model, load it, measure and write."""
    check_model(options.ckpt_path)
    check_files(options.config)
    if options.dial and options.word:
        raise UsageError(f"--dial {options.dial[0][0]} is for learned words; remove it, or --word")

    console.set_up_logging()
    with console.importing():
        from ldm.base_models import check_weights, config_of, read_config
        from ldm.embeddings.method_files import triggers_of
        from ldm.evaluation.concepts import find_concepts, find_embedding, read_concept
        from ldm.generate.request import check_dials, check_encoder

    if reason := why_no_folder(options.outdir):
        raise UserError(f"cannot write to the folder '{options.outdir}' ({reason}); choose another")
    concepts = [read_concept(folder) for folder in find_concepts(options.concept)]
    place, several = options.embedding_path, len(concepts) > 1
    files = [find_embedding(place, concept.name, several) if place else None for concept in concepts]
    triggers = [triggers_of(file) if file else [] for file in files]
    check_prompts(options.prompt, triggers)
    sources, judge = features_of(options), judge_of(options)
    options.config = options.config or config_of(options.ckpt_path)
    config = read_config(options.ckpt_path, options.config)
    check_weights(config["model"], options.ckpt_path)
    for file in filter(None, files):
        check_encoder(config, [file])
        check_dials(config, [file], dict(options.dial))
    evaluated = [EvaluatedConcept(*parts) for parts in zip(concepts, files, triggers, strict=True)]
    with naming_the_checkpoint(options.ckpt_path):
        evaluate(options, config, evaluated, sources, judge)


@dataclasses.dataclass(frozen=True)
class EvaluatedConcept:
    """A concept to evaluate, its embedding file if any, and the placeholders in that file."""

    concept: ConceptFolder
    file: Path | None
    triggers: list[str]


def check_prompts(prompts: Sequence[str], learned: Sequence[Sequence[str]]) -> None:
    """Raise UserError for a prompt that does not mention the concept, or mentions another placeholder."""
    from ldm.generate.request import check_mentions

    for triggers in learned:
        for prompt in prompts:
            if "{}" not in prompt and not any(name.lower() in prompt.lower() for name in triggers):
                raise UsageError(
                    f'--prompt "{prompt}" does not mention the concept; write {{}} where it goes'
                )
        check_mentions([prompt.replace("{}", "") for prompt in prompts], triggers)


def evaluate(
    options: argparse.Namespace,
    config: DictConfig,
    evaluated: Sequence[EvaluatedConcept],
    sources: Sequence[str],
    judge_folder: str | None,
) -> None:
    """Load everything, measure one concept after another, write three files and print their paths."""
    from tqdm import tqdm

    from ldm.base_models import check_classes
    from ldm.evaluation.evaluate import Evaluation, evaluation_prompts
    from ldm.evaluation.judge import AttributeJudge
    from ldm.evaluation.measures import mean_figures
    from ldm.evaluation.report import versions
    from ldm.files import file_hash
    from ldm.generate import load_embeddings
    from ldm.generate.embeddings import dials_at
    from ldm.generate.request import read_all
    from ldm.models.features import load_features

    sampling = sampling_of(options)
    check_classes(config, options.config)
    for file in {one.file for one in evaluated if one.file}:
        read_all(config, [file])
    described = [bool(one.concept.creature or one.concept.style) for one in evaluated]
    judge = AttributeJudge.load(judge_folder) if judge_folder and any(described) else None
    model, size = load_model(options.ckpt_path, options.config)
    extractors = [load_features(source, model.device) for source in sources]
    evaluation = Evaluation(model, sampling, judge, extractors, size)
    asked = [
        evaluation_prompts(one.concept, options.prompt, not options.no_edits, size, judge)
        for one in evaluated
    ]
    dials = dict(options.dial)
    results: dict[str, Any] = {}
    rows: Rows = []
    total = options.samples * sum(map(len, asked))
    with tqdm(total=total, unit="image", desc="generating", disable=None) as bar:
        for one, prompts in zip(evaluated, asked, strict=True):
            concept = one.concept
            bar.set_postfix_str(concept.name)
            if one.file:
                load_embeddings(model, one.file)
            word = one.triggers[0] if one.triggers else options.word
            with dials_at(model, dials):
                figures, shown = evaluate_one(evaluation, one, prompts, word, options.samples, bar.update)
            truth = "creature" if concept.creature else "style" if concept.style else "none"
            embedding = one.file and str(one.file)
            results[concept.name] = {"truth": truth, "embedding": embedding, "word": word} | figures
            rows += [(f"{concept.name}: {label}", images) for label, images in shown]
    notes = [
        f"judge: {judge_folder if judge else 'none, so attributes, scenes and styles are not classified'}",
        f"features: {', '.join(sources) or 'none, so there is no CLIP-I and CLIP-T; name some with --features'}",
    ]
    if not all(described):
        notes.append("without concept.json only CLIP-I, CLIP-T and the shared colours are measured")
    settings = dataclasses.asdict(sampling) | {"samples": options.samples, "model": options.ckpt_path}
    if dials:
        settings["dials"] = dials
    if Path(options.ckpt_path).is_file():
        settings["model_sha256"] = file_hash(options.ckpt_path)
    likeness = [next(iter(figures["prompts"].values())) for figures in results.values()]
    content = {
        "versions": versions(),
        "settings": settings | {"judge": judge_folder if judge else None, "features": list(sources)},
        "concepts": results,
        "mean_likeness": mean_figures(likeness),
    }
    for path in write(options.outdir, content, notes, rows):
        write_line(str(path))


def evaluate_one(
    evaluation: Evaluation,
    one: EvaluatedConcept,
    prompts: Sequence[EvaluationPrompt],
    word: str,
    samples: int,
    done: Callable[[], object],
) -> tuple[dict[str, Any], Rows]:
    """The figures of a concept with their references for comparison, and its rows of the contact sheet."""
    concept = one.concept
    measured, shown = evaluation.measure(concept, prompts, word, one.triggers, samples, done)
    references, drawn = evaluation.measure_baselines(concept)
    figures: dict[str, Any] = {"prompts": measured, "references": references}
    if concept.creature:
        figures["calibration"] = evaluation.creature_reference(concept.creature).calibration()
    drawn += [
        (f"truth of: {styled.prompt.format('the style')}", styled.images[: len(shown[0][1])])
        for styled in (prompt.styled for prompt in prompts)
        if styled
    ]
    return figures, [("learned from", concept.images), *shown, *drawn]


def write(outdir: Path, content: dict[str, Any], notes: Sequence[str], rows: Rows) -> list[Path]:
    """Write evaluation.json, evaluation.md and evaluation.png; returns their paths."""
    from ldm.evaluation.report import concept_report, sheet
    from ldm.files import write_text
    from ldm.generate.images import save_image

    settings = ", ".join(f"{key} {value}" for key, value in content["settings"].items())
    parts = ["# Evaluation\n", *(f"- {line}" for line in notes), f"- {settings}\n"]
    parts += [concept_report(name, figures) for name, figures in content["concepts"].items()]
    return [
        write_text(outdir / "evaluation.json", json.dumps(content, indent=1) + "\n"),
        write_text(outdir / "evaluation.md", "\n".join(parts)),
        save_image(sheet(rows, scale=sheet_scale(rows)), outdir / "evaluation.png"),
    ]
