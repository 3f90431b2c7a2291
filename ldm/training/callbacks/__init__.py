"""The callbacks of a run: their names in YAMLs, and the `lightning` node that is completed by them.

Nothing heavy is imported here, so that a configuration can be checked at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

# The callbacks of every run. A YAML sets their parameters under these names, and adds others as nodes with a target.
DEFAULT_CALLBACKS: dict[str, dict[str, Any]] = {
    "image_logger": {
        "target": "ldm.training.callbacks.image_logger.ImageLogger",
        "params": {"batch_frequency": 750, "max_images": 4},
    },
    "embedding_saver": {"target": "ldm.training.callbacks.embedding_saver.EmbeddingSaver", "params": {}},
    "progress": {"target": "ldm.training.callbacks.progress.RunProgress", "params": {}},
    "learning_rate_logger": {
        "target": "pytorch_lightning.callbacks.LearningRateMonitor",
        "params": {"logging_interval": "step"},
    },
}
# Further callbacks of a run that trains a personalization.
PERSONALIZATION_CALLBACKS: dict[str, dict[str, Any]] = {
    "latent_cache": {"target": "ldm.training.callbacks.latent_cache.LatentCache", "params": {}},
    "training_guard": {"target": "ldm.training.callbacks.guard.TrainingGuard", "params": {}},
    "deterministic_loss": {
        "target": "ldm.training.callbacks.fixed_loss.DeterministicLoss",
        "params": {},
    },
    "vector_stats": {"target": "ldm.training.callbacks.guard.VectorStats", "params": {}},
    "summary_images": {
        "target": "ldm.training.callbacks.summary_images.SummaryImages",
        "params": {},
    },
}
# Callbacks that are added if a YAML names them; cuda_callback also on a GPU.
OPTIONAL_CALLBACKS: dict[str, dict[str, Any]] = {
    "cuda_callback": {"target": "ldm.training.callbacks.performance.CUDACallback", "params": {}},
    "warm_start": {"target": "ldm.training.callbacks.warm_start.WarmStart", "params": {}},
    "compiled": {"target": "ldm.training.callbacks.performance.CompiledDenoiser", "params": {}},
    "channels_last": {"target": "ldm.training.callbacks.performance.ChannelsLast", "params": {}},
    "metrics_over_trainsteps_checkpoint": {
        "target": "pytorch_lightning.callbacks.ModelCheckpoint",
        "params": {
            "filename": "{epoch:06}-{step:09}",
            "save_top_k": -1,
            "every_n_train_steps": 10000,
            "save_weights_only": True,
        },
    },
}
KNOWN_CALLBACKS = DEFAULT_CALLBACKS | PERSONALIZATION_CALLBACKS | OPTIONAL_CALLBACKS
# Old names of callbacks in YAMLs -> current names.
OLD_CALLBACK_NAMES = {
    "tripwires": "training_guard",
    "health": "vector_stats",
    "summary_pictures": "summary_images",
}
# Loggers that Lightning no longer has.
_GONE_LOGGERS = ("TestTubeLogger",)
_MODEL_CHECKPOINT = "pytorch_lightning.callbacks.ModelCheckpoint"


def rename_callbacks(config: DictConfig) -> DictConfig:
    """A configuration in which old names of callbacks are replaced by the current ones."""
    callbacks = OmegaConf.select(config, "lightning.callbacks", throw_on_missing=False)
    if not isinstance(callbacks, DictConfig) or not callbacks.keys() & OLD_CALLBACK_NAMES.keys():
        return config
    config = config.copy()
    renamed = OmegaConf.create({})
    for name, node in callbacks.items_ex(resolve=False):
        name = OLD_CALLBACK_NAMES.get(str(name), name)
        renamed[name] = OmegaConf.merge(renamed[name], node) if renamed.get(name) and node else node
    config["lightning"]["callbacks"] = renamed
    return config


def complete_lightning(lightning: Mapping[str, Any] | None, *, personalization: bool = False) -> DictConfig:
    """The `lightning` node with the default callbacks and all targets, so that it can be checked and built."""
    node = OmegaConf.create(dict(lightning or {}))
    named = node.get("callbacks") or {}
    defaults = DEFAULT_CALLBACKS | (PERSONALIZATION_CALLBACKS if personalization else {})
    node["callbacks"] = OmegaConf.merge(
        defaults | {k: v for k, v in KNOWN_CALLBACKS.items() if k in named}, named
    )
    for name in ("modelcheckpoint", "logger"):
        if name in node and node[name] is None:
            del node[name]
    if "modelcheckpoint" in node:
        node["modelcheckpoint"] = OmegaConf.merge({"target": _MODEL_CHECKPOINT}, node["modelcheckpoint"])
    if "logger" in node and is_gone_logger(node["logger"]):
        del node["logger"]
    if "logger" in node:
        default = {"target": "pytorch_lightning.loggers.TensorBoardLogger"}
        node["logger"] = OmegaConf.merge(default, node["logger"])
    return node


def is_gone_logger(node: Mapping[str, Any]) -> bool:
    """Whether a `lightning.logger` node names a logger that Lightning no longer has."""
    return str(node.get("target", "")).rpartition(".")[2] in _GONE_LOGGERS
