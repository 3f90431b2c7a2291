"""Lightning's Trainer for a run: devices, precision, options (including old names), callbacks and loggers."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn

from ldm.checkpoint import WEIGHTED
from ldm.training.callbacks.base import RunCallback, is_personalization
from ldm.training.callbacks.checkpoint import LastCheckpoint, SetupCallback, StateFile, ValidationSeed
from ldm.training.callbacks.embedding_saver import EmbeddingSaver
from ldm.training.callbacks.interruption import Interruption, Requests, StepGuard
from ldm.training.command_line import OLD_STRATEGIES, OLD_TRAINER_KEYS, accelerator_kind, parse_gpus
from ldm.training.run_folder import RunFolder
from ldm.util import ConfigError, UserError, best_device, instantiate_from_config, why_no_mps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Devices:
    """The devices of a run: the accelerator, "cuda", "mps" or "cpu", and a number of devices or their indices."""

    accelerator: str
    devices: int | list[int]

    @property
    def count(self) -> int:
        return self.devices if isinstance(self.devices, int) else len(self.devices)


def processes(trainer: Mapping[str, Any], devices: Devices | None = None) -> int:
    """The number of processes for a `lightning.trainer` node: its devices, or the chosen ones, times `num_nodes`.

    -1, all GPUs, counts as 2 if no devices are chosen yet.
    """
    nodes = int(trainer.get("num_nodes") or 1)
    given = trainer.get("devices")
    if given is None or given == "auto":
        if devices is not None:
            return devices.count * nodes
        given = trainer.get("gpus")
    gpus = parse_gpus(given)
    count = len(gpus) if isinstance(gpus, list) else 2 if gpus == -1 else max(gpus or 1, 1)
    return count * nodes


def choose_devices(gpus: Any, accelerator: Any = None) -> Devices:
    """The devices for a run: CUDA GPUs, the Apple GPU, or the CPU, if `gpus` is not 0 and `accelerator` allows them.

    `gpus` on a machine without a GPU is logged, and the CPU is taken.

    Raises:
        UserError: this machine does not have the GPU.
    """
    requested = parse_gpus(gpus)
    kind = accelerator_kind(accelerator)
    if kind == "cpu" or (requested in (0, []) and kind not in ("cuda", "gpu", "mps")):
        return Devices("cpu", 1)
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    why_not = why_no_mps()
    if kind == "mps" and why_not:
        raise UserError(f"accelerator is mps, but {why_not}; leave it out")
    if kind == "mps" or (available == 0 and kind != "cuda" and not why_not):
        if requested not in (None, 0, -1, 1, [], [0]):
            raise UserError(f"--gpus {gpus} asks for several GPUs; this machine has one Apple GPU")
        return Devices("mps", 1)
    if available == 0:
        if kind in ("cuda", "gpu"):
            raise UserError(
                f"accelerator is {kind}, but torch finds no GPU here; leave it out to train on the CPU"
            )
        if requested is not None:
            logger.info("no CUDA device here: training on the CPU")
        return Devices("cpu", 1)
    if requested in (None, 0, []):
        return Devices("cuda", [0])
    if requested == -1:
        return Devices("cuda", available)
    if isinstance(requested, int):
        if not 0 < requested <= available:
            raise UserError(f"--gpus {requested} asks for {requested} GPUs; this machine has {available}")
        return Devices("cuda", requested)
    absent = [number for number in requested or [] if not 0 <= number < available]
    if absent:
        raise UserError(f"--gpus asks for GPU {absent[0]}; this machine has {available}, numbered from 0")
    return Devices("cuda", sorted(set(requested or [])))


# `lightning.trainer.precision` -> the precision of matrix products and convolutions.
_KINDS = {
    "16": "16-mixed",
    "16-mixed": "16-mixed",
    "16-true": "16-mixed",
    "bf16": "bf16-mixed",
    "bf16-mixed": "bf16-mixed",
    "bf16-true": "bf16-mixed",
}
FULL = "32-true"
_TYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class FrozenHalf(MixedPrecision):
    """Autocast with frozen weights that are stored in half precision.

    Autocast caches converted weights only if they are trained, so it converts frozen weights at every use: a tenth of
    the step of a denoiser of 220 million parameters with 32x32 latents on a CPU. This plugin converts the frozen
    linear and convolutional layers of the denoiser and the text encoder once; results are identical. Norms,
    embeddings, the first stage, trained weights, the optimizer and the loss stay in float32. After the run the layers
    are float32 again, with values rounded to half precision.
    """

    def __init__(self, precision: str, device: str) -> None:
        super().__init__(precision, device)  # type: ignore[arg-type]
        self.dtype = _TYPES[precision]
        self._converted: list[nn.Module] = []

    def convert_module(self, module: nn.Module) -> nn.Module:
        parts = [getattr(module, name, None) for name in ("model", "cond_stage_model")]
        for part in [part for part in parts if isinstance(part, nn.Module)]:
            for layer in part.modules():
                if isinstance(layer, WEIGHTED) and not any(p.requires_grad for p in layer.parameters()):
                    self._converted.append(layer.to(self.dtype))
        return module

    def teardown(self) -> None:
        while self._converted:
            self._converted.pop().float()


def plugin_for(precision: Any, accelerator: str) -> FrozenHalf | None:
    """The plugin for a half precision; None for any other, which is left to Lightning.

    Lightning's "true" precisions would also convert the vectors and the optimizer. A bfloat16 has 8 significant bits,
    in which updates of 1e-3 are lost, so here "true" means the same as "mixed".
    """
    kind, device, note = _resolved(precision, accelerator)
    if note:
        logger.info("lightning.trainer.precision: %s; using %s", note, kind or FULL)
    return None if kind is None else FrozenHalf(kind, device)


def half_for(precision: Any, accelerator: str) -> torch.dtype | None:
    """The type that `plugin_for` keeps frozen layers in; None if it leaves them in float32."""
    kind, _, _ = _resolved(precision, accelerator)
    return None if kind is None else _TYPES[kind]


def possible_precision(precision: Any, accelerator: str) -> Any:
    """The precision for Lightning's Trainer: the one asked for, or full precision where the device has no half one."""
    kind, device, _ = _resolved(precision, accelerator)
    if device == "mps" and kind is None and str(precision) in _KINDS:
        return FULL
    return precision


