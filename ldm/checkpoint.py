"""Loading checkpoints into models; `ldm.weights` reads their files, `ldm.base_models` says what they are."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from ldm.base_models import (
    BaseModel,
    check_first_stage,
    check_parts,
    complete_config,
    family_of,
    no_first_stage,
    recognise,
    what_is,
)
from ldm.diffusers_layout import read_folder, read_vae
from ldm.diffusers_settings import vae_params
from ldm.model_kinds import ENCODERS, UNET, VAE
from ldm.util import ConfigError, UserError, instantiate_from_config, skip_pretrained
from ldm.values import at
from ldm.weights import CheckpointError, read_state_dict, save_state_dict

__all__ = ["CheckpointError", "load_model_from_config", "load_state", "read_state_dict", "save_state_dict"]

logger = logging.getLogger(__name__)

# Layers whose products autocast computes in half precision.
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)
# Where frozen linear and convolutional layers may be kept in half precision: the denoiser and the text encoders.
_HALVED = ("model.", *ENCODERS)


def load_model_from_config(
    config: Mapping[str, Any] | str | Path,
    ckpt: str | Path,
    device: torch.device | str | None = None,
    *,
    vae: str | Path | None = None,
    half: torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> nn.Module:
    """Build the model that a YAML describes and load a checkpoint into it.

    Weights are mapped into memory and converted or moved once, one after the other. From a folder of diffusers, sizes,
    noise schedule, scale and tokenizer replace those of the YAML.

    Args:
        config: path of the YAML, or its content, or the content of its `model:` node.
        ckpt: a checkpoint, a folder of diffusers, or a hub id.
        device: where the model is moved to; None leaves it on the CPU.
        vae: file, folder or hub id of a first stage in place of that of the checkpoint.
        half: what frozen linear and convolutional layers of the denoiser and the text encoder are kept in, for use
            under autocast of this type; all other weights are in float32.
        variant, revision: of a folder of diffusers or a hub id, see `ldm.base_models.recognise`.

    Returns:
        The model in eval mode. Unexpected keys of the checkpoint are logged once.

    Raises:
        ConfigError: the YAML does not fit its classes; the checkpoint is not opened then.
        CheckpointError: the checkpoint does not fit, or leaves parameters without a value.
    """
    node, base = complete_config(config, ckpt, variant, revision)
    first_stage = None if vae is None else _first_stage(vae, node, base)
    state = read_state_dict(ckpt) if base is None else read_base_model(base)
    if first_stage is None and not any(key.startswith(VAE) for key in state):
        vae = at(node, ["params", "first_stage_config", "params", "ckpt_path"])
        first_stage = None if vae is None else _first_stage(vae, node, base)
    if first_stage is not None:
        state = {key: value for key, value in state.items() if not key.startswith(VAE)}
        state |= {VAE + key: value for key, value in first_stage.items()}
    complete = check_parts(state, node, ckpt)
    with contextlib.ExitStack() as stack:
        if complete:
            stack.enter_context(skip_pretrained())
            stack.enter_context(_without_memory())
        stack.enter_context(uninitialised())
        try:
            model: nn.Module = instantiate_from_config(node)
        except UserError as error:
            if complete or isinstance(error, ConfigError):
                raise
            raise CheckpointError(f"'{ckpt}' has no text encoder, and the {error}") from error
    filled = () if complete else ENCODERS
    source = f"checkpoint '{ckpt}'"
    _load(
        model,
        state,
        source,
        filled,
        advice=lambda incomplete: _advice(ckpt, base, node, incomplete),
        assign=complete,
        device=torch.device(device or "cpu"),
        half=half,
    )
    return (model if device is None else model.to(device)).eval()


def read_base_model(base: BaseModel | str | Path) -> dict[str, Tensor]:
    """Return the weights of a file, a folder of diffusers or a hub id under the names of LDM's checkpoints."""
    base = base if isinstance(base, BaseModel) else recognise(base)
    return read_state_dict(base.path) if base.folder is None else read_folder(base.folder, base.family)


OWN_CONFIG = "use the config that belongs to it"


