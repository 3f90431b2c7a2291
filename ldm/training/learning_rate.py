"""The learning rate of a run, from the YAML's base and what it is multiplied by."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from ldm.lr_scheduler import LambdaStepScheduler
from ldm.util import ConfigError

logger = logging.getLogger(__name__)


def set_learning_rate(merged: DictConfig, model: Any, trainer: pl.Trainer) -> str:
    """Set `model.learning_rate`: base x accumulation x GPUs x batch, or the base alone; returns it in words.

    A base such as "0.005:100, 1e-3:1000" is a rate by steps: the first number, and a schedule for the others.
    """
    said = base = merged["model"].get("base_learning_rate")
    if isinstance(said, str):
        base = _by_steps(said, model)
    steps = f"; by steps: {said}" if isinstance(said, str) else ""
    if not merged["scale_lr"]:
        model.learning_rate = float(base)
        return f"learning rate {base:.2e}{steps}"
    accumulate, batch = (
        trainer.accumulate_grad_batches,
        OmegaConf.select(merged, "data.params.batch_size") or 1,
    )
    model.learning_rate = float(base * accumulate * trainer.world_size * batch)
    return (
        f"learning rate {model.learning_rate:.2e} = {base:.2e} x {batch} (batch) x {trainer.world_size} (processes) "
        f"x {accumulate} (accumulation); --scale_lr false takes it as it is{steps}"
    )


def check_base_rate(merged: DictConfig) -> None:
    """Raise ConfigError for a base that is no rate; what a schedule says is checked when it is built."""
    base = merged["model"].get("base_learning_rate")
    if not isinstance(base, str) and (not isinstance(base, (int, float)) or base <= 0):
        raise ConfigError(f"model.base_learning_rate is {base!r}; give a number above 0")


def _by_steps(text: str, model: Any) -> float:
    schedule = LambdaStepScheduler(text)
    if not hasattr(model, "scheduler_config"):
        raise ConfigError(
            f"model.base_learning_rate is '{text}', but {type(model).__name__} takes no schedule; give a number"
        )
    if model.scheduler_config is not None:
        logger.warning("the rates by steps '%s' take the place of the YAML's scheduler_config", text)
    target = f"{LambdaStepScheduler.__module__}.{LambdaStepScheduler.__qualname__}"
    model.scheduler_config = {"target": target, "params": {"rates": text}}
    return schedule.first
