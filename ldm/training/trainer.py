"""Lightning's Trainer for a run: its devices, options (old names included), callbacks and loggers."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from ldm.training.callbacks.checkpoint import LastCheckpoint, StateFile, is_personalization
from ldm.training.callbacks.embedding_saver import EmbeddingSaver
from ldm.training.callbacks.interruption import Interruption, Requests, StepGuard
from ldm.training.callbacks.setup import SetupCallback, ValidationSeed
from ldm.training.precision import plugin_for
from ldm.training.run_folder import RunFolder
from ldm.util import ConfigError, UsageError, UserError, instantiate_from_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Devices:
    """Where a run computes: an accelerator, its devices, and how many they are on one machine."""

    accelerator: str
    devices: int | list[int]

    @property
    def count(self) -> int:
        return self.devices if isinstance(self.devices, int) else len(self.devices)


def parse_gpus(gpus: Any) -> int | list[int] | None:
    """The meaning of Lightning 1.x: "0," and "0,1" and lists name devices, "2" is a count, -1 is all.

    None where nothing was asked for, 0 for no GPU.
    """
    if gpus is None or gpus == "":
        return None
    try:
        if isinstance(gpus, str):
            text = gpus.strip()
            if "," not in text and not text.startswith("["):
                return int(text)
            text = text.removeprefix("[").removesuffix("]")
            return [int(part) for part in text.split(",") if part.strip()]
        if isinstance(gpus, bool):
            return int(gpus)
        return gpus if isinstance(gpus, int) else [int(part) for part in gpus]
    except (TypeError, ValueError):
        raise UsageError(
            f'--gpus \'{gpus}\' is not understood; write "0," for GPU 0, "0,1" for two, "-1" for all'
        ) from None


def processes(trainer: Mapping[str, Any], devices: Devices | None = None) -> int:
    """How many processes `lightning.trainer` asks for: devices, its own or those chosen, times `num_nodes`.

    -1, which is all GPUs, may be several.
    """
    nodes = int(trainer.get("num_nodes") or 1)
    said = trainer.get("devices")
    if said is None or said == "auto":
        if devices is not None:
            return devices.count * nodes
        said = trainer.get("gpus")
    said = parse_gpus(said)
    count = len(said) if isinstance(said, list) else 2 if said == -1 else max(said or 1, 1)
    return count * nodes


def choose_devices(gpus: Any, accelerator: Any = None) -> Devices:
    """The devices for a run; without CUDA one line says that the CPU is used, unless `accelerator` says so.

    Raises UserError for a GPU that this machine does not have.
    """
    wanted = parse_gpus(gpus)
    if str(accelerator).lower() == "cpu":
        return Devices("cpu", 1)
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there == 0:
        if wanted not in (None, 0):
            logger.info("no CUDA device here: training on the CPU")
        return Devices("cpu", 1)
    if wanted is None:
        return Devices("cuda", [0])
    if wanted == -1:
        return Devices("cuda", there)
    if wanted in (0, []):
        return Devices("cpu", 1)
    if isinstance(wanted, int):
        if not 0 < wanted <= there:
            raise UserError(f"--gpus {wanted} asks for {wanted} GPUs; this machine has {there}")
        return Devices("cuda", wanted)
    absent = [number for number in wanted if not 0 <= number < there]
    if absent:
        raise UserError(f"--gpus asks for GPU {absent[0]}; this machine has {there}, numbered from 0")
    return Devices("cuda", sorted(set(wanted)))


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


def translate_old_keys(options: Mapping[str, Any]) -> dict[str, Any]:
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
    "tripwires": {"target": "ldm.training.callbacks.guard.TrainingGuard", "params": {}},
    "deterministic_loss": {
        "target": "ldm.training.callbacks.fixed_loss.DeterministicLoss",
        "params": {},
    },
    "health": {"target": "ldm.training.callbacks.guard.VectorStats", "params": {}},
    "summary_pictures": {
        "target": "ldm.training.callbacks.summary_images.SummaryImages",
        "params": {},
    },
}
# Added only where a YAML names them, or where they have something to do.
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
# Loggers that Lightning has no more.
_GONE_LOGGERS = ("TestTubeLogger",)
# What of `modelcheckpoint` is about last.ckpt; anything else asks for Lightning's own callback beside it.
_LAST_CHECKPOINT_KEYS = ("every_n_train_steps", "save_last", "verbose", "dirpath", "filename")
_MODEL_CHECKPOINT = "pytorch_lightning.callbacks.ModelCheckpoint"


def complete_lightning(lightning: Mapping[str, Any] | None, *, personalization: bool = False) -> DictConfig:
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
    said = translate_old_keys(
        OmegaConf.to_container(OmegaConf.create(lightning.get("trainer") or {}), resolve=True)
    )
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


def make_loggers(lightning: Mapping[str, Any], run: RunFolder) -> list[Logger]:
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
    lightning: DictConfig, config: DictConfig, run: RunFolder, model: Any, requests: Requests, resume: str
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


def build_trainer(
    options: Mapping[str, Any],
    run: RunFolder,
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


def _model_checkpoint(params: Mapping[str, Any], run: RunFolder) -> ModelCheckpoint:
    usual = {"dirpath": str(Path(run.checkpoints)), "filename": "{epoch:06}-{step:09}"}
    return ModelCheckpoint(**usual | {k: v for k, v in params.items() if k != "save_last"})