def _resolved(precision: Any, accelerator: str) -> tuple[str | None, str, str]:
    """The half precision that is possible on a device, the device, and why it is not the one asked for."""
    kind = _KINDS.get(str(precision))
    device = {"gpu": "cuda", "auto": best_device()}.get(accelerator, accelerator)
    if device == "cpu" and kind == "16-mixed":
        return "bf16-mixed", device, f"{precision} is not supported on a CPU"
    if device == "cuda" and kind == "bf16-mixed" and _emulates_bfloat16():
        return "16-mixed", device, "this GPU has no bfloat16"
    if device == "mps" and kind is not None and not torch.backends.mps.is_macos_or_newer(14, 0):
        return None, device, "half precision on an Apple GPU needs macOS 14"
    if device == "mps" and kind == "16-mixed":  # which would need gradients to be scaled
        return "bf16-mixed", device, f"{precision} is not supported on an Apple GPU"
    return kind, device, ""


def _emulates_bfloat16() -> bool:
    """Whether the GPU only emulates bfloat16 (before Ampere), which is slow and needs more memory."""
    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)


# What to do in place of an option that is ignored, where there is something to do.
_INSTEAD = {
    "terminate_on_nan": "the callback training_guard takes such losses back",
    "print_nan_grads": "the callback training_guard takes such losses back",
    "auto_select_gpus": "name GPUs with --gpus 0,1",
    "auto_scale_batch_size": "set data.params.batch_size",
    "auto_lr_find": "set model.base_learning_rate",
    "amp_backend": "set precision",
    "amp_level": "set precision",
    "log_gpu_memory": "the callback cuda_callback logs it",
    "early_stop_callback": "the callback deterministic_loss has the option stop",
    "weights_save_path": "use --logdir",
    "default_save_path": "use --logdir",
    "tpu_cores": "this trains on CUDA GPUs, Apple GPUs and CPUs",
    "num_tpu_cores": "this trains on CUDA GPUs, Apple GPUs and CPUs",
    "ipus": "this trains on CUDA GPUs, Apple GPUs and CPUs",
    "hpus": "this trains on CUDA GPUs, Apple GPUs and CPUs",
    "default_root_dir": "use --logdir",
    "callbacks": "use lightning.callbacks",
    "logger": "use lightning.logger",
    "plugins": "use precision and strategy",
}
# Options of the present Trainer that the run sets itself.
_SET_BY_THE_RUN = ("default_root_dir", "callbacks", "logger", "plugins", "barebones")


