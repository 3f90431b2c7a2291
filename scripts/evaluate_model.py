"""Measure what a model makes of learned concepts: likeness, edits, and the paper's CLIP-I and CLIP-T.

    python scripts/evaluate_model.py --concept data/concepts/bobo --embedding_path logs/RUN/checkpoints/embeddings.pt
    python scripts/evaluate_model.py --concept data/concepts --embedding_path 'logs/{name}*/checkpoints/embeddings.pt'
    python scripts/evaluate_model.py --concept my-photos --embedding_path my.pt --features openai/clip-vit-base-patch32

Where a concept.json tells the truth, likeness and edits are measured against it and nothing has to be guessed; of
other pictures the protocol's figures and the shared colours are. Writes evaluation.json, evaluation.md and a sheet.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# a checkout works without being installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.console import Parser
from ldm.util import UsageError
from scripts.common import Profile, guarded
from scripts.judging import add_how, check_files, features_of, judge_of, load_model, sampling_of, sheet_scale


def make_parser() -> Parser:
    profile = Profile()
    parser = Parser(
        prog="evaluate_model.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is evaluated")
    what.add_argument(
        "--ckpt_path", "--ckpt", default=profile.ckpt, metavar="FILE", help="default: %(default)s"
    )
    what.add_argument("--config", metavar="YAML", help="default: config.yaml beside the model")
    what.add_argument(
        "--concept",
        required=True,
        metavar="FOLDER",
        help="pictures of a concept, or a folder of such folders",
    )
    word = what.add_mutually_exclusive_group(required=True)
    word.add_argument(
        "--embedding_path",
        metavar="FILE",
        help="what was learned; for several concepts with {name} for theirs (* and ? are wildcards, the newest "
        "match counts), or a folder with a file or run of each concept's name",
    )
    word.add_argument(
        "--word", metavar="TEXT", help='words in place of a learned one, as "a robot": a baseline'
    )
    what.add_argument(
        "--prompt", nargs="+", default=[], metavar="TEXT", help='more prompts, "{}" where the concept goes'
    )
    what.add_argument("--no_edits", action="store_true", help="only likeness and the prompts given")

    add_how(parser, samples=64, steps=50, scale=5.0)
    parser.add_argument(
        "--outdir", type=Path, default=Path("outputs/evaluation"), help="default: %(default)s"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, after one line on stderr if it failed."""
    return guarded(lambda: run(make_parser().parse_args(argv)))


def run(options: argparse.Namespace) -> None:
    """Check all that can be checked without the model, load it, measure and write."""
    check_files(options.ckpt_path, options.config)

    from ldm import console
    from ldm.embeddings import read
    from ldm.evaluation.concepts import find_concepts, find_embedding, read_concept

    console.set_up_logging()
    sampling = sampling_of(options)
    concepts = [read_concept(folder) for folder in find_concepts(options.concept)]
    place, several = options.embedding_path, len(concepts) > 1
    files = [find_embedding(place, one.name, several) if place else None for one in concepts]
    learned = [read(file).triggers if file else [] for file in files]
    check_prompts(options.prompt, learned)
    sources, judge = features_of(options), judge_of(options)
    evaluate(options, sampling, list(zip(concepts, files, learned, strict=True)), sources, judge)


def check_prompts(prompts: Sequence[str], learned: Sequence[Sequence[str]]) -> None:
    """Every prompt has to mention the concept, and no placeholder besides."""
    from ldm.generate.embeddings import check_mentions

    for triggers in learned:
        for prompt in prompts:
            if "{}" not in prompt and not any(name.lower() in prompt.lower() for name in triggers):
                raise UsageError(
                    f'--prompt "{prompt}" does not mention the concept; write {{}} where it goes'
                )
        check_mentions([prompt.replace("{}", "") for prompt in prompts], triggers)


