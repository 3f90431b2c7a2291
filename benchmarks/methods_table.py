"""The methods of configs/personalization under one judge: held-out creatures of which every image can be drawn again.

    python -m benchmarks.methods_table --estimate                      # how many hours it takes
    python -m benchmarks.methods_table --threads 1 --nice --hours 9    # overnight; continues where it was stopped
    python -m benchmarks.methods_table --creatures 1 --seeds 1 --steps 20 --samples 4 --edit_samples 1   # to try
    python -m benchmarks.methods_table --tuning --creatures 3 --seeds 1 --methods one_vector prospect \\
        --variant "prospect_slow=prospect model.base_learning_rate=1e-3"

Every cell, a method on a creature with a seed, is a run of main.py and one line of cells.jsonl. It is measured again
when the model, the YAMLs or the settings have changed; a change of code is not seen. All methods of a creature follow
each other, so that a table that was stopped compares the same creatures; a run that fails does not stop the others.
Means are over creatures that all methods have; a choice of methods is reported as methods_chosen. Time is the
processor time of main.py's process, which other programs on the machine change little. Edits are judged on prompts
whose words for backgrounds and styles no training uses. Differences from one vector are paired by creature; their p
values are those of a sign-flip test, corrected by Holm's method. Nothing is tuned on creatures of the table:
`--tuning` has its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import runs
from benchmarks.machine import ROOT
from benchmarks.report import RESULTS, Report
from benchmarks.rounds import holm, paired
from benchmarks.scores import Scorer
from ldm.checkpoint import load_model_from_config
from ldm.commands.base import JUDGE, guarded
from ldm.console import Parser, positive
from ldm.data.creatures.renderer import render_with_masks
from ldm.data.creatures.world import COLORS
from ldm.evaluation.concepts import ConceptFolder, read_concept
from ldm.evaluation.edits import edits_of
from ldm.evaluation.judge import AttributeJudge
from ldm.files import atomic_write, write_text
from ldm.modules.methods.core import PROMPTS
from ldm.prompts import OBJECT_TEMPLATES
from ldm.training.callbacks.summary_images import Curve, draw_curves
from ldm.util import UserError, shown
from scripts.make_concepts import creature_concept, write_concept

MODEL = ROOT / "models" / "ldm" / "creatures"
# The second keeps the steps of all methods at those of the cells that are there, whatever the default is.
BASES = (
    ROOT / "configs" / "latent-diffusion" / "txt2img-finetune.yaml",
    ROOT / "benchmarks" / "methods_table.yaml",
)
# Indices of the split `concepts`: held out, and for choosing rates and the like.
FIRST_CREATURE, FIRST_OF_TUNING, MOST_OF_TUNING = 9001, 100, 30
BASELINE = "one_vector"
# Of eight vectors: half of the rate of one.
_HALF_RATE = "model.base_learning_rate=1.25e-3"
QUIET = ("lightning.callbacks.image_logger.params.batch_frequency=0", "lightning.trainer.limit_val_batches=0")
FIGURES = ("identity", "edits")
CELL = ("seed", "creature", "method", "settings")
# By seed, creature and method.
Cells = Mapping[tuple[int, int, str], Mapping[str, Any]]
# What the table is to show: these shares of the first stage's identity and of all edits.
BARS = {"identity": 0.95, "edits": 0.95}
# Processor seconds of a cell, training and scores, before any is measured.
SECONDS_OF_A_CELL = 70.0


@dataclass(frozen=True)
class Method:
    """YAMLs over the finetuning YAML, and overrides; or the words of another method with other dials.

    reference: nothing is trained: "words" is the best caption of the creature, "first_stage" renderings of it.
    """

    yamls: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    of: str | None = None
    dials: Mapping[str, float] = field(default_factory=dict)
    reference: str = ""


def _own(name: str, *overrides: str) -> Method:
    return Method((f"personalization/{name}.yaml",), overrides)


def _vectors(count: int) -> str:
    return f"model.params.personalization_config.params.num_vectors_per_token={count}"


# The settings of a dial, from what is learned on; the method itself is the first point of its curve.
CURVES: dict[str, tuple[str, float, tuple[float, ...]]] = {
    "neti": ("truncation", 128, (96, 64, 48, 32, 16, 8, 0)),
    "prospect_residual": ("strength", 1.0, (0.8, 0.6, 0.4, 0.2)),
}
METHODS: dict[str, Method] = {
    BASELINE: _own("one_vector"),
    "one_vector_masked": _own("one_vector", "data.params.train.params.mask_weight=0.1"),
    "eight_vectors": _own("one_vector", _vectors(8), _HALF_RATE),
    "direction": Method(("recipes/direction.yaml",)),
    "fast": Method(("recipes/fast.yaml",)),
    "prospect": _own("prospect"),
    "prospect_10": _own("prospect", "model.params.personalization_config.params.stages=10"),
    "prospect_core": _own("prospect_core"),
    "prospect_residual": _own("prospect_residual"),
    "prospect_residual_fast": Method(("personalization/prospect_residual.yaml", "recipes/fast.yaml")),
    "prospect_residual_keys": _own(
        "prospect_residual", "model.params.personalization_config.params.residual_keys=true"
    ),
    "xti": _own("xti"),
    "grid": _own("grid"),
    "neti": _own("neti"),
    "neti_fast": _own("neti_fast"),
    "output_residual": _own("output_residual"),
    "cross_init": _own("cross_init"),
    "core_one_vector": _own("core", _vectors(1)),
    "core": _own("core", _HALF_RATE),
    "core_masked": _own("core_masked", _HALF_RATE),
    "dreamartist": _own("dreamartist"),
    **{
        f"{name} {dial}={value:g}": Method(of=name, dials={dial: value})
        for name, (dial, _, values) in CURVES.items()
        for value in values
    },
    "words": Method(reference="words"),
    "first_stage": Method(reference="first_stage"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"default: all of {', '.join(METHODS)}")
    parser.add_argument("--creatures", type=positive, default=12, help="default: %(default)s")
    parser.add_argument("--seeds", type=positive, default=2, help="default: %(default)s")
    parser.add_argument("--steps", type=positive, help="default: the YAML's of each method")
    parser.add_argument("--samples", type=positive, default=16, help="default: %(default)s")
    parser.add_argument("--edit_samples", type=positive, default=4, help="per edit (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder (default: the embedded model)")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/methods_table"), help="default: %(default)s"
    )
    parser.add_argument("--hours", type=float, help="begin no cell after so many hours (default: all cells)")
    parser.add_argument("--nice", action="store_true", help="run at the lowest priority")
    parser.add_argument("--report_only", action="store_true", help="measure nothing")
    parser.add_argument("--estimate", action="store_true", help="say how many cells are missing, and stop")
    parser.add_argument(
        "--tuning",
        action="store_true",
        help=f"creatures from {FIRST_OF_TUNING} on, at most {MOST_OF_TUNING}, and a report of its own",
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar='"NAME=METHOD KEY=VALUE ..."',
        help="a method with other settings, with --tuning only",
    )
    runs.add_options(parser)
    return guarded(lambda: table(parser.parse_args(argv)))


def table(options: argparse.Namespace) -> None:
    """Measure the cells that are missing, then write the report of all that are there."""
    runs.set_up(options)
    if options.nice and hasattr(os, "nice"):
        os.nice(19)
    bench = Bench(options, methods_of(options))
    if options.estimate:
        missing, hours = bench.left()
        print(f"{missing} cells are missing, about {hours:.1f} hours of processor time")
        return
    if not options.report_only:
        bench.measure()
    cells = bench.cells()
    found = {key: cells[key] for key in bench.wanted if key in cells}
    if not found:
        raise UserError(f"no cell is measured in '{options.work}'; leave --report_only out")
    if not (whole := bench.complete(found)):
        print("no creature has all of its cells yet, so there is no report; the same command goes on")
        return
    kind = ("methods_tuning", "Tuning") if options.tuning else ("methods_table", "Methods")
    if options.methods and not options.tuning:  # the full table corrects for all methods
        kind = ("methods_chosen", "Some methods")
    report = Report(
        kind[0],
        f"{kind[1]} on {options.creatures} creatures from {bench.indices[0]} on, {options.seeds} seeds",
        COLUMNS,
        {
            "steps": options.steps or "of the YAMLs",
            "samples": options.samples,
            "edits": options.edit_samples,
            "threads of a run": torch.get_num_threads(),
        },
    )
    fill(report, whole)
    # What is not asked for now stays there for the next time.
    kept = {tuple(cell[key] for key in CELL): cell for cell in [*bench.reported(), *found.values()]}
    report.data = {"cells": [dict(cell) for cell in kept.values()]}
    if left := len(found) - len(whole):
        report.notes.append(f"left out are {left} cells of creatures and seeds that not all methods have yet")
    report.notes += [f"variant {text}" for text in options.variant]
    print(report.write(options.out))
    for name in () if options.tuning else CURVES:
        draw_dial(name, whole, options.out or RESULTS)


def methods_of(options: argparse.Namespace) -> dict[str, Method]:
    """The methods to measure, with the variants of the command line.

    Raises:
        UserError: one is unknown or a variant is not written so, or variants are not of tuning.
    """
    known = dict(METHODS)
    if options.variant and not options.tuning:
        raise UserError(
            "--variant needs --tuning: what is chosen on the table's creatures cannot be reported on them"
        )
    if options.tuning and options.creatures > MOST_OF_TUNING:
        raise UserError(f"--creatures is {options.creatures}; --tuning has {MOST_OF_TUNING}")
    for text in options.variant:
        head, *overrides = text.split()
        name, _, method = head.partition("=")
        if method not in METHODS or not METHODS[method].yamls:
            raise UserError(
                f"--variant '{shown(text)}': write it as \"NAME=METHOD KEY=VALUE ...\", with a method that is trained"
            )
        known[name] = Method(METHODS[method].yamls, (*METHODS[method].overrides, *overrides))
    asked = options.methods or list(known)
    if unknown := [name for name in asked if name not in known]:
        raise UserError(f"--methods '{shown(unknown[0])}' is unknown; known are {', '.join(known)}")
    return {
        name: known[name] for name in [*asked, *(n for n in known if n not in METHODS and n not in asked)]
    }


class Bench:
    """The cells of a table: which are wanted, which are there, and how one is measured."""

    def __init__(self, options: argparse.Namespace, methods: Mapping[str, Method]) -> None:
        self.options, self.methods = options, methods
        self.work = options.work.absolute()
        first = FIRST_OF_TUNING if options.tuning else FIRST_CREATURE
        self.indices = range(first, first + options.creatures)
        # References depend on no seed, and curves of dials have one point for each creature.
        self.wanted = [
            key
            for key in itertools.product(range(options.seeds), self.indices, methods)
            if key[0] == 0 or not (methods[key[2]].reference or methods[key[2]].of)
        ]

    @cached_property
    def settings(self) -> dict[str, str]:
        """For each method, what a cell depends on besides creature and seed, as a hash."""
        return {name: self._digest(method) for name, method in self.methods.items()}

    def _trained(self, method: Method) -> Method:
        return METHODS[method.of] if method.of else method

    def _digest(self, method: Method) -> str:
        """Of a method's scores."""
        settings = {"words": self._digest_of_words(self._trained(method)), "samples": self.options.samples}
        settings |= {
            "edits": self.options.edit_samples,
            "dials": dict(method.dials),
            "reference": method.reference,
        }
        return runs.fingerprint(settings, files=[ROOT / JUDGE / "model.safetensors"])

    def _digest_of_words(self, method: Method) -> str:
        """Of what a method learns, and in what time."""
        options = self.options
        settings = {"overrides": method.overrides, "steps": options.steps, "threads": torch.get_num_threads()}
        yamls = [*yamls_of(method), options.model / "config.yaml"]
        return runs.fingerprint(settings, yamls, [options.model / "model.safetensors"])

    def cells(self) -> dict[tuple[int, int, str], dict[str, Any]]:
        """The cells that are measured with the present settings, here or in the report of the repository."""
        return read_cells([*self.reported(), *runs.lines_of(self.work)], self.settings)

    def reported(self) -> list[dict[str, Any]]:
        """The cells of the full table's report, of any settings."""
        path = (self.options.out or RESULTS) / "methods_table.json"
        return [] if self.options.tuning or self.options.methods else runs.reported(path)

    def complete(self, cells: Cells) -> dict[tuple[int, int, str], Mapping[str, Any]]:
        """The cells of the creatures and seeds that all methods with any cell have, so that means are over the same."""
        begun = {name for _, _, name in cells}
        missing = {key[:2] for key in self.wanted if key not in cells and key[2] in begun}
        return {key: cell for key, cell in cells.items() if key[:2] not in missing}

    def left(self) -> tuple[int, float]:
        """How many cells are missing, and the hours of processor time that they take by those that are there."""
        cells = self.cells()
        missing = [key for key in self.wanted if key not in cells]
        known = [cell for cell in cells.values() if "whole" in cell]
        of = {name: [cell["whole"] for cell in known if cell["method"] == name] for name in self.methods}
        every = [second for seconds in of.values() for second in seconds] or [SECONDS_OF_A_CELL]
        seconds = [np.median(of[name] or every) for _, _, name in missing]
        return len(missing), float(sum(seconds)) / 3600

    def measure(self) -> None:
        """Measure what is missing, until the hours are over."""
        check_disjoint([concept_of(self.work, index) for index in self.indices])
        print("{} cells are missing, about {:.1f} hours of processor time".format(*self.left()), flush=True)
        started, present = time.monotonic(), self.cells()
        for key in (key for key in self.wanted if key not in present):
            if self.options.hours and time.monotonic() - started > self.options.hours * 3600:
                print("the hours are over; the same command goes on from here")
                return
            try:
                cell = self._measured(*key)
            except UserError as error:
                print(f"not measured: {error}", flush=True)
                continue
            runs.add_cell(self.work, cell)
            print(
                f"{key[2]} on {key[1]}, seed {key[0]}: identity {cell['identity']:.3f}"
                + (f", edits {cell['edits']:.3f}" if cell["edits"] is not None else ""),
                flush=True,
            )

    def _measured(self, seed: int, index: int, name: str) -> dict[str, Any]:
        method, concept = self.methods[name], concept_of(self.work, index)
        cell: dict[str, Any] = {"file": None, "seconds": 0.0, "wall": 0.0, "parameters": 0, "bytes": 0}
        before = processor_seconds()
        if not method.reference:
            cell = self._train(method, concept, index, method.of or name, seed)
        file = cell.pop("file")
        cell |= {"creature": index, "method": name, "seed": seed, "settings": self.settings[name]}
        cell |= scored(self._scorer, file and Path(file), concept, method)
        return cell | {"whole": round(processor_seconds() - before, 1)}

    def _train(
        self, method: Method, concept: ConceptFolder, index: int, name: str, seed: int
    ) -> dict[str, Any]:
        """Run main.py as a user would, unless its file is there; the file, its size, parameters and seconds."""
        options, method = self.options, self._trained(method)
        stem = self.work / "words" / f"c{index}-{name}-s{seed}-{self._digest_of_words(method)}"
        record = stem.with_suffix(".json")
        if record.is_file():
            return dict(json.loads(record.read_text(encoding="utf-8")))
        folder = self.work / "runs" / stem.name
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, str(ROOT / "main.py"), "--base", *map(str, yamls_of(method))]
        command += ["-t", "-l", str(folder), "--seed", str(seed), "--data_root", str(concept.folder)]
        command += ["--init_word", str(concept.init_word), "--placeholder_string", "*"]
        command += ["--actual_resume", str(options.model / "model.safetensors"), *method.overrides, *QUIET]
        command += ["--max_steps", str(options.steps)] if options.steps else []
        # Threads that wait must not count as processor time.
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "OMP_WAIT_POLICY": "PASSIVE"}
        started, before = time.monotonic(), processor_seconds()
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True, check=False
        )
        wall, seconds = time.monotonic() - started, processor_seconds() - before
        found = list(folder.glob("*/checkpoints/embeddings.pt"))
        if done.returncode or len(found) != 1:
            last = ((done.stderr or done.stdout).strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{name} on creature {index} failed: {last[:200]}")
        trained = [line for line in done.stdout.splitlines() if "parameters are trained" in line]
        parameters = int(trained[0].split(" of ")[0].replace(",", "")) if trained else None
        # The files to share, without those of earlier steps: of plain vectors those in the default format.
        shared = [path for path in found[0].parent.glob("*.safetensors") if "_gs-" not in path.stem]
        atomic_write(stem.with_suffix(".pt"), lambda file: file.write(found[0].read_bytes()))
        cell = {
            "file": str(stem.with_suffix(".pt")),
            "seconds": round(seconds, 1),
            "wall": round(wall, 1),
            "parameters": parameters,
            "bytes": sum(path.stat().st_size for path in shared if not path.stem.endswith("_best")),
        }
        write_text(record, json.dumps(cell))
        shutil.rmtree(folder)
        return cell

    @cached_property
    def _scorer(self) -> Scorer:
        options = self.options
        model = load_model_from_config(
            str(options.model / "config.yaml"), str(options.model / "model.safetensors")
        )
        return Scorer(
            model, AttributeJudge.load(str(JUDGE)), images=options.samples, edit_images=options.edit_samples
        )


def yamls_of(method: Method) -> list[Path]:
    """The YAMLs of a method's runs, in the order of --base."""
    return [*BASES, *(ROOT / "configs" / path for path in method.yamls)]


def processor_seconds() -> float:
    """The processor time of this process and of the processes that it has waited for."""
    return sum(os.times()[:4])


def concept_of(work: Path, index: int) -> ConceptFolder:
    """The images of a creature with their masks, drawn if they are not there."""
    folder = work / "concepts" / f"c{index}"
    if not (folder / "concept.json").is_file():
        creatures, scenes = creature_concept(index)
        for number, mask in enumerate(render_with_masks(creatures, scenes, 32)[1], 1):
            image = Image.fromarray((255 * mask).round().byte().numpy())
            atomic_write(
                folder / f"{number:02d}-masklabel.png", lambda file, image=image: image.save(file, "PNG")
            )
        write_concept(folder, creatures, scenes, 32)
    return read_concept(folder)


def check_disjoint(concepts: Sequence[ConceptFolder]) -> None:
    """Check that no prompt that some method trains with has a word for a background or a style that is judged."""
    trained = {word for prompt in (*OBJECT_TEMPLATES, *PROMPTS) for word in words_of(prompt)}
    for concept in concepts:
        assert concept.creature is not None
        edits = edits_of(concept.creature, concept.backgrounds)
        judged = {word for edit in edits for word in words_of(edit.prompt)}
        if common := (trained & judged) - _NEUTRAL:
            raise UserError(f"'{min(common)}' is trained with and judged; change ldm/modules/methods/core.py")


# In prompts of both kinds: colours, which ask for nothing without "background", and what is no content.
_NEUTRAL = {*COLORS, "a", "an", "at", "in", "of", "on", "the", "photo", "picture"}


def words_of(prompt: str) -> list[str]:
    return re.findall(r"[a-z]+", prompt)


def read_cells(
    measured: Iterable[dict[str, Any]], settings: Mapping[str, str]
) -> dict[tuple[int, int, str], dict[str, Any]]:
    """The cells that were measured with these settings of their methods."""
    cells: dict[tuple[int, int, str], dict[str, Any]] = {}
    for cell in measured:
        if settings.get(cell["method"]) == cell["settings"]:
            cells[cell["seed"], cell["creature"], cell["method"]] = cell
    return cells


def scored(
    scorer: Scorer, file: Path | None, concept: ConceptFolder, method: Method
) -> dict[str, float | None]:
    """Identity, attributes, and obeyed edits that still show the creature itself, or None where nothing is edited."""
    scorer.dials = dict(method.dials)
    if method.reference == "first_stage":
        likeness, edits = scorer.through_first_stage(concept), None
    else:
        word = str(concept.words) if method.reference else "*"
        likeness, edits = scorer.likeness(file, concept, word), scorer.editability(file, concept, word)
    return {
        "identity": float(likeness["identity"]),
        "attributes": float(likeness["attributes"]),
        "edits": edits,
    }


COLUMNS = (
    "method", "identity", "of the first stage's", "attributes", "edits", "identity, difference", "p",
    "edits, difference", "p", "processor s", "times one vector", "wall s", "parameters", "kB", "n",
)  # fmt: skip


def fill(report: Report, cells: Cells) -> None:
    """Add a row for each method, and what beats one vector on both axes. Other dials of a method are no methods."""
    names = [name for name in dict.fromkeys(name for _, _, name in cells) if not _method(name).of]
    compared = [name for name in names if name != BASELINE and not _method(name).reference]
    tests = {
        (name, figure): paired(differences(cells, name, figure))
        for name in compared
        for figure in FIGURES
        if len(differences(cells, name, figure)) > 1
    }
    corrected = holm({key: test[2] for key, test in tests.items()})
    ceiling = {
        creature: cell["identity"] for (_, creature, name), cell in cells.items() if name == "first_stage"
    }
    better, reached = [], []
    for name in dict.fromkeys(name for _, _, name in cells):
        own = {key: cell for key, cell in cells.items() if key[2] == name}
        means = {
            key: _mean([cell[key] for cell in own.values()]) for key in ("identity", "attributes", "edits")
        }
        share = _mean([cell["identity"] / ceiling[key[1]] for key, cell in own.items() if key[1] in ceiling])
        if not _method(name).reference and share is not None and means["edits"] is not None:
            of_bars = (share / BARS["identity"], means["edits"] / BARS["edits"])
            reached += [name + (" (first seed)" if _method(name).of else "")] if min(of_bars) >= 1 else []
        if name not in names:
            continue
        row = [name, *map(_shown, (means["identity"], share, means["attributes"], means["edits"]))]
        for figure in FIGURES:
            key = (name, figure)
            row += ["", ""] if key not in tests else [
                f"{tests[key][0]:+.3f} ± {tests[key][1]:.3f}", f"{corrected[key]:.3f}"
            ]  # fmt: skip
        first = next(iter(own.values()))
        if _method(name).reference:
            row += ["", "", "", "", ""]
        else:
            row.append(f"{np.median([cell['seconds'] for cell in own.values()]):.0f}")
            row += [_shown(_mean(ratios(cells, name)), 2)]
            row.append(f"{np.median([cell['wall'] for cell in own.values()]):.0f}")
            row += [f"{first['parameters']:,}", f"{first['bytes'] / 1000:.1f}"]
        report.rows.append([*row, str(len(own))])
        if all(
            (name, figure) in tests and tests[name, figure][0] > 0 and corrected[name, figure] < 0.05
            for figure in FIGURES
        ):
            better.append(name)
    report.notes += [
        "identity: 0 is another creature, 1 the same one drawn again; edits: the share of images that show what was "
        "asked for and still the creature; no prompt of an edit is trained with",
        f"differences from {BASELINE}, paired by creature (means over seeds), with standard errors; p of a sign-flip "
        f"test, corrected for {len(tests)} comparisons by Holm's method",
        f"better than {BASELINE} on both axes at p < 0.05: {', '.join(better) or 'none'}",
        f"at least {BARS['identity']:g} of the first stage's identity and edits of at least {BARS['edits']:g}: "
        f"{', '.join(reached) or 'none'}",
        "measured are the vectors of the last step, embeddings.pt, which the run's last lines name",
        "processor s: of the whole process of main.py, with its ratio to one vector's of the same creature and seed; "
        "wall s: from its start to its end, on a machine that may have had other work",
    ]


def _method(name: str) -> Method:
    """A method of the table; what is not there is a variant, which is trained."""
    return METHODS.get(name, METHODS[BASELINE])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _shown(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def ratios(cells: Cells, name: str) -> list[float]:
    """The processor time of each cell of a method over that of one vector on the same creature with the same seed."""
    return [
        cell["seconds"] / base["seconds"]
        for (seed, creature, method), cell in cells.items()
        if method == name and (base := cells.get((seed, creature, BASELINE)))
    ]


def draw_dial(name: str, cells: Cells, folder: Path) -> None:
    """Write what a dial does to identity and edits as methods_dial_<name>.md and .png, if it is measured."""
    dial, whole, values = CURVES[name]
    points: list[tuple[float, float, float, int]] = []
    for value in sorted((whole, *values)):
        method = name if value == whole else f"{name} {dial}={value:g}"
        # Other settings of a dial are measured with the first seed alone.
        own = [cell for key, cell in cells.items() if key[2] == method and key[0] == 0]
        if own:
            identity, edits = (float(np.mean([cell[figure] for cell in own])) for figure in FIGURES)
            points.append((value, identity, edits, len(own)))
    if len(points) < 2:
        return
    report = Report(f"methods_dial_{name}", f"The dial {dial} of {name}", (dial, *FIGURES, "n"), {})
    report.rows = [(f"{v:g}", f"{i:.3f}", f"{e:.3f}", str(n)) for v, i, e, n in points]
    report.notes.append(f"the words are those of {name} in methods_table, not trained again")
    print(report.write(folder))
    steps, identity, edits, _ = zip(*points, strict=True)
    image = draw_curves([Curve("identity", steps, identity), Curve("edits", steps, edits)], axis=dial)
    atomic_write(folder / f"methods_dial_{name}.png", lambda file: image.save(file, "PNG"))


def differences(cells: Cells, name: str, figure: str) -> list[float]:
    """For each creature, the mean over seeds of the difference from one vector with the same seed."""
    by_creature: dict[int, list[float]] = {}
    for (seed, creature, method), cell in cells.items():
        base = cells.get((seed, creature, BASELINE))
        if method == name and base is not None:
            by_creature.setdefault(creature, []).append(cell[figure] - base[figure])
    return [float(np.mean(values)) for values in by_creature.values()]


if __name__ == "__main__":
    sys.exit(main())
