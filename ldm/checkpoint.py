"""Loading checkpoints into models; `ldm.weights` reads their files, `ldm.base_models` says what they are."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.base_models import recognise
from ldm.util import ConfigError, check_config, instantiate_from_config, skip_pretrained
from ldm.weights import CheckpointError, read_state_dict, save_state_dict

__all__ = ["CheckpointError", "load_model_from_config", "load_state", "read_state_dict", "save_state_dict"]

logger = logging.getLogger(__name__)

DENOISER, TEXT_ENCODER = "model.diffusion_model.", "cond_stage_model."


def load_model_from_config(
    config: Mapping[str, Any] | str | Path, ckpt: str | Path, device: torch.device | str | None = None
) -> nn.Module:
    """Build the model that a YAML describes and load a checkpoint into it.

    Args:
        config: path of the YAML, or its content, or the content of its `model:` node.
        ckpt: path of the checkpoint.
        device: where the model is moved to; None leaves it on the CPU.

    Returns:
        The model in eval mode. Unexpected keys of the checkpoint are logged once.

    Raises:
        ConfigError: the YAML does not fit its classes; the checkpoint is not opened then.
        CheckpointError: the checkpoint does not fit, or leaves parameters without a value.
    """
    if isinstance(config, (str, Path)):
        if not Path(config).is_file():
            raise ConfigError(f"config '{config}' does not exist; check the path")
        whole: Any = OmegaConf.load(config)
    else:
        whole = config
    node = whole.get("model", whole)
    check_config(node, "model")
    state = read_state_dict(ckpt)
    # If a diffusion checkpoint lacks the text encoder, the pretrained one is read; otherwise it is skipped.
    complete = not any(k.startswith(DENOISER) for k in state) or any(
        k.startswith(TEXT_ENCODER) for k in state
    )
    with skip_pretrained() if complete else contextlib.nullcontext(), uninitialised():
        model = instantiate_from_config(node)
    load_state(model, state, source=f"checkpoint '{ckpt}'", filled=() if complete else (TEXT_ENCODER,))
    if device is not None:
        model = model.to(device)
    return model.eval()


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], source: str, filled: tuple[str, ...] = ()
) -> None:
    """Copy a state dict into a model.

    The model may define two members: `optional_state`, a tuple of key prefixes that the file may lack, and
    `on_weights_loaded(state)`, which is called with what was loaded.

    Args:
        model: filled in place.
        state: tensors by key; a key that the model does not have is logged and ignored.
        source: how messages name the state dict.
        filled: key prefixes of parameters that already have their values; the file may lack them too.

    Raises:
        CheckpointError: no key or a wrong shape fits, or a parameter would be left without a value.
    """
    own = model.state_dict()
    wrong = [key for key in state.keys() & own.keys() if state[key].shape != own[key].shape]
    shared = state.keys() & own.keys()
    if not shared:
        raise CheckpointError(
            f"{source} holds no weight of {type(model).__name__} (it has '{min(state)}', the model "
            f"'{min(own)}'); use the config that belongs to it"
        )
    optional = (*getattr(model, "optional_state", ()), *filled)
    wrong = [key for key in wrong if not key.startswith(optional)]
    if wrong:
        key = min(wrong)
        raise CheckpointError(
            f"{source} does not fit the config: '{key}' is {list(state[key].shape)} in the file and "
            f"{list(own[key].shape)} in the model ({len(wrong)} such keys); use the config that belongs to it"
        )
    parameters = dict(model.named_parameters())
    missing = [key for key in parameters if key not in state and not key.startswith(optional)]
    if missing:
        raise CheckpointError(
            f"{source} leaves {len(missing)} of {len(parameters)} parameters without a value, such as "
            f"'{missing[0]}'; use the config that belongs to it"
        )
    fitting = {key: value for key, value in state.items() if key not in own or value.shape == own[key].shape}
    result = model.load_state_dict(fitting, strict=False)
    on_weights_loaded = getattr(model, "on_weights_loaded", None)
    if on_weights_loaded is not None:
        on_weights_loaded(fitting)
    unexpected = [key for key in result.unexpected_keys if not key.startswith(_IGNORED)]
    if unexpected:
        logger.warning(
            "%s: %d unexpected keys are ignored, such as '%s'", source, len(unexpected), unexpected[0]
        )


# Averaged copies of the weights, and a buffer of older releases of transformers.
_IGNORED = ("model_ema.", "cond_stage_model.transformer.text_model.embeddings.position_ids")


_filled: ContextVar[bool] = ContextVar("filled_by_a_checkpoint", default=True)


class _SkipRandomFill(TorchFunctionMode):
    """Skips in-place random initialisation of parameters."""

    # These functions of torch.nn.init reach a TorchFunctionMode; the others reach it as the methods they call.
    _FILLS = {Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        if _filled.get() and function in self._FILLS and isinstance(tensor, nn.Parameter):
            return tensor
        return function(*args, **kwargs)


@contextlib.contextmanager
def uninitialised() -> Iterator[None]:
    """Skip the random initialisation of layers built in this block, because a checkpoint fills them next."""
    with _SkipRandomFill():
        yield


@contextlib.contextmanager
def initialised() -> Iterator[None]:
    """Let layers built in this block draw their random numbers, even inside `uninitialised`."""
    token = _filled.set(False)
    try:
        yield
    finally:
        _filled.reset(token)


def config_of(ckpt: str) -> Path:
    """Return the YAML to generate with a model: config.yaml beside it, else the one of the model that it is.

    Raises CheckpointError if there is no config.yaml and the model is not one that is known.
    """
    beside = Path(ckpt).with_name("config.yaml")
    return beside if beside.is_file() else recognise(ckpt).inference_config
