"""Loading checkpoints into models; `ldm.weights` reads their files, `ldm.base_models` says what they are."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from ldm.base_models import (
    BaseModel,
    ask_for_prediction,
    check_family,
    family_of,
    family_of_first_stage,
    fitting,
    no_first_stage,
    recognise,
    what_is,
)
from ldm.diffusers_layout import UNET, VAE, read_folder, read_vae
from ldm.diffusers_settings import folder_params, vae_params, zero_snr_params
from ldm.files import is_hub_id
from ldm.front_ends import setting
from ldm.model_kinds import FAMILIES
from ldm.util import (
    ConfigError,
    UserError,
    check_config,
    instantiate_from_config,
    refuse_foreign_target,
    skip_pretrained,
)
from ldm.values import at
from ldm.weights import CheckpointError, read_state_dict, save_state_dict
from ldm.yaml_files import check_interpolations, find_paths, place_in, read_yaml

__all__ = ["CheckpointError", "load_model_from_config", "load_state", "read_state_dict", "save_state_dict"]

logger = logging.getLogger(__name__)

TEXT_ENCODERS = ("cond_stage_model.", "conditioner.")
# Layers whose products autocast computes in half precision.
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)
# Where frozen linear and convolutional layers may be kept in half precision: the denoiser and the text encoders.
_HALVED = ("model.", *TEXT_ENCODERS)


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
    complete = _check_parts(state, node, ckpt)
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
    filled = () if complete else TEXT_ENCODERS
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


def complete_config(
    config: Mapping[str, Any] | str | Path,
    ckpt: str | Path,
    variant: str | None = None,
    revision: str | None = None,
) -> tuple[Any, BaseModel | None]:
    """Return the `model:` node of a YAML as it is for a checkpoint, and what that is if it is known.

    Paths are found (see `ldm.yaml_files.find_paths`); the settings of a folder of diffusers, and what a file notes of
    itself, replace those of the YAML. Raises as `load_model_from_config`.
    """
    places = [Path(ckpt).parent]
    whole: Any = config
    files = [config] if isinstance(config, (str, Path)) else []
    place = partial(place_in, files)
    if isinstance(config, (str, Path)):
        whole = read_yaml(config)
        check_interpolations(whole, place)
        places.insert(0, Path(config).parent)
    node = copy.deepcopy(whole.get("model", whole))
    if not isinstance(node, Mapping) or "target" not in node:
        name = f"'{config}'" if files else "the config"
        raise ConfigError(f"{name} describes no model: there is no model.target; name the YAML of a model")
    refuse_foreign_target(node["target"], f"'{config}'" if files else "the config")
    check_config(node, "model", place)
    find_paths(node, places)
    path = Path(ckpt)
    base: BaseModel | None
    if path.is_dir() or (not path.exists() and is_hub_id(str(ckpt))):
        base = recognise(ckpt, variant, revision)
        check_family(base, node)
    else:
        base = fitting(ckpt, node)
    if base is not None:
        _adapt(node, base)
        check_config(node, "model", place)
    return node, base


def read_config(ckpt: str, config: str | Path | None = None) -> DictConfig:
    """Return a YAML, by default the one of a model (see `config_of`), with its `model:` node completed for the model.

    Raises UserError if there is no YAML, it is damaged, or it does not fit the model.
    """
    return OmegaConf.create({"model": complete_config(config or config_of(ckpt), ckpt)[0]})


def read_base_model(base: BaseModel | str | Path) -> dict[str, Tensor]:
    """Return the weights of a file, a folder of diffusers or a hub id under the names of LDM's checkpoints."""
    base = base if isinstance(base, BaseModel) else recognise(base)
    return read_state_dict(base.path) if base.folder is None else read_folder(base.folder, base.family)


# -- a YAML and a checkpoint ---------------------------------------------------------------------------------