def _advice(ckpt: str | Path, base: BaseModel | None, node: Mapping[str, Any], incomplete: bool) -> str:
    """What to do about weights that do not fit the model of a node, because some are missing or have other shapes."""
    if base is None:
        kind = what_is(ckpt)
        return f"it is {kind.name}: {kind.remedy}" if kind else OWN_CONFIG
    if incomplete and family_of(node) == base.family:
        return f"it is {base.name}, as the config says, but incomplete or changed; download it again"
    return f"it looks like {base.name} of other sizes: {OWN_CONFIG}"


def _first_stage(source: str | Path, node: Any, base: BaseModel | None) -> dict[str, Tensor]:
    """The weights of another first stage for the model of a node, whose sizes become those of the first stage.

    Raises:
        CheckpointError: it is none, or one of another family: its latents have other channels or another scale.
    """
    family = base.family if base is not None else family_of(node)
    if Path(source).is_file():
        check_first_stage(source, family)
    try:
        state, settings = read_vae(source)
    except CheckpointError as error:
        kind = what_is(source) if Path(source).is_file() else None
        if kind is None or "VAE" in kind.name:
            raise
        raise no_first_stage(source, kind) from error
    params = node["params"]
    channels, scale = params.get("channels"), params.get("scale_factor")
    latent = state["decoder.conv_in.weight"].shape[1]
    if family is not None and latent != channels:
        raise CheckpointError(
            f"'{source}' is a first stage of {latent} channels, and the model needs {channels}; name one of its family"
        )
    if settings:
        try:
            sizes = vae_params(settings)
        except CheckpointError as error:
            raise CheckpointError(f"'{source}': {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"'{source}': its config.json is damaged ({error}); download it again"
            ) from error
        if settings.get("scaling_factor", scale) != scale:
            raise CheckpointError(
                f"'{source}' is a first stage with the scaling_factor {settings['scaling_factor']}, and the model's is "
                f"{scale}; name one of its family"
            )
        part = params.get("first_stage_config") or {}
        params["first_stage_config"] = {**part, "params": {**(part.get("params") or {}), **sizes}}
    return state


# -- a state dict and a model --------------------------------------------------------------------------------


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
    _load(model, dict(state), source, filled)


def _load(
    model: nn.Module,
    state: dict[str, Tensor],
    source: str,
    filled: tuple[str, ...],
    *,
    advice: Callable[[bool], str] = lambda incomplete: OWN_CONFIG,
    assign: bool = False,
    device: torch.device | None = None,
    half: torch.dtype | None = None,
) -> None:
    """`load_state`, which takes the tensors out of `state` and, with `assign`, makes them the model's own.

    With `assign` each tensor is converted to the type of its parameter, or to `half`, and moved to the device when its
    turn comes, and the memory of the file behind it is given back. `advice` ends the messages about
    what does not fit, or is missing.
    """
    own = model.state_dict()
    _restore_averages(state, own)
    wrong = [key for key in state.keys() & own.keys() if state[key].shape != own[key].shape]
    shared = state.keys() & own.keys()
    if not shared:
        raise CheckpointError(
            f"{source} holds no weight of {type(model).__name__} (it has '{min(state, default='nothing')}', the model "
            f"'{min(own)}'); {advice(False)}"
        )
    optional = (*getattr(model, "optional_state", ()), *filled)
    wrong = [key for key in wrong if not key.startswith(optional)]
    if wrong:
        key = min(wrong)
        raise CheckpointError(
            f"{source} does not fit the config: '{key}' is {list(state[key].shape)} in the file and "
            f"{list(own[key].shape)} in the model ({len(wrong)} such keys); {advice(False)}"
        )
    parameters = dict(model.named_parameters())
    missing = [key for key in parameters if key not in state and not key.startswith(optional)]
    if missing:
        raise CheckpointError(
            f"{source} leaves {len(missing)} of {len(parameters)} parameters without a value, such as "
            f"'{missing[0]}'; {advice(True)}"
        )
    foreign = [key for key in state if key.startswith(_COMPUTING) and key not in own and ".loss." not in key]
    if foreign and shared & {key for key in own if key.startswith(foreign[0].partition(".")[0])}:
        raise CheckpointError(
            f"{source} does not fit the config: the model has no '{foreign[0]}' ({len(foreign)} such keys); "
            f"{advice(False)}"
        )
    types = dict.fromkeys(halved(model), half) if half is not None else {}
    fitting = {}
    for key in list(state):
        value = state.pop(key)
        if key not in own:
            fitting[key] = value
        elif value.shape == own[key].shape and not _is_rounded_schedule(key, value):
            fitting[key] = value.to(device, types.get(key, own[key].dtype)) if assign else value
        del value
    result = model.load_state_dict(fitting, strict=False, assign=assign)
    if assign:
        _give_memory(model, device)
    on_weights_loaded = getattr(model, "on_weights_loaded", None)
    if on_weights_loaded is not None:
        on_weights_loaded(fitting)
    unexpected = [key for key in result.unexpected_keys if not key.startswith(_IGNORED)]
    if unexpected:
        logger.warning(
            "%s: %d unexpected keys are ignored, such as '%s'", source, len(unexpected), unexpected[0]
        )


