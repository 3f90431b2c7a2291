"""Optimisers and learning-rate schedules from a YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ldm.util import ConfigError, get_obj_from_str, instantiate_from_config

ADAMW = {"target": "torch.optim.AdamW"}


def build_optimizer(
    groups: Iterable[Mapping[str, Any]],
    learning_rate: float,
    optimizer_config: Mapping[str, Any] | None = None,
    scheduler_config: Mapping[str, Any] | None = None,
) -> Any:
    """What Lightning's `configure_optimizers` returns.

    `optimizer_config` names any class with torch's interface (default AdamW with torch's settings, as the
    original); `scheduler_config` a class with `schedule(step) -> factor`, applied each step. Raises ConfigError.
    """
    node = optimizer_config or ADAMW
    options = dict(node.get("params") or {})
    try:
        optimizer = get_obj_from_str(node["target"])(list(groups), lr=learning_rate, **options)
    except TypeError as error:
        raise ConfigError(f"optimizer_config {node['target']}: {error}") from error
    if scheduler_config is None:
        return optimizer
    factor = instantiate_from_config(scheduler_config).schedule
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
