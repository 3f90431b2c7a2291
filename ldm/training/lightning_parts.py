"""The Trainer of a run with its callbacks and loggers, from the YAML's `lightning` node and what is usual here."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from ldm.training.callbacks.embedding_saver import EmbeddingSaver
from ldm.training.callbacks.interruption import Interruption, StepGuard
from ldm.training.callbacks.last_checkpoint import LastCheckpoint, is_personalization
from ldm.training.callbacks.setup import SetupCallback
from ldm.training.callbacks.validation_seed import ValidationSeed
from ldm.training.devices import Devices, processes
from ldm.training.frozen_half import plugin_for
from ldm.training.old_trainer_keys import translate
from ldm.training.rundir import RunDir
from ldm.training.signals import Requests
from ldm.training.state_file import StateFile
from ldm.util import ConfigError, UsageError, instantiate_from_config

logger = logging.getLogger(__name__)

# Callbacks that a run has without being told. A YAML changes their parameters under the same names, and adds
# others by a node with a target.
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
# Those that a personalization has besides.
PERSONALIZATION_CALLBACKS: dict[str, dict[str, Any]] = {
    "latent_cache": {"target": "ldm.training.callbacks.latent_cache.LatentCache", "params": {}},
    "tripwires": {"target": "ldm.training.callbacks.tripwires.Tripwires", "params": {}},
    "deterministic_loss": {
        "target": "ldm.training.callbacks.deterministic_loss.DeterministicLoss",
        "params": {},
    },
    "health": {"target": "ldm.training.callbacks.health.Health", "params": {}},
    "summary_pictures": {
        "target": "ldm.training.callbacks.summary_pictures.SummaryPictures",
        "params": {},
    },
}
# Added only where a YAML names them, or where they have something to do.
OPTIONAL_CALLBACKS: dict[str, dict[str, Any]] = {
    "cuda_callback": {"target": "ldm.training.callbacks.cuda.CUDACallback", "params": {}},
    "warm_start": {"target": "ldm.training.callbacks.warm_start.WarmStart", "params": {}},
    "compiled": {"target": "ldm.training.callbacks.compiled.CompiledDenoiser", "params": {}},
    "channels_last": {"target": "ldm.training.callbacks.compiled.ChannelsLast", "params": {}},
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
# Loggers that Lightning has no more.
_GONE_LOGGERS = ("TestTubeLogger",)
# What of `modelcheckpoint` is about last.ckpt; anything else asks for Lightning's own callback beside it.
_LAST_CHECKPOINT_KEYS = ("every_n_train_steps", "save_last", "verbose", "dirpath", "filename")
_MODEL_CHECKPOINT = "pytorch_lightning.callbacks.ModelCheckpoint"


def complete(lightning: Mapping[str, Any] | None, *, personalization: bool = False) -> DictConfig:
    """The `lightning` node with every callback's target filled in, so that it can be checked and built."""
    node = OmegaConf.create(lightning or {})
    named = node.get("callbacks") or {}
    usual = DEFAULT_CALLBACKS | (PERSONALIZATION_CALLBACKS if personalization else {})
    node["callbacks"] = OmegaConf.merge(
        usual | {k: v for k, v in KNOWN_CALLBACKS.items() if k in named}, named
    )
    if "modelcheckpoint" in node:
        node["modelcheckpoint"] = OmegaConf.merge({"target": _MODEL_CHECKPOINT}, node["modelcheckpoint"])
    if "logger" in node:
        if str(node["logger"].get("target", "")).rpartition(".")[2] in _GONE_LOGGERS:
            del node["logger"]
        else:
            default = {"target": "pytorch_lightning.loggers.TensorBoardLogger"}
            node["logger"] = OmegaConf.merge(default, node["logger"])
    return node


def trainer_kwargs(
    lightning: Mapping[str, Any], devices: Devices, *, personalization: bool
) -> dict[str, Any]:
    """Options for Lightning's Trainer: what is usual here, then what the YAML and the flags say."""
    said = translate(OmegaConf.to_container(OmegaConf.create(lightning.get("trainer") or {}), resolve=True))
    said.pop("gpus", None)
    said = {
        key: value for key, value in said.items() if value is not None or key == "check_val_every_n_epoch"
    }
    if personalization and not {"max_steps", "max_epochs", "max_time"} & said.keys():
        logger.info("no max_steps is given: stopping after 6100, as the original's YAMLs do")
        said["max_steps"] = 6100
    several = processes(said, devices) > 1
    usual = {
        "accelerator": "gpu" if devices.accelerator == "cuda" else "cpu",
        "devices": devices.devices,
        "strategy": "ddp" if several else "auto",
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 10,
        "enable_model_summary": False,
        # The data module's sampler divides the samples itself.
        "use_distributed_sampler": False,
    }
    if "max_steps" not in said and "max_epochs" not in said:
        usual["max_epochs"] = -1
    return usual | said


