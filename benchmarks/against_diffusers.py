"""Whole runs of diffusers' textual inversion script and of main.py, in turns, on the same model and images.

    python -m benchmarks.against_diffusers --script path/to/examples/textual_inversion/textual_inversion.py

The script is not part of this repository: take it from a checkout of diffusers, of a version that fits what is
installed; with --python it runs in another environment. The model is exported once, every creature is learned by every
contestant as a process of its own from start to end, and one judge scores all vectors on the same model from the same
noise. A run that is finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import runs
from benchmarks.machine import ROOT
from benchmarks.report import Report, verdict
from benchmarks.rounds import Quartiles, paired, ratio
from benchmarks.scores import Scorer, check_creatures, creatures
from ldm.checkpoint import load_model_from_config
from ldm.commands.base import JUDGE, MODEL, guarded
from ldm.console import Parser, positive
from ldm.evaluation.concepts import read_concept
from ldm.evaluation.judge import AttributeJudge
from ldm.files import file_hash, images_fingerprint, write_text
from ldm.images import list_images
from ldm.util import UserError, shown

THEIRS = "diffusers"


class Ours(NamedTuple):
    """A contestant of main.py: YAMLs over the finetuning YAML, and the aim for its share of the script's time."""

    yamls: tuple[str, ...] = ()
    aim: float | None = None


OURS = {
    "default": Ours(aim=0.6),
    "fast": Ours(("configs/recipes/fast.yaml",), 0.3),
    "prospect_residual": Ours(("configs/personalization/prospect_residual.yaml",)),
    "prospect_residual_fast": Ours(
        ("configs/personalization/prospect_residual.yaml", "configs/recipes/fast.yaml"), 0.3
    ),
}
BASE = "configs/latent-diffusion/txt2img-finetune.yaml"
WORD = "*"
SCORES = ("identity", "edits")