def _adapt(node: Any, base: BaseModel) -> None:
    """Set in a node what the model's own settings say: all sizes of a folder, the prediction if a file notes it."""
    params = node["params"]
    if base.known_by == "notes" and params.get("parameterization", "eps") != base.prediction:
        logger.info("'%s' predicts %s, whatever the config says", base.source, base.prediction)
        params["parameterization"] = base.prediction
    if base.zero_snr and "linear_start" in params and not params.get("given_betas"):
        logger.info("'%s' leaves no signal at the last step (zero terminal SNR)", base.source)
        params.update(zero_snr_params(params))
    if base.folder is None:
        return
    for key, value in folder_params(base.folder, base.family).items():
        if isinstance(value, Mapping):
            part = params.get(key) or {}
            target = value.get("target", part.get("target"))
            params[key] = {"target": target, "params": {**(part.get("params") or {}), **value["params"]}}
        else:
            params[key] = value


OWN_CONFIG = "use the config that belongs to it"


def _advice(ckpt: str | Path, base: BaseModel | None, node: Mapping[str, Any], incomplete: bool) -> str:
    """What to do about weights that do not fit the model of a node, because some are missing or have other shapes."""
    if base is None:
        kind = what_is(ckpt)
        return f"it is {kind.name}: {kind.remedy}" if kind else OWN_CONFIG
    if incomplete and family_of(node) == base.family:
        return f"it is {base.name}, as the config says, but incomplete or changed; download it again"
    return f"it looks like {base.name} of other sizes: {OWN_CONFIG}"


def _check_parts(state: Mapping[str, Tensor], node: Mapping[str, Any], ckpt: str | Path) -> bool:
    """Whether the weights are complete; False if the text encoder has to be read from its own folder or hub id.

    Raises:
        CheckpointError: another part is missing.
    """
    if not any(key.startswith((UNET, "model_ema.diffusion_model")) for key in state):
        return True  # no diffusion model
    first_stage = str(at(node, ["params", "first_stage_config", "target"]) or "")
    needs_none = not first_stage or first_stage.endswith("IdentityFirstStage")
    if not needs_none and not any(key.startswith(VAE) for key in state):
        raise CheckpointError(
            f"'{ckpt}' has no first stage (VAE); bring one with {setting('vae')}, a file or a folder "
            "in the layout of LDM or diffusers"
        )
    encoder = at(node, ["params", "cond_stage_config", "target"])
    if encoder is None or any(key.startswith(TEXT_ENCODERS) for key in state):
        return True
    if not str(encoder).endswith(("FrozenCLIPEmbedder", "BERTEmbedder")) and str(encoder).startswith("ldm."):
        raise CheckpointError(f"'{ckpt}' has no text encoder; name a file or a folder with the whole model")
    return False


def _first_stage(source: str | Path, node: Any, base: BaseModel | None) -> dict[str, Tensor]:
    """The weights of another first stage for the model of a node, whose sizes become those of the first stage.

    Raises:
        CheckpointError: it is none, or one of another family: its latents have other channels or another scale.
    """
    try:
        state, settings = read_vae(source)
    except CheckpointError as error:
        kind = what_is(source) if Path(source).is_file() else None
        if kind is None or "VAE" in kind.name:
            raise
        raise no_first_stage(source, kind) from error
    family = base.family if base is not None else family_of(node)
    own = family_of_first_stage(Path(source)) if Path(source).is_file() else None
    if own and family and family in _SCALES and _SCALES.get(own) != _SCALES[family]:
        raise CheckpointError(
            f"'{source}' has the first stage of {FAMILIES[own]}, and the model is {FAMILIES[family]}; name one of its "
            "family"
        )
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


# What the latents of a family are multiplied by; another number belongs to another first stage.
_SCALES: dict[str | None, float] = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}


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


def config_of(ckpt: str) -> Path:
    """Return the YAML to generate with a model: config.yaml beside it, else the one of the model that it is.

    Raises CheckpointError if there is no config.yaml and the model is not one that is known.
    """
    path = Path(ckpt)
    beside = path.with_name("config.yaml")
    if beside.is_file() and not path.is_dir():
        return beside
    base = recognise(ckpt)
    if not base.inference_config.is_file():
        raise CheckpointError(
            f"'{ckpt}' is {base.name}, and there is no YAML for it here; name one with {setting('inference_config')}"
        )
    ask_for_prediction(base)
    return base.inference_config