def check_lengths(lightning: Mapping[str, Any]) -> None:
    """Raise UsageError for numbers of steps or epochs that make no sense."""
    for key in ("max_steps", "max_epochs"):
        number = (lightning.get("trainer") or {}).get(key)
        if number is not None and (not isinstance(number, int) or (number < 1 and number != -1)):
            raise UsageError(f"{key} is {number!r}; it must be a whole number from 1 on (-1: no limit)")


def make_loggers(lightning: Mapping[str, Any], run: RunDir) -> list[Logger]:
    """CSV always; TensorBoard where it is installed, or the logger that the YAML names."""
    # A file for each start of the run: Lightning empties an old one.
    loggers: list[Logger] = [CSVLogger(run.path, name="csv", version=run.now)]
    if node := lightning.get("logger"):
        params = {"save_dir": str(run.path)} | dict(node.get("params") or {})
        try:
            loggers.append(instantiate_from_config({"target": node["target"], "params": params}))
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"lightning.logger {node['target']} needs a package that is not installed: "
                f"{str(error).splitlines()[0]}"
            ) from error
    elif importlib.util.find_spec("tensorboard"):
        loggers.append(TensorBoardLogger(run.path, name="tensorboard", version=""))
    return loggers


def make_callbacks(
    lightning: DictConfig, config: DictConfig, run: RunDir, model: Any, requests: Requests, resume: str
) -> list[Callback]:
    """All callbacks of a run; those whose `before_saving` is true go before the one that meets signals."""
    nodes = {name: node for name, node in lightning["callbacks"].items() if node is not None}
    checkpoint = dict((lightning.get("modelcheckpoint") or {}).get("params") or {})
    every = checkpoint.get("every_n_train_steps") or 500
    saver_params = nodes.get("embedding_saver", {}).get("params")
    if saver_params is not None and "every_n_train_steps" not in saver_params:
        saver_params["every_n_train_steps"] = every
    if "metrics_over_trainsteps_checkpoint" in nodes:
        params = nodes["metrics_over_trainsteps_checkpoint"]["params"]
        params.setdefault("dirpath", str(run.checkpoints / "trainstep_checkpoints"))
    setup = SetupCallback(
        resume=resume,
        now=run.now,
        logdir=run.path,
        ckptdir=run.checkpoints,
        cfgdir=run.configs,
        config=OmegaConf.masked_copy(config, [key for key in config if key != "lightning"]),
        lightning_config=config.get("lightning") or OmegaConf.create({}),
    )
    built = [instantiate_from_config(node) for node in nodes.values()]
    for callback in built:
        if hasattr(callback, "requests"):
            callback.requests = requests
    last = LastCheckpoint(run.last, every_n_train_steps=every)
    further = {key: value for key, value in checkpoint.items() if key not in _LAST_CHECKPOINT_KEYS}
    if further and not is_personalization(model):
        built.append(_model_checkpoint(checkpoint, run))
    savers = [callback.save_now for callback in built if isinstance(callback, EmbeddingSaver)]
    early = [callback for callback in built if getattr(callback, "before_saving", False)]
    later = [callback for callback in built if callback not in early]
    interruption = Interruption(requests, [last.save_now, *savers])
    return [setup, StepGuard(requests), ValidationSeed(), *early, interruption, *later, last]


def make_trainer(
    options: Mapping[str, Any],
    run: RunDir,
    callbacks: list[Callback],
    loggers: list[Logger],
    *,
    personalization: bool = False,
) -> pl.Trainer:
    """Lightning's Trainer in the run folder; a `personalization` in half precision learns in float32 all the same."""
    options, plugins = dict(options), [StateFile()]
    if personalization and (half := plugin_for(options.get("precision"), options.get("accelerator", "auto"))):
        del options["precision"]
        plugins.append(half)
    if options.get("enable_progress_bar") is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, pl.callbacks.ProgressBar)]
    return pl.Trainer(
        default_root_dir=str(run.path), callbacks=callbacks, logger=loggers, plugins=plugins, **options
    )


def _model_checkpoint(params: Mapping[str, Any], run: RunDir) -> ModelCheckpoint:
    usual = {"dirpath": str(Path(run.checkpoints)), "filename": "{epoch:06}-{step:09}"}
    return ModelCheckpoint(**usual | {k: v for k, v in params.items() if k != "save_last"})
