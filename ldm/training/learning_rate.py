"""The learning rate of a run, from the YAML's base and what it is multiplied by."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from ldm.lr_scheduler import LambdaStepScheduler
from ldm.util import ConfigError

logger = logging.getLogger(__name__)


def set_learning_rate(merged: DictConfig, model: Any, trainer: pl.Trainer) -> str:
    """Set `model.learning_rate`: base x accumulation x GPUs x batch, or the base alone; returns it in words.

    A base such as "0.005:100, 1e-3:1000" is a rate by steps: the first number, and a schedule for the others. A
    `scheduler_config` whose `max_decay_steps` is null gets the steps of the run.
    """
    _spread(model, trainer.max_steps)
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


def check_rate(merged: DictConfig) -> None:
    """Raise ConfigError for a base that is no rate, or a schedule over a run whose steps nobody said.

    All else that a schedule says is checked when it is built.
    """
    base = merged["model"].get("base_learning_rate")
    if not isinstance(base, str) and (not isinstance(base, (int, float)) or base <= 0):
        raise ConfigError(f"model.base_learning_rate is {base!r}; give a number above 0")
    limits = OmegaConf.select(merged, "lightning.trainer") or {}
    timed = [key for key in ("max_epochs", "max_time") if limits.get(key) is not None]
    open_end = limits.get("max_steps") == -1 or (timed and limits.get("max_steps") is None)
    if open_end and _wants_steps(OmegaConf.select(merged, "model.params.scheduler_config")):
        raise ConfigError(
            "scheduler_config.params.max_decay_steps is null, which is the steps of the run, but the run has no "
            "max_steps; give one of the two"
        )


def _wants_steps(scheduler: Mapping[str, Any] | None) -> bool:
    params = (scheduler or {}).get("params") or {}
    return "max_decay_steps" in params and params["max_decay_steps"] is None


def _spread(model: Any, steps: int) -> None:
    scheduler = getattr(model, "scheduler_config", None)
    if _wants_steps(scheduler):
        params = {**scheduler["params"], "max_decay_steps": steps}
        model.scheduler_config = {"target": scheduler["target"], "params": params}


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
