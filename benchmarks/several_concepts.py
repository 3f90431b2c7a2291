"""The cost of a concept when 1, 2, 4 or 8 are learned in one run, each of its images with its own word.

    python -m benchmarks.several_concepts

The same creatures are learned in runs of 1, 2, 4 and 8: eight runs, four, two and one. A run has the same steps and the
same batch whatever the number, so that a batch of 8 has 8, 4, 2 or 1 images of each concept. The cost is the seconds of
training per concept, and what it does to the likeness of each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from omegaconf import OmegaConf

from benchmarks import runs
from benchmarks.machine import ROOT
from benchmarks.report import Report
from benchmarks.rounds import Quartiles
from benchmarks.scores import Scorer, creatures
from ldm.checkpoint import load_model_from_config
from ldm.commands.base import JUDGE, MODEL, guarded
from ldm.console import Parser, positive
from ldm.embeddings import read, write
from ldm.evaluation.concepts import read_concept
from ldm.evaluation.judge import AttributeJudge
from ldm.files import file_hash, write_text
from ldm.util import UserError

COUNTS = (1, 2, 4, 8)
BASE = ROOT / "configs" / "latent-diffusion" / "txt2img-finetune.yaml"
RECIPE = ROOT / "configs" / "recipes" / "fast.yaml"
# Previews and the fixed loss cost the same for any number of concepts; a run takes all its steps.
QUIET = (
    "lightning.callbacks.image_logger.params.batch_frequency=0",
    "lightning.callbacks.summary_images=null",
    "lightning.callbacks.deterministic_loss=null",
    "lightning.callbacks.progress=null",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, after one line on stderr if it failed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", nargs="+", type=positive, default=COUNTS, help="default: 1 2 4 8")
    parser.add_argument("--steps", type=positive, help="of each run (default: those of fast.yaml)")
    parser.add_argument("--images", type=positive, default=16, help="per identity (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmarks" / "several_concepts")
    runs.add_options(parser)
    return guarded(lambda: several_concepts(parser.parse_args(argv)))


def several_concepts(options: argparse.Namespace) -> None:
    """Train what is missing for each count, score it, and write the table."""
    runs.set_up(options)
    folders, most = creatures(ROOT / "data" / "concepts"), max(options.counts)
    for count in options.counts:
        if most > len(folders) or most % count:
            raise UserError(
                f"--counts {count}: the largest of --counts must be a multiple of it, and at most {len(folders)}"
            )
    steps = options.steps or int(OmegaConf.select(OmegaConf.load(RECIPE), "lightning.trainer.max_steps"))
    settings: dict[str, Any] = {
        "model": file_hash(MODEL / "model.safetensors")[:12],
        "steps": steps,
        "threads": torch.get_num_threads(),
        "images": options.images,
        "concepts": ", ".join(folder.name for folder in folders[:most]),
    }
    yamls, files = [BASE, RECIPE, MODEL / "config.yaml"], [ROOT / JUDGE / "model.safetensors"]
    digest = runs.fingerprint(settings | {"quiet": QUIET}, yamls, files)
    report = Report(
        "several_concepts",
        "Several concepts in one run",
        (
            "concepts",
            "runs",
            "a run, s",
            "per concept, s",
            "ms a step",
            "identity",
            "of the concepts learned alone",
        ),
        settings,
    )

    @cache
    def scorer() -> Scorer:
        model = load_model_from_config(MODEL / "config.yaml", MODEL / "model.safetensors")
        return Scorer(model, AttributeJudge.load(ROOT / JUDGE), options.images)

    found: dict[int, dict[str, Any]] = {}
    for count in options.counts:
        done = []
        for concepts in batched(folders[:most], count):
            folder = options.work / f"{count}-{concepts[0].name}-{digest}"
            path = folder / "result.json"
            if not path.is_file():
                shutil.rmtree(folder, ignore_errors=True)
                seconds, file = train(concepts, steps, folder)
                identity = {one.name: score(scorer(), file, one) for one in concepts}
                write_text(path, json.dumps({"seconds": seconds, "identity": identity}, indent=1))
            done.append(json.loads(path.read_text(encoding="utf-8")))
        found[count] = {
            "seconds": [one["seconds"] for one in done],
            "identity": {name: value for one in done for name, value in one["identity"].items()},
        }
        fill(report, found, steps)
        report.write(options.out)
    print(report.markdown())


def batched(folders: Sequence[Path], count: int) -> list[Sequence[Path]]:
    return [folders[start : start + count] for start in range(0, len(folders), count)]


def train(concepts: Sequence[Path], steps: int, folder: Path) -> tuple[float, Path]:
    """Learn all concepts in one run; returns the seconds of training and the file with the words."""
    yaml = folder / "concepts.yaml"
    params = {
        "placeholder_strings": [word_of(concept) for concept in concepts],
        "initializer_words": [read_concept(concept).init_word or "creature" for concept in concepts],
    }
    config = {
        "data_root": {word_of(concept): str(concept) for concept in concepts},
        "model": {"params": {"personalization_config": {"params": params}}},
    }
    write_text(yaml, OmegaConf.to_yaml(OmegaConf.create(config)))
    words = ["--base", str(BASE), str(RECIPE), str(yaml), "-t", "-l", str(folder / "logs"), "--seed", "0"]
    words += ["--actual_resume", str(MODEL / "model.safetensors"), "--max_steps", str(steps), *QUIET]
    run = runs.prepare(words)
    began = time.perf_counter()
    run.fit()
    return time.perf_counter() - began, run.plan.run.checkpoints / "embeddings.pt"


def word_of(concept: Path) -> str:
    return f"<{concept.name}>"


def score(scorer: Scorer, file: Path, concept: Path) -> float:
    """Return the identity of one of the words of a file."""
    alone = read(file).only(word_of(concept)).renamed({word_of(concept): "*"})
    path = file.with_name(f"{concept.name}.pt")
    write(alone, path, "original")
    return scorer.identity(path, read_concept(concept))


def fill(report: Report, found: Mapping[int, Mapping[str, Any]], steps: int) -> None:
    """Fill in the table; the last column pairs each concept with its run alone, where there are such runs."""
    alone = found.get(1, {}).get("identity", {})
    report.rows = []
    for count, one in found.items():
        pairs = [one["identity"][name] - value for name, value in alone.items()]
        seconds = median(one["seconds"])
        report.rows.append(
            (
                str(count),
                str(len(one["seconds"])),
                f"{seconds:.1f}",
                f"{seconds / count:.1f}",
                f"{1000 * seconds / steps:.0f}",
                f"{mean(one['identity'].values()):.2f}",
                Quartiles.of(pairs).text(2) if pairs and count > 1 else "",
            )
        )
    report.notes = [
        "Training only, the warm start included; the same steps and batch for any number of concepts. Seconds are the "
        "median of the runs, identity is the mean of the same concepts in each row.",
        "The last column has the differences in identity from the concepts' own runs: median and quartiles.",
    ]
    report.data = {"counts": {str(count): one for count, one in found.items()}}


if __name__ == "__main__":
    sys.exit(main())
