"""The methods of configs/personalization under one judge: held-out creatures of which every image can be drawn again.

    python -m benchmarks.methods_table              # continues where it was stopped; takes hours
    python -m benchmarks.methods_table --creatures 1 --seeds 1 --steps 20 --samples 4 --edit_samples 1   # to try
    python -m benchmarks.methods_table --methods one_vector prospect --report_only

Every cell, a method on a creature with a seed, is a run of main.py and one line of cells.jsonl. It is measured again
when the model, the YAMLs or the settings have changed. Edits are judged on prompts that no training uses. Differences
from one vector are paired by creature; their p values are those of a sign-flip test, corrected by Holm's method.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import runs
from benchmarks.machine import ROOT
from benchmarks.report import Report
from benchmarks.scores import Scorer
from ldm.checkpoint import load_model_from_config
from ldm.commands.base import JUDGE, guarded
from ldm.console import Parser, positive
from ldm.evaluation.concepts import ConceptFolder, read_concept
from ldm.evaluation.edits import edits_of
from ldm.evaluation.judge import AttributeJudge
from ldm.files import atomic_write, file_hash
from ldm.modules.methods.core import PROMPTS
from ldm.prompts import OBJECT_TEMPLATES
from ldm.util import UserError
from scripts.make_concepts import creature_concept, write_concept

MODEL = ROOT / "models" / "ldm" / "creatures"
BASE = ROOT / "configs" / "latent-diffusion" / "txt2img-finetune.yaml"
# Held out: nothing is tuned on these indices of the split `concepts`.
FIRST_CREATURE = 9001
BASELINE = "one_vector"
_EIGHT = (
    "model.params.personalization_config.params.num_vectors_per_token=8",
    "model.base_learning_rate=1.25e-3",
)
QUIET = ("lightning.callbacks.image_logger.params.batch_frequency=0", "lightning.trainer.limit_val_batches=0")
FIGURES = ("identity", "edits")
# Above so many creatures, sign flips are drawn rather than all taken.
_MOST_EXACT = 14


@dataclass(frozen=True)
class Method:
    """YAMLs over the finetuning YAML, and overrides; or the words of another method with other dials."""

    yamls: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    of: str | None = None
    dials: Mapping[str, float] = field(default_factory=dict)


def _own(name: str, *overrides: str) -> Method:
    return Method((f"personalization/{name}.yaml",), overrides)


METHODS: dict[str, Method] = {
    BASELINE: _own("one_vector"),
    "eight_vectors": _own("one_vector", *_EIGHT),
    "direction": Method(("recipes/direction.yaml",)),
    "prospect": _own("prospect"),
    "prospect_10": _own("prospect", "model.params.personalization_config.params.stages=10"),
    "xti": _own("xti"),
    "neti": _own("neti"),
    **{f"neti_{kept}_of_128": Method(of="neti", dials={"truncation": kept}) for kept in (96, 64, 32, 16)},
    "output_residual": _own("output_residual"),
    "output_residual_and_vector": _own(
        "output_residual", "model.params.personalization_config.params.learn_input=true"
    ),
    "cross_init": _own("cross_init"),
    "core_one_vector": _own("core", "model.params.personalization_config.params.num_vectors_per_token=1"),
    "core": _own("core", *_EIGHT),
    "dreamartist": _own("dreamartist"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help="default: all"
    )
    parser.add_argument("--creatures", type=positive, default=12, help="default: %(default)s")
    parser.add_argument("--seeds", type=positive, default=2, help="default: %(default)s")
    parser.add_argument("--steps", type=positive, help="default: the YAML's of each method")
    parser.add_argument("--samples", type=positive, default=16, help="default: %(default)s")
    parser.add_argument("--edit_samples", type=positive, default=4, help="per edit (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder (default: the embedded model)")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/methods_table"), help="default: %(default)s"
    )
    parser.add_argument("--report_only", action="store_true", help="measure nothing")
    runs.add_options(parser)
    return guarded(lambda: table(parser.parse_args(argv)))


def table(options: argparse.Namespace) -> None:
    """Measure the cells that are missing, then write the report of all that are there."""
    runs.set_up(options)
    indices = range(FIRST_CREATURE, FIRST_CREATURE + options.creatures)
    concepts = {index: concept_of(options.work, index) for index in indices}
    check_disjoint(concepts.values())
    wanted = list(itertools.product(range(options.seeds), indices, options.methods))
    settings = {name: digest(name, options) for name in options.methods}
    if not options.report_only:
        scorer: Scorer | None = None
        for seed, index, name in wanted:
            if (seed, index, name) in read_cells(options.work, settings):
                continue
            cell = train(options, concepts[index], index, METHODS[name].of or name, seed)
            scorer = scorer or scorer_of(options)
            scorer.dials = dict(METHODS[name].dials)
            cell |= {"creature": index, "method": name, "seed": seed, "settings": settings[name]}
            cell |= scored(scorer, Path(cell.pop("file")), concepts[index])
            with cells_of(options.work).open("a", encoding="utf-8") as file:
                file.write(json.dumps(cell) + "\n")
            print(
                f"{name} on {index}, seed {seed}: identity {cell['identity']:.3f}, edits {cell['edits']:.3f}"
            )
    cells = read_cells(options.work, settings)
    found = {key: cells[key] for key in wanted if key in cells}
    if not found:
        raise UserError(f"no cell is measured in '{options.work}'; leave --report_only out")
    report = Report(
        "methods_table",
        f"Methods on {options.creatures} held-out creatures, {options.seeds} seeds",
        COLUMNS,
        {"steps": options.steps or "of the YAMLs", "samples": options.samples, "edits": options.edit_samples},
    )
    fill(report, found)
    print(report.write(options.out))


def concept_of(work: Path, index: int) -> ConceptFolder:
    """The images of a creature, drawn if they are not there."""
    folder = work.absolute() / "concepts" / f"c{index}"
    if not (folder / "concept.json").is_file():
        write_concept(folder, *creature_concept(index), 32)
    return read_concept(folder)


def check_disjoint(concepts: Any) -> None:
    """Check that no prompt that is judged is one that some method trains with."""
    trained = {*OBJECT_TEMPLATES, *PROMPTS}
    for concept in concepts:
        if common := trained & {edit.prompt for edit in edits_of(concept.creature)}:
            raise UserError(f"'{min(common)}' is trained with and judged; change ldm/modules/methods/core.py")


def digest(name: str, options: argparse.Namespace) -> str:
    """What a cell depends on besides creature and seed."""
    method = METHODS[METHODS[name].of or name]
    parts = [BASE, *(ROOT / "configs" / path for path in method.yamls)]
    content = [path.read_text(encoding="utf-8") for path in parts]
    values = [*content, *method.overrides, dict(METHODS[name].dials), options.steps]
    values += [options.samples, options.edit_samples, file_hash(options.model / "model.safetensors")]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def cells_of(work: Path) -> Path:
    return work / "cells.jsonl"


def read_cells(work: Path, settings: Mapping[str, str]) -> dict[tuple[int, int, str], dict[str, Any]]:
    """The cells that were measured with these settings of their methods; a line that was cut off is left out."""
    cells: dict[tuple[int, int, str], dict[str, Any]] = {}
    lines = cells_of(work).read_text(encoding="utf-8").splitlines() if cells_of(work).is_file() else []
    for line in lines:
        try:
            cell = json.loads(line)
        except ValueError:
            continue
        if settings.get(cell["method"]) == cell["settings"]:
            cells[cell["seed"], cell["creature"], cell["method"]] = cell
    return cells


def train(
    options: argparse.Namespace, concept: ConceptFolder, index: int, name: str, seed: int
) -> dict[str, Any]:
    """Run main.py as a user would, unless its file is there; the file, its size, parameters and whole seconds."""
    stem = options.work.absolute() / "words" / f"c{index}-{name}-s{seed}-{digest(name, options)}"
    record = stem.with_suffix(".json")
    if record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))
    method, folder = METHODS[name], options.work.absolute() / "runs" / stem.name
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, str(ROOT / "main.py"), "--base", str(BASE)]
    command += [str(ROOT / "configs" / path) for path in method.yamls]
    command += ["-t", "-l", str(folder), "--seed", str(seed), "--data_root", str(concept.folder)]
    command += ["--init_word", str(concept.init_word), "--placeholder_string", "*"]
    command += ["--actual_resume", str(options.model / "model.safetensors"), *method.overrides, *QUIET]
    command += ["--max_steps", str(options.steps)] if options.steps else []
    threads = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - started
    found = list(folder.glob("*/checkpoints/embeddings.pt"))
    if done.returncode or len(found) != 1:
        last = ((done.stderr or done.stdout).strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{name} on creature {index} failed: {last[:200]}")
    trained = [line for line in done.stdout.splitlines() if "parameters are trained" in line]
    parameters = int(trained[0].split(" of ")[0].replace(",", "")) if trained else None
    # The file to share: of plain vectors the one in the default format.
    shared = min(found[0].parent.glob("*.safetensors"), key=lambda path: len(path.name))
    atomic_write(stem.with_suffix(".pt"), lambda file: file.write(found[0].read_bytes()))
    cell = {
        "file": str(stem.with_suffix(".pt")),
        "seconds": round(seconds, 1),
        "parameters": parameters,
        "bytes": shared.stat().st_size,
    }
    record.write_text(json.dumps(cell), encoding="utf-8")
    shutil.rmtree(folder)
    return cell


def scorer_of(options: argparse.Namespace) -> Scorer:
    model = load_model_from_config(
        str(options.model / "config.yaml"), str(options.model / "model.safetensors")
    )
    judge = AttributeJudge.load(str(JUDGE))
    return Scorer(model, judge, images=options.samples, edit_images=options.edit_samples)


def scored(scorer: Scorer, file: Path, concept: ConceptFolder) -> dict[str, float]:
    """Identity, attributes and obeyed edits that still show the creature itself."""
    likeness = scorer.likeness(file, concept)
    return {
        "identity": float(likeness["identity"]),
        "attributes": float(likeness["attributes"]),
        "edits": scorer.editability(file, concept),
    }


COLUMNS = (
    "method", "identity", "attributes", "edits", "identity, difference", "p", "edits, difference", "p",
    "seconds", "parameters", "kB", "n",
)  # fmt: skip
Cells = Mapping[tuple[int, int, str], Mapping[str, Any]]


def fill(report: Report, cells: Cells) -> None:
    """Add a row for each method, and what beats one vector on both axes."""
    names = list(dict.fromkeys(name for _, _, name in cells))
    tests = {
        (name, figure): paired(differences(cells, name, figure))
        for name in names
        for figure in FIGURES
        if name != BASELINE and len(differences(cells, name, figure)) > 1
    }
    corrected = holm({key: test[2] for key, test in tests.items()})
    better = []
    for name in names:
        own = [cell for (_, _, method), cell in cells.items() if method == name]
        row = [
            name,
            *(f"{np.mean([cell[key] for cell in own]):.3f}" for key in ("identity", "attributes", "edits")),
        ]
        for figure in FIGURES:
            key = (name, figure)
            row += ["", ""] if key not in tests else [
                f"{tests[key][0]:+.3f} ± {tests[key][1]:.3f}", f"{corrected[key]:.3f}"
            ]  # fmt: skip
        row.append(f"{np.median([cell['seconds'] for cell in own]):.0f}")
        row += [f"{own[0]['parameters']:,}", f"{own[0]['bytes'] / 1000:.1f}", str(len(own))]
        report.rows.append(row)
        if all(
            (name, figure) in tests and tests[name, figure][0] > 0 and corrected[name, figure] < 0.05
            for figure in FIGURES
        ):
            better.append(name)
    report.data = {"cells": [dict(cell) for cell in cells.values()]}
    report.notes += [
        "identity: 0 is another creature, 1 the same one drawn again; edits: the share of images that show what was "
        "asked for and still the creature; no judged prompt is trained with",
        f"differences from {BASELINE}, paired by creature (means over seeds), with standard errors; p of a sign-flip "
        f"test, corrected for {len(tests)} comparisons by Holm's method",
        f"better than {BASELINE} on both axes at p < 0.05: {', '.join(better) or 'none'}",
        "seconds are those of the whole process of main.py; the dials of NeTI are set on its words, not trained again",
    ]


def differences(cells: Cells, name: str, figure: str) -> list[float]:
    """For each creature, the mean over seeds of the difference from one vector with the same seed."""
    by_creature: dict[int, list[float]] = {}
    for (seed, creature, method), cell in cells.items():
        base = cells.get((seed, creature, BASELINE))
        if method == name and base is not None:
            by_creature.setdefault(creature, []).append(cell[figure] - base[figure])
    return [float(np.mean(values)) for values in by_creature.values()]


def paired(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, standard error, and two-sided p of differences by flipping their signs, all ways if they are few."""
    array = np.array(values)
    if len(array) <= _MOST_EXACT:
        signs = np.array(list(itertools.product((1, -1), repeat=len(array))))
    else:
        signs = np.random.default_rng(0).choice((1, -1), (2**_MOST_EXACT, len(array)))
        signs[0] = 1
    means = np.abs(signs @ array) / len(array)
    share = float((means >= abs(array.mean()) - 1e-12).mean())
    return float(array.mean()), float(array.std(ddof=1) / len(array) ** 0.5), share


def holm(values: Mapping[Any, float]) -> dict[Any, float]:
    """Holm's (1979) corrected p values."""
    corrected: dict[Any, float] = {}
    largest = 0.0
    for place, (key, value) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, value * (len(values) - place)))
        corrected[key] = largest
    return corrected


if __name__ == "__main__":
    sys.exit(main())
