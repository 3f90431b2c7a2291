"""Trainer options of Lightning 1.x that old YAMLs and commands carry, in today's words."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

# Old name -> today's name; None where nothing is left to set.
OLD_TRAINER_KEYS: dict[str, str | None] = {
    "gpus": "gpus",
    "num_processes": "devices",
    "distributed_backend": "strategy",
    "progress_bar_refresh_rate": None,
    "replace_sampler_ddp": "use_distributed_sampler",
    "checkpoint_callback": "enable_checkpointing",
    "weights_summary": None,
    "resume_from_checkpoint": None,
    "terminate_on_nan": None,
    "flush_logs_every_n_steps": None,
    "auto_select_gpus": None,
    "auto_scale_batch_size": None,
    "auto_lr_find": None,
    "amp_backend": None,
    "amp_level": None,
    "prepare_data_per_node": None,
    "track_grad_norm": None,
    "move_metrics_to_cpu": None,
    "log_gpu_memory": None,
    "stochastic_weight_avg": None,
    "process_position": None,
    "reload_dataloaders_every_epoch": None,
    "truncated_bptt_steps": None,
    "multiple_trainloader_mode": None,
}
# Values of `accelerator` that are strategies now.
_STRATEGIES = ("ddp", "ddp_spawn", "ddp2", "dp", "horovod")


def translate(options: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer options with old names replaced, or dropped with a line that says so; `gpus` stays."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        if key not in OLD_TRAINER_KEYS:
            found[key] = value
        elif new := OLD_TRAINER_KEYS[key]:
            found.setdefault(new, value)
        else:
            logger.info("lightning.trainer.%s belongs to Lightning 1.x and is ignored", key)
    accelerator = found.get("accelerator")
    if accelerator in _STRATEGIES:
        del found["accelerator"]
        found.setdefault("strategy", "ddp" if accelerator in ("ddp2", "dp", "horovod") else accelerator)
    return found
