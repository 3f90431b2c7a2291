"""The first phase of a study: render the concepts, and run main.py for each inversion."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import ROOT
from benchmarks.study.plan import Inversion, Study, plan, write_record
from ldm.evaluation.concepts import read_concept
from ldm.files import atomic_write, file_hash
from ldm.util import UserError
from scripts.make_concepts import STYLES, creature_concept, style_concept, write_concept

CREATURE_CONFIG = ROOT / "configs/latent-diffusion/txt2img-finetune.yaml"
STYLE_CONFIG = ROOT / "configs/latent-diffusion/txt2img-finetune_style.yaml"
_INTERRUPTED = (130, 143, -signal.SIGINT, -signal.SIGTERM)


def inversions(options: argparse.Namespace) -> list[Inversion]:
    """Return the inversions that the options describe."""
    creatures = [f"c{index:03d}" for index in range(options.creatures)]
    styles = [] if options.no_styles else list(STYLES)
    return plan(creatures, styles, options.vectors, range(options.seeds))


def invert(options: argparse.Namespace) -> None:
    """Run all missing inversions, `--jobs` in parallel; the first failure ends the phase."""
    study = Study(options.out.absolute())
    wanted = inversions(options)
    render_concepts(study, wanted, image_size())
    settings = {one: settings_of(options, one) for one in wanted}
    todo = [one for one in wanted if not study.done(one, settings[one])]
    with (
        tqdm(
            total=len(wanted),
            initial=len(wanted) - len(todo),
            unit="inversion",
            desc="inverting",
            disable=None,
        ) as bar,
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        running = [pool.submit(invert_one, options, study, one, settings[one]) for one in todo]
        for future in running:
            future.add_done_callback(
                lambda done: bar.update(not done.cancelled() and done.exception() is None)
            )
        wait(running, return_when=FIRST_EXCEPTION)
        for future in running:
            future.cancel()
    for future in running:
        if not future.cancelled():
            future.result()


def render_concepts(study: Study, wanted: Sequence[Inversion], size: int) -> None:
    """Render five images of each concept that does not exist yet."""
    for name in dict.fromkeys(one.concept for one in wanted):
        if (study.concept(name) / "concept.json").is_file():
            continue
        if name in STYLES:
            drawn = style_concept(list(STYLES).index(name), STYLES[name])
        else:
            drawn = creature_concept(int(name[1:]), "evaluation")
        write_concept(study.concept(name), *drawn, size)


def image_size() -> int:
    """Return the image size of the finetuning YAML, rounded up to a size that can be rendered."""
    from omegaconf import OmegaConf

    size = int(OmegaConf.load(CREATURE_CONFIG).data.params.train.params.size)
    return next((known for known in (32, 64) if size <= known), 128)


@cache
def model_hash(path: Path) -> str:
    """The SHA-256 of a checkpoint, read once for all inversions."""
    return file_hash(path)


def settings_of(options: argparse.Namespace, inversion: Inversion) -> dict[str, Any]:
    """Return the settings that an inversion depends on, as its record has them."""
    several = inversion.vectors > 1
    return {
        "model_sha256": model_hash(Path(options.ckpt_path)),
        "steps": options.steps,
        "rate": options.rate_of_several if several else options.rate,
        "recipe": [str(path) for path in options.recipe],
        "captions": options.captions,
        "override": list(options.override),
        "take": options.take,
    }


def command_of(
    options: argparse.Namespace, study: Study, inversion: Inversion, settings: dict[str, Any]
) -> list[str]:
    """Return the command of an inversion, as a user would type it."""
    concept = read_concept(study.concept(inversion.concept))
    config = STYLE_CONFIG if concept.style else CREATURE_CONFIG
    command = [sys.executable, str(ROOT / "main.py"), "--base", str(config)]
    command += [str(Path(path).absolute()) for path in options.recipe]
    command += ["-t", "-l", str(study.runs(inversion)), "-n", inversion.id, "--seed", str(inversion.seed)]
    command += ["--data_root", str(concept.folder), "--init_word", str(concept.init_word)]
    command += ["--actual_resume", str(Path(options.ckpt_path).absolute())]
    if settings["steps"]:
        command += ["--max_steps", str(settings["steps"])]
    if settings["rate"]:
        command += ["--scale_lr", "false", f"model.base_learning_rate={settings['rate']}"]
    if settings["captions"]:
        command.append("data.params.train.params.use_captions=true")
    command.append(f"model.params.personalization_config.params.num_vectors_per_token={inversion.vectors}")
    return command + list(options.override)


def invert_one(
    options: argparse.Namespace, study: Study, inversion: Inversion, settings: dict[str, Any]
) -> None:
    """Run main.py; keep its embedding, and its seconds including the start-up."""
    runs = study.runs(inversion)
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True)
    log = runs / "output.txt"
    threads = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            command_of(options, study, inversion, settings),
            cwd=ROOT,
            env=os.environ | threads,
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    seconds = time.monotonic() - started
    if code in _INTERRUPTED:
        raise KeyboardInterrupt
    found = list(runs.glob(f"*/checkpoints/{options.take}"))
    if code or len(found) != 1:
        last_line = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[
            -1
        ]
        raise UserError(f"the inversion {inversion.id} failed ({last_line}); its output is in '{log}'")
    atomic_write(study.embedding(inversion), lambda file: file.write(found[0].read_bytes()))
    record = {
        **vars(inversion),
        "seconds": round(seconds, 2),
        "threads": options.threads,
        "jobs": options.jobs,
    }
    write_record(study.record(inversion), record | {"settings": settings})
    shutil.rmtree(found[0].parents[1])