def translate_old_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer options with current names; an option that no longer exists is dropped and logged. `gpus` stays."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        if key in _SET_BY_THE_RUN or (key in OLD_TRAINER_KEYS and OLD_TRAINER_KEYS[key] is None):
            # false is what most of them were without being set, but not the logger
            if value is not None and (value is not False or key == "logger"):
                why = "is set by the run" if key in _SET_BY_THE_RUN else "belongs to Lightning 1.x"
                instead = f"; {_INSTEAD[key]}" if key in _INSTEAD else ""
                logger.info("lightning.trainer.%s %s and is ignored%s", key, why, instead)
            continue
        name = OLD_TRAINER_KEYS.get(key) or key
        if name == key:
            found[key] = value
        else:
            found.setdefault(name, _translated(key, value))
    for key in ("accelerator", "strategy"):
        if (strategy := OLD_STRATEGIES.get(str(found.get(key)))) is not None:
            del found[key]
            found.setdefault("strategy", strategy)
    if found.get("enable_checkpointing") is False:
        logger.info("lightning.trainer.enable_checkpointing: false is ignored: a run always saves its state")
        del found["enable_checkpointing"]
    return found


def _translated(key: str, value: Any) -> Any:
    """The value of an old option under its current name; None for the default."""
    if key == "use_amp":
        return "16-mixed" if value else None
    if key == "weights_summary":
        return value is not None  # "top" and "full" are depths of the summary
    if key == "progress_bar_refresh_rate":
        # Every other number of steps is that of RunProgress.
        return False if value == 0 else None
    if key == "checkpoint_callback":
        return bool(value) if value is not None else None
    if key == "reload_dataloaders_every_epoch":
        return int(bool(value))
    return value


# Params of `modelcheckpoint` for last.ckpt; any other param adds Lightning's ModelCheckpoint.
_LAST_CHECKPOINT_KEYS = ("every_n_train_steps", "save_last", "verbose", "dirpath", "filename")


def trainer_kwargs(
    lightning: Mapping[str, Any], devices: Devices, *, personalization: bool
) -> dict[str, Any]:
    """Options for Lightning's Trainer: the defaults, then those of the YAML and the flags."""
    node = OmegaConf.to_container(OmegaConf.create(lightning.get("trainer") or {}), resolve=True)
    options = translate_old_keys(cast(dict[str, Any], node))
    options.pop("gpus", None)
    options = {
        key: value for key, value in options.items() if value is not None or key == "check_val_every_n_epoch"
    }
    if personalization and not {"max_steps", "max_epochs", "max_time"} & options.keys():
        logger.info("no max_steps is given: stopping after 6100, as the original's YAMLs do")
        options["max_steps"] = 6100
    options["accelerator"] = "gpu" if devices.accelerator == "cuda" else devices.accelerator
    if "precision" in options:
        options["precision"] = possible_precision(options["precision"], devices.accelerator)
    defaults = {
        "devices": devices.devices,
        "strategy": "ddp" if processes(options, devices) > 1 else "auto",
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 10,
        "enable_model_summary": False,
        # The data module's sampler distributes the samples itself.
        "use_distributed_sampler": False,
    }
    if "max_steps" not in options and "max_epochs" not in options:
        defaults["max_epochs"] = -1
    return defaults | options


