"""Runs of main.py inside a benchmark: the same parts in the same order, with a callback more."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback

from ldm import console
from ldm.training import command_line, run
from ldm.training.callbacks.interruption import Requests
from ldm.training.fitting import fit
from ldm.training.learning_rate import set_learning_rate
from ldm.training.trainer import choose_devices


@dataclass
class PreparedRun:
    """A run that is ready to begin."""

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
    """What main.py makes of a command line; `callbacks` come after all others.

    `make_model` makes the model out of the merged configuration.
    """
    plan = run.make_plan(command_line.parse(argv))
    pl.seed_everything(plan.config["seed"], verbose=False)
    data = run.make_data(plan.config)
    where = choose_devices(OmegaConf.select(plan.config, "lightning.trainer.gpus"))
    model = make_model(plan.config).train()
    trainer = run.make_trainer(plan, model, where, Requests())
    trainer.callbacks.extend(callbacks)
    set_learning_rate(plan.config, model, trainer)
    return PreparedRun(plan, model, data, trainer)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that all benchmarks have."""
    parser.add_argument("--threads", type=int, help="of torch (default: torch's)")
    parser.add_argument("--out", type=Path, help="folder of the results (benchmarks/results)")


def begin(options: argparse.Namespace) -> None:
    """Set torch's threads; of all that runs say, show only warnings, and of diffusers only errors.

    Diffusers warns of casts that are meant.
    """
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    console.set_up_logging()
    logging.getLogger("ldm").setLevel(logging.WARNING)
    if options.threads:
        torch.set_num_threads(options.threads)