def evaluate(
    options: argparse.Namespace,
    sampling: Any,
    concepts: Sequence[tuple[Any, Path | None, list[str]]],
    sources: Sequence[str],
    judge_at: str | None,
) -> None:
    """Load everything, measure concept after concept, write three files and print their paths."""
    from tqdm import tqdm

    from ldm.evaluation.evaluate import Evaluation, evaluation_prompts
    from ldm.evaluation.judge import AttributeJudge
    from ldm.evaluation.measures import mean_figures
    from ldm.evaluation.report import versions
    from ldm.files import file_hash
    from ldm.generate import load_embeddings
    from ldm.models.features import load_features

    true = any(one.creature or one.style for one, _, _ in concepts)
    judge = AttributeJudge.load(judge_at) if judge_at and true else None
    model, size = load_model(options.ckpt_path, options.config)
    extractors = [load_features(source, model.device) for source in sources]
    bench = Evaluation(model, sampling, judge, extractors, size)
    asked = [
        evaluation_prompts(one, options.prompt, not options.no_edits, size, judge) for one, _, _ in concepts
    ]
    found: dict[str, Any] = {}
    rows: list[Any] = []
    total = options.samples * sum(map(len, asked))
    with tqdm(total=total, unit="picture", desc="generating", disable=None) as bar:
        for (concept, file, triggers), prompts in zip(concepts, asked, strict=True):
            bar.set_postfix_str(concept.name)
            if file:
                load_embeddings(model, file)
            word = triggers[0] if triggers else options.word
            figures, shown = evaluate_one(
                bench, concept, prompts, word, triggers, options.samples, bar.update
            )
            truth = "creature" if concept.creature else "style" if concept.style else "none"
            found[concept.name] = {"truth": truth, "embedding": file and str(file), "word": word} | figures
            rows += [(f"{concept.name}: {label}", pictures) for label, pictures in shown]
    told = [
        f"judge: {judge_at if judge else 'none, so that attributes, scenes and styles are not read'}",
        f"features: {', '.join(sources) or 'none, so that there is no CLIP-I and CLIP-T; name some with --features'}",
    ]
    if not all(one.creature or one.style for one, _, _ in concepts):
        told.append(
            "without concept.json there is no truth: only the protocol and the shared colours are measured"
        )
    settings = dataclasses.asdict(sampling) | {"samples": options.samples, "model": options.ckpt_path}
    settings["model_sha256"] = file_hash(options.ckpt_path)
    likeness = [next(iter(figures["prompts"].values())) for figures in found.values()]
    content = {
        "versions": versions(),
        "settings": settings | {"judge": judge_at if judge else None, "features": list(sources)},
        "concepts": found,
        "mean_likeness": mean_figures(likeness),
    }
    for path in write(options.outdir, content, told, rows):
        print(path)


def evaluate_one(
    bench: Any, concept: Any, asked: Sequence[Any], word: str, triggers: list[str], samples: int, done: Any
) -> tuple[dict[str, Any], list[Any]]:
    """A concept's figures, with what they are to be compared with, and its rows of the sheet."""
    prompts, shown = bench.measure(concept, asked, word, triggers, samples, done)
    references, drawn = bench.measure_baselines(concept)
    styled = [one.styled for one in asked if one.styled]
    figures = {"prompts": prompts, "references": references}
    if concept.creature:
        figures["calibration"] = bench.creature_reference(concept.creature).calibration()
    drawn += [
        (f"truth of: {one.prompt.format('the style')}", one.images[: len(shown[0][1])]) for one in styled
    ]
    return figures, [("learned from", concept.images), *shown, *drawn]


def write(outdir: Path, content: dict[str, Any], told: Sequence[str], rows: Sequence[Any]) -> list[Path]:
    """evaluation.json, evaluation.md and evaluation.png."""
    from ldm.evaluation.report import concept_report, sheet
    from ldm.files import write_text
    from ldm.generate.images import save_image

    settings = ", ".join(f"{key} {value}" for key, value in content["settings"].items())
    parts = ["# Evaluation\n", *(f"- {line}" for line in told), f"- {settings}\n"]
    parts += [concept_report(name, figures) for name, figures in content["concepts"].items()]
    return [
        write_text(outdir / "evaluation.json", json.dumps(content, indent=1) + "\n"),
        write_text(outdir / "evaluation.md", "\n".join(parts)),
        save_image(sheet(rows, scale=sheet_scale(rows)), outdir / "evaluation.png"),
    ]


if __name__ == "__main__":
    sys.exit(main())
