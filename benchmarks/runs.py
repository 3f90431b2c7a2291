"""Runs of main.py inside a benchmark, in the same order with additional callbacks, and cells of tables that go on."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback

from ldm import console
from ldm.console import positive
from ldm.files import file_hash
from ldm.training import command_line, run
from ldm.training.callbacks.interruption import Requests
from ldm.training.fitting import fit
from ldm.training.trainer import choose_devices


@dataclass
class PreparedRun:
    """A run that is ready to start."""

    plan: run.Plan
    model: pl.LightningModule
    data: Any
    trainer: pl.Trainer

    def fit(self) -> None:
        fit(self.plan.run, self.plan.state, self.trainer, self.model, self.data)


def prepare(
    argv: Sequence[str],
    make_model: Callable[[DictConfig], pl.LightningModule] = run.make_model,
    callbacks: Sequence[Callback] = (),
) -> PreparedRun:
    """Prepare a run as main.py does for a command line.

    make_model: makes the model from the merged configuration.
    callbacks: are added after all others.
    """
    plan = run.make_plan(command_line.parse(argv))
    pl.seed_everything(plan.config["seed"], verbose=False)
    data = run.make_data(plan.config)
    where = choose_devices(OmegaConf.select(plan.config, "lightning.trainer.gpus"))
    model = make_model(plan.config).train()
    trainer = run.make_trainer(plan, model, where, Requests())
    trainer.callbacks.extend(callbacks)
    run.settle(plan, model, trainer, data)
    return PreparedRun(plan, model, data, trainer)


def fingerprint(settings: Mapping[str, Any], yamls: Sequence[Path] = (), files: Sequence[Path] = ()) -> str:
    """Return a hash of what a result depends on besides the code; results with another one are not reused.

    settings: plain values.
    yamls: their values count, not their comments.
    files: their bytes count.
    """
    values = [OmegaConf.to_container(OmegaConf.load(path)) for path in yamls]
    content = [dict(settings), values, [file_hash(path) for path in files]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all benchmarks have."""
    parser.add_argument("--threads", type=positive, help="number of torch threads (default: torch's)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results)")


def set_up(options: argparse.Namespace) -> None:
    """Set torch's threads, and log only warnings, of diffusers only errors (it warns of intended casts)."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    console.set_up_logging()
    console.quieten_lightning()
    logging.getLogger("ldm").setLevel(logging.WARNING)
    if options.threads:
        torch.set_num_threads(options.threads)


def cells_of(work: Path) -> Path:
    return work / "cells.jsonl"


def add_cell(work: Path, cell: Mapping[str, Any]) -> None:
    """Append a cell, on a line of its own also after one that was cut off."""
    path = cells_of(work)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * (not text.endswith("\n") and bool(text)) + json.dumps(cell) + "\n")


def lines_of(work: Path) -> list[dict[str, Any]]:
    """The cells of a work folder; a line that was cut off is left out."""
    lines = cells_of(work).read_text(encoding="utf-8").splitlines() if cells_of(work).is_file() else []
    cells = []
    for line in lines:
        with suppress(ValueError):
            cells.append(json.loads(line))
    return cells


def reported(path: Path) -> list[dict[str, Any]]:
    """The cells in the JSON of a report, so that a table goes on where its work folder is lost."""
    if not path.is_file():
        return []
    return list(json.loads(path.read_text(encoding="utf-8"))["data"]["cells"])