class Run(NamedTuple):
    """One contestant on one creature."""

    contestant: str
    concept: Path
    folder: Path

    @property
    def vectors(self) -> Path:
        return self.folder / "vectors"

    @property
    def facts(self) -> Path:
        return self.folder / "run.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, after one line on stderr if it failed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True, help="diffusers' textual_inversion.py")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter of the script (default: this one)"
    )
    parser.add_argument("--concepts", nargs="*", type=Path, help="folders (default: the sample creatures)")
    parser.add_argument(
        "--steps",
        type=positive,
        default=400,
        help="of diffusers; main.py takes those of its YAMLs (default: %(default)s)",
    )
    parser.add_argument("--rate", default="5e-3", help="learning rate of diffusers (default: %(default)s)")
    parser.add_argument("--batch_size", type=positive, default=8, help="default: %(default)s")
    parser.add_argument(
        "--images", type=positive, default=16, help="images per identity (default: %(default)s)"
    )
    parser.add_argument("--model", type=Path, default=ROOT / MODEL, help="default: the embedded model")
    parser.add_argument(
        "--judge", type=Path, default=ROOT / JUDGE, help="default: that of the embedded model"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmarks" / "against_diffusers")
    runs.add_options(parser)
    return guarded(lambda: compare(parser.parse_args(argv)))


def compare(options: argparse.Namespace) -> None:
    """Train and score what is missing, and write the table after each creature."""
    concepts = options.concepts or creatures(ROOT / "data" / "concepts")
    judge = options.judge / "model.safetensors"
    for path in (options.script, judge, *(concept / "concept.json" for concept in concepts)):
        if not path.is_file():
            raise UserError(
                f"'{path}' is not a file; --script names diffusers' script, --concepts folders of creatures"
            )
    check_creatures(concepts)
    runs.set_up(options)
    settings: dict[str, Any] = {
        "model": file_hash(options.model / "model.safetensors")[:12],
        "script": file_hash(options.script)[:12],
        "their versions": versions(options.python),
        "steps": options.steps,
        "rate": options.rate,
        "batch": options.batch_size,
        "threads": torch.get_num_threads(),
        "images": options.images,
    }
    yamls = [ROOT / path for path in (BASE, *(path for one in OURS.values() for path in one.yamls))]
    digest = runs.fingerprint(settings, [*yamls, options.model / "config.yaml"], [judge])
    work = options.work / digest
    exported = export(options.model, work / "exported")
    report = Report(
        "against_diffusers",
        "Whole processes: diffusers' script and main.py on the same model and images",
        ("creature", "contestant", "seconds", "of diffusers'", *SCORES),
        settings,
    )
    found: dict[str, dict[str, dict[str, float]]] = {}
    scorer: Scorer | None = None
    for number, concept in enumerate(concepts):
        contestants = [THEIRS, *OURS]
        # Who begins changes with each creature, so that a machine that gets slower favours nobody.
        order = contestants[number % len(contestants) :] + contestants[: number % len(contestants)]
        images = images_fingerprint(list_images(concept))[:8]
        all_runs = [Run(name, concept, work / f"{concept.name}-{images}-{name}") for name in order]
        for run in all_runs:
            train(run, options, exported)
        if scorer is None:
            model = load_model_from_config(options.model / "config.yaml", options.model / "model.safetensors")
            judge = AttributeJudge.load(options.judge)
            scorer = Scorer(model, judge, options.images, max(2, options.images // 4))
        found[concept.name] = {run.contestant: scored(run, scorer) for run in all_runs}
        fill(report, found)
        report.write(options.out)
    print(report.markdown())


def versions(python: str) -> str:
    """Return the versions of diffusers, transformers and torch that an interpreter has; UserError if it lacks one."""
    code = "from importlib.metadata import version\n"
    code += "print(*(f'{name} {version(name)}' for name in ('diffusers', 'transformers', 'torch')), sep=', ')"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"--python '{python}' cannot run diffusers' script: {shown(last, 120)}")
    return done.stdout.strip()


def export(model: Path, folder: Path) -> Path:
    """Export the model as a folder of diffusers, unless it is there."""
    if not (folder / "model_index.json").is_file():
        weights = model / "model.safetensors"
        call(
            [sys.executable, "scripts/export_diffusers.py", "--ckpt_path", weights, "--out", folder],
            folder.parent,
        )
    return folder


def train(run: Run, options: argparse.Namespace, exported: Path) -> None:
    """Run a contestant as a process, from start to end, and note its seconds; a finished run is kept."""
    if run.facts.is_file():
        return
    shutil.rmtree(run.folder, ignore_errors=True)
    images = run.folder / "images"
    images.mkdir(parents=True)
    for image in list_images(run.concept):  # diffusers' script takes every file of a folder for an image
        shutil.copyfile(image, images / image.name)
    init = read_concept(run.concept).init_word or "creature"
    print(f"{run.concept.name}: {run.contestant}", flush=True)
    if run.contestant == THEIRS:
        command = [options.python, options.script.absolute(), "--pretrained_model_name_or_path", exported]
        command += [
            "--train_data_dir",
            images,
            "--placeholder_token",
            WORD_OF_DIFFUSERS,
            "--output_dir",
            run.folder,
        ]
        command += ["--initializer_token", init, "--resolution", size_of(options.model), "--seed", 0]
        command += ["--train_batch_size", options.batch_size, "--max_train_steps", options.steps]
        command += ["--learning_rate", options.rate, "--lr_warmup_steps", 0]
    else:
        command = [
            sys.executable,
            "main.py",
            "--base",
            BASE,
            *OURS[run.contestant].yamls,
            "-t",
            "-l",
            run.folder / "logs",
            "--seed",
            0,
        ]
        command += ["--data_root", images, "--init_word", init, "--placeholder_string", WORD]
        command += ["--actual_resume", options.model / "model.safetensors"]
        command += [f"data.params.batch_size={options.batch_size}"]
    seconds = call(command, run.folder)
    shutil.copyfile(learned(run), run.vectors)
    write_text(
        run.facts, json.dumps({"seconds": seconds, "command": [str(word) for word in command]}, indent=1)
    )


# `*` is already in the tokenizer's vocabulary, which their script refuses.
WORD_OF_DIFFUSERS = "<concept>"


def learned(run: Run) -> Path:
    """Return the file that a contestant leaves to its user; of main.py the best vectors if it chooses them."""
    if run.contestant == THEIRS:
        return run.folder / "learned_embeds.safetensors"
    (checkpoints,) = run.folder.glob("logs/*/checkpoints")
    best = checkpoints / "embeddings_best.pt"
    return best if best.is_file() else checkpoints / "embeddings.pt"


def call(command: Sequence[object], folder: Path) -> float:
    """Run a command in the repository's root, with its output in FOLDER/output.txt; returns the seconds it took.

    Raises:
        UserError: it failed; the last line of its output is in the message. Or transformers warned that it took random
            weights for some of the model, so the comparison would not be fair.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = [str(word) for word in command]
    began = time.perf_counter()
    with (folder / "output.txt").open("w", encoding="utf-8") as output:
        code = subprocess.run(
            words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment()
        ).returncode
    seconds = time.perf_counter() - began
    said = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
    if "newly initialized" in said:
        raise UserError(
            f"{Path(words[1]).name} took random weights for some of the model: see '{folder}/output.txt'"
        )
    if code:
        lines = said.strip().splitlines()
        last = shown(lines[-1], 120) if lines else "no output"
        raise UserError(
            f"{Path(words[1]).name} ended with code {code} ({last}); all of it is in '{folder}/output.txt'"
        )
    return seconds


def environment() -> dict[str, str]:
    """Return the environment of both: as many threads as this benchmark has, and nothing asked of the network.

    Both keep the bytecode of their modules, as Python does by default.
    """
    own = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"} | own


def size_of(model: Path) -> int:
    """Return the side of a model's images in pixels, from its own YAML."""
    from ldm.base_models import read_config

    params = read_config(model / "model.safetensors").model.params
    factor = 2 ** (len(params.first_stage_config.params.ddconfig.ch_mult) - 1)
    return int(params.image_size) * factor


def scored(run: Run, scorer: Scorer) -> dict[str, float]:
    """Return the seconds and scores of a run; `scores.json` keeps the scores."""
    path = run.folder / "scores.json"
    if not path.is_file():
        truth = read_concept(run.concept)
        vectors = renamed(run) if run.contestant == THEIRS else run.vectors
        scores = {"identity": scorer.identity(vectors, truth), "edits": scorer.editability(vectors, truth)}
        write_text(path, json.dumps(scores, indent=1))
    facts = json.loads(run.facts.read_text(encoding="utf-8"))
    return {"seconds": facts["seconds"], **json.loads(path.read_text(encoding="utf-8"))}


def renamed(run: Run) -> Path:
    """Return the vectors of diffusers' script in a file whose word is that of the scorer's prompts."""
    from ldm.embeddings import read, write

    embeddings = read(run.vectors)
    path = run.folder / "judged.pt"
    write(embeddings.renamed({embeddings.triggers[0]: WORD}), path, "original")
    return path


def fill(report: Report, found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Fill in the table, and the paired comparisons with diffusers over the creatures."""
    report.rows = [
        (
            creature,
            name,
            f"{one['seconds']:.1f}",
            f"{one['seconds'] / contestants[THEIRS]['seconds']:.2f}",
            *(f"{one[score]:.3f}" for score in SCORES),
        )
        for creature, contestants in found.items()
        for name, one in contestants.items()
    ]
    report.notes = []
    for name, contestant in OURS.items():
        times = ratio(*([one[who]["seconds"] for one in found.values()] for who in (name, THEIRS)))
        gains = {score: [one[name][score] - one[THEIRS][score] for one in found.values()] for score in SCORES}
        reached = "" if contestant.aim is None else f", {verdict(times.median, contestant.aim, at_most=True)}"
        report.notes.append(
            f"main.py {name} takes {times.text(2)} of the time of diffusers' script{reached}; "
            + "; ".join(f"{score} {difference(gain)}" for score, gain in gains.items())
        )
    report.notes.append(
        f"Medians and quartiles of the paired comparisons over {len(found)} creatures. Times are those of whole "
        "processes, imports and the last file included. Means have their standard errors. Of main.py the vectors of "
        "the best step by the loss of fixed samples are judged (embeddings_best.pt)."
    )
    report.data = {"creatures": found}


def difference(gains: Sequence[float]) -> str:
    """Return paired differences as text: median with quartiles, mean with its error, and in how many it is below 0."""
    middle = Quartiles.of(gains)
    text = f"{middle.median:+.3f} ({middle.low:+.3f} to {middle.high:+.3f})"
    if len(gains) > 1:
        mean, error, _ = paired(gains)
        text += f", mean {mean:+.3f} ± {error:.3f}"
    return f"{text}, below in {sum(gain < 0 for gain in gains)} of {len(gains)}"


if __name__ == "__main__":
    sys.exit(main())