def _restore_averages(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Give the averages of a checkpoint that holds no other weights of the denoiser the names of the weights."""
    if any(key.startswith(UNET) for key in state):
        return
    for key in own:
        averaged = "model_ema." + key.removeprefix("model.").replace(".", "")
        if key.startswith(UNET) and averaged in state:
            state[key] = state[averaged]


def _is_rounded_schedule(key: str, value: Tensor) -> bool:
    """Whether this is a buffer of the noise schedule in half precision, which is too coarse; it is computed anew."""
    return "." not in key and value.ndim == 1 and value.dtype in (torch.float16, torch.bfloat16)


def halved(model: nn.Module) -> list[str]:
    """The weights that autocast converts at each use, because they are frozen."""
    return [
        f"{name}.{key}"
        for name, layer in model.named_modules()
        if name.startswith(_HALVED) and isinstance(layer, WEIGHTED)
        for key, parameter in layer.named_parameters(recurse=False)
        if not parameter.requires_grad
    ]


def _give_memory(model: nn.Module, device: torch.device | None) -> None:
    """Fill what a checkpoint may lack, and has no memory yet, with zeros."""
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and tensor.is_meta:
                zeros = torch.zeros_like(tensor, device=device)
                if isinstance(tensor, nn.Parameter):
                    module._parameters[name] = nn.Parameter(zeros, tensor.requires_grad)
                else:
                    module._buffers[name] = zeros


# Of these every weight takes part in what is computed.
_COMPUTING = (UNET, f"{VAE}encoder.", f"{VAE}decoder.")
# Averaged copies of the weights, and a buffer of older releases of transformers.
_IGNORED = (
    "model_ema.",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
    # Marks and a schedule in files of Stable Diffusion XL.
    "v_pred",
    "ztsnr",
    "denoiser.",
)


_filled: ContextVar[bool] = ContextVar("filled_by_a_checkpoint", default=True)
_light: ContextVar[bool] = ContextVar("without_memory", default=False)


class _SkipRandomFill(TorchFunctionMode):
    """Skips in-place random initialisation of parameters."""

    # Names of methods of tensors, and of functions of torch.nn.init that reach a TorchFunctionMode themselves. They are
    # names, because transformers 5 puts its own functions in the place of those of torch.
    _FILLS = ("uniform_", "normal_", "kaiming_uniform_")

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        name = getattr(function, "__name__", "")
        if name in self._FILLS and _filled.get() and isinstance(tensor, nn.Parameter):
            return tensor
        return function(*args, **kwargs)


@contextlib.contextmanager
def _without_memory() -> Iterator[None]:
    """Build layers without memory for their weights in this block: a checkpoint's tensors take their place.

    Embeddings keep theirs, because a personalization may read the vocabulary when it is built.
    """

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or isinstance(module, nn.Embedding):
            return parameter
        if not (_light.get() and _filled.get()):  # of another thread, or of what is learned here
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    token = _light.set(True)
    hook = register_module_parameter_registration_hook(register)  # type: ignore[arg-type]  # it may return one
    try:
        yield
    finally:
        hook.remove()
        _light.reset(token)


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
