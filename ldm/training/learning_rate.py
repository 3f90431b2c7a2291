"""The learning rate of a run: the YAML's base rate and the factors that scale it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.lr_scheduler import LambdaNamedScheduler, LambdaStepScheduler
from ldm.util import ConfigError, Problem, UserError, instantiate_from_config, misfits

logger = logging.getLogger(__name__)


def set_learning_rate(
    merged: DictConfig, model: Any, *, batch: int, accumulation: int, processes: int, max_steps: int
) -> str:
    """Set `model.learning_rate` and return a description of it.

    With `scale_lr` it is base x accumulation x processes x batch size, those that the run really has; otherwise the
    base alone. A base such as "0.005:100, 1e-3:1000" is a schedule whose first rate is the base. `max_decay_steps:
    null` in the `scheduler_config` becomes the number of steps of the run.
    """
    _set_decay_steps(model, max_steps)
    base = given = merged["model"].get("base_learning_rate")
    steps = ""
    if isinstance(given, str):
        base, steps = _schedule_by_steps(given, model), f"; by steps: {given}"
    elif scheduler := getattr(model, "scheduler_config", None):
        steps = f"; times the factor of {_described(scheduler, max_steps)}"
    if not merged["scale_lr"]:
        model.learning_rate = float(base)
        return f"learning rate {base:.2e}{steps}"
    model.learning_rate = float(base * accumulation * processes * batch)
    return (
        f"learning rate {model.learning_rate:.2e} = {base:.2e} x {batch} (batch) x {processes} (processes) "
        f"x {accumulation} (accumulation); --scale_lr false uses the base alone{steps}"
    )


def rate_problems(rate: Any) -> Iterator[Problem]:
    """Yield the problems of a base rate: of a number, or of the text of a schedule by steps."""
    key = "model.base_learning_rate"
    if isinstance(rate, str):
        try:
            LambdaStepScheduler(rate)
        except ConfigError as error:
            yield Problem(key, key, f": {error}")
    elif rate is not None:
        yield from misfits(key, rate, float)


def _described(scheduler: Mapping[str, Any], steps: int) -> str:
    """A schedule in words; a warm-up that the run does not complete is a warning."""
    name = str(scheduler["target"]).rpartition(".")[2]
    params = scheduler.get("params") or {}
    warm_up = params.get("warm_up_steps")
    if isinstance(warm_up, int) and 0 < steps <= warm_up:
        logger.warning(
            "the warm-up of %d steps is not shorter than the run of %d: the rate never reaches its value",
            warm_up,
            steps,
        )
    if name != LambdaNamedScheduler.__name__:
        return name
    return f"{params['name']} ({warm_up} steps of warm-up)"


def check_base_rate(merged: DictConfig) -> None:
    """Check the base learning rate, and that a run whose schedule needs its number of steps has one.

    Raises:
        ConfigError: one of the two is missing, or the rate is not a number or rates by steps.
    """
    if merged["model"].get("base_learning_rate") is None:
        raise ConfigError("model.base_learning_rate is missing; give a number above 0")
    limits = OmegaConf.select(merged, "lightning.trainer") or {}
    other_limit = any(limits.get(key) is not None for key in ("max_epochs", "max_time"))
    unlimited = limits.get("max_steps") == -1 or (other_limit and limits.get("max_steps") is None)
    scheduler = OmegaConf.select(merged, "model.params.scheduler_config")
    if unlimited and _needs_steps(scheduler):
        raise ConfigError(
            "scheduler_config.params.max_decay_steps is null, which means the steps of the run, but the run has no "
            "max_steps; give one of the two"
        )
    if scheduler and str(scheduler.get("target")).startswith("ldm.lr_scheduler."):
        with _explained():
            instantiate_from_config(_with_steps(scheduler, 1) if _needs_steps(scheduler) else scheduler)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what a class of an optimizer or a schedule says of its params into a ConfigError."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ConfigError(f"optimizer_config or scheduler_config: {error}; correct its params") from error


def check_rate(merged: DictConfig) -> None:
    """Check the base learning rate, the optimizer and the schedule, which are built for a parameter of no model.

    Raises:
        ConfigError: one of them is missing or does not fit; or a schedule needs the steps of a run without a limit.
    """
    import torch

    from ldm.models.optimizers import build_optimizer

    check_base_rate(merged)
    params = merged["model"].get("params") or {}
    scheduler = params.get("scheduler_config")
    if scheduler is not None and _needs_steps(scheduler):
        scheduler = _with_steps(scheduler, 1)
    with _explained():
        build_optimizer(
            [{"params": [torch.nn.Parameter(torch.ones(2, 2))]}],
            1.0,
            params.get("optimizer_config"),
            scheduler,
        )


def _needs_steps(scheduler: Mapping[str, Any] | None) -> bool:
    params = (scheduler or {}).get("params") or {}
    return "max_decay_steps" in params and params["max_decay_steps"] is None


def _set_decay_steps(model: Any, steps: int) -> None:
    scheduler = getattr(model, "scheduler_config", None)
    if scheduler is not None and _needs_steps(scheduler):
        model.scheduler_config = _with_steps(scheduler, steps)


def _with_steps(scheduler: Mapping[str, Any], steps: int) -> dict[str, Any]:
    return {"target": scheduler["target"], "params": {**scheduler["params"], "max_decay_steps": steps}}


def _schedule_by_steps(text: str, model: Any) -> float:
    schedule = LambdaStepScheduler(text)
    if not hasattr(model, "scheduler_config"):
        raise ConfigError(
            f"model.base_learning_rate is '{text}', but {type(model).__name__} has no schedule; give a number"
        )
    if model.scheduler_config is not None:
        logger.warning("the learning rate '%s' replaces the YAML's scheduler_config", text)
    model.scheduler_config = step_schedule(text)
    return schedule.first


def step_schedule(rates: str) -> dict[str, Any]:
    """The `scheduler_config` of rates such as "0.005:100, 1e-3:1000"."""
    target = f"{LambdaStepScheduler.__module__}.{LambdaStepScheduler.__qualname__}"
    return {"target": target, "params": {"rates": rates}}