def make_loggers(lightning: Mapping[str, Any], run: RunFolder) -> list[Logger]:
    """The CSV logger, and the logger of the YAML or else TensorBoard, if it is installed."""
    # A folder of its own for each start of the run, because Lightning deletes an old file.
    # Each row is written at once, so that the curves of a run can be seen while it goes on.
    loggers: list[Logger] = [CSVLogger(run.path, name="csv", version=run.now, flush_logs_every_n_steps=1)]
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
    lightning: DictConfig,
    config: DictConfig,
    run: RunFolder,
    model: pl.LightningModule,
    requests: Requests,
    resume: str,
) -> list[Callback]:
    """All callbacks of a run, in their order (see `RunCallback.runs_before_saving`)."""
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
        config=OmegaConf.masked_copy(config, [str(key) for key in config if key != "lightning"]),
        lightning_config=config.get("lightning") or OmegaConf.create({}),
    )
    built = [instantiate_from_config(node) for node in nodes.values()]
    for name, callback in zip(nodes, built, strict=True):
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"lightning.callbacks.{name}: {nodes[name]['target']} is no callback of Lightning; name a class that is"
            )
    for callback in built:
        if isinstance(callback, RunCallback):
            callback.requests = requests
    last = LastCheckpoint(run.last, every_n_train_steps=every)
    further = {key: value for key, value in checkpoint.items() if key not in _LAST_CHECKPOINT_KEYS}
    if further and is_personalization(model):
        logger.info(
            "lightning.modelcheckpoint: %s is ignored: a run saves last.ckpt, and embeddings_gs-N.pt every %d steps",
            ", ".join(further),
            every,
        )
    elif further:
        built.append(_model_checkpoint(checkpoint, run))
    savers = [callback.save_now for callback in built if isinstance(callback, EmbeddingSaver)]
    early = [one for one in built if isinstance(one, RunCallback) and one.runs_before_saving]
    later = [one for one in built if one not in early]
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
    """Lightning's Trainer; a personalization is trained in float32 even if the frozen model is in half precision."""
    options = dict(options)
    plugins: list[Any] = [StateFile()]
    if personalization and (half := plugin_for(options.get("precision"), options.get("accelerator", "auto"))):
        del options["precision"]
        plugins.append(half)
    if options.get("enable_progress_bar") is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, pl.callbacks.ProgressBar)]
    return pl.Trainer(
        default_root_dir=str(run.path), callbacks=callbacks, logger=loggers, plugins=plugins, **options
    )


def check_options(options: Mapping[str, Any], folder: Path) -> None:
    """Let Lightning read the Trainer's options before a model is read.

    Raises:
        ConfigError: Lightning refuses one.
    """
    options = dict(options)
    if half_for(options.get("precision"), options.get("accelerator", "auto")) is not None:
        del options["precision"]  # which a plugin takes the place of, see `build_trainer`
    with refusals():
        pl.Trainer(
            **{**options, "enable_progress_bar": False, "enable_checkpointing": False},
            default_root_dir=str(folder),
            logger=False,
        )


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what Lightning says of options in this block into a ConfigError."""
    try:
        yield
    except UserError:
        raise
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ConfigError(f"lightning.trainer: {str(error).splitlines()[0]}") from error


def _model_checkpoint(params: Mapping[str, Any], run: RunFolder) -> ModelCheckpoint:
    defaults = {"dirpath": str(run.checkpoints), "filename": "{epoch:06}-{step:09}"}
    return ModelCheckpoint(**defaults | {k: v for k, v in params.items() if k != "save_last"})
