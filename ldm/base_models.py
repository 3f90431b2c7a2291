"""What a model's file, folder or hub id is, by the names and shapes of its tensors; their numbers are not read."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.diffusers_settings import PREDICTIONS, folder_params, zero_snr_params
from ldm.files import CHECKOUT, NO_TENSORS, file_kind, is_address, is_hub_id, no_address
from ldm.front_ends import setting
from ldm.model_kinds import (
    BY_BYTES,
    BY_SUFFIX,
    EMBEDDING_KIND,
    ENCODERS,
    FAMILIES,
    OTHER_MODEL,
    PIPELINES,
    UNET,
    UNKNOWN,
    VAE,
    Denoiser,
    Family,
    Found,
    Kind,
    Known,
    Names,
    Prediction,
    kind_of,
    kind_of_folder,
    of_header,
)
from ldm.util import (
    ConfigError,
    Find,
    UserError,
    absent_packages,
    config_problems,
    get_obj_from_str,
    raise_problems,
    refuse_foreign_target,
    shown,
    stand_in,
)
from ldm.values import at
from ldm.weights import CheckpointError, Folder, Header, check_variant, located, read_header
from ldm.yaml_files import check_interpolations, find_paths, place_in, read_yaml

logger = logging.getLogger(__name__)

CONFIGS = CHECKOUT / "configs"
# (family, whether it predicts v) -> the YAMLs that train a word on it and that generate with it.
_YAMLS: dict[tuple[Family, bool], tuple[str, str]] = {
    ("sd1", False): ("stable-diffusion/v1-finetune.yaml", "stable-diffusion/v1-inference.yaml"),
    ("sd2", False): ("stable-diffusion/v2-finetune.yaml", "stable-diffusion/v2-inference.yaml"),
    ("sd2", True): ("stable-diffusion/v2-finetune_v.yaml", "stable-diffusion/v2-inference-v.yaml"),
    ("sdxl", False): ("stable-diffusion/xl-finetune.yaml", "stable-diffusion/xl-inference.yaml"),
    ("ldm", False): (
        "latent-diffusion/txt2img-1p4B-finetune.yaml",
        "latent-diffusion/txt2img-1p4B-eval_with_tokens.yaml",
    ),
    ("embedded", False): ("latent-diffusion/txt2img-finetune.yaml", "../models/ldm/creatures/config.yaml"),
    ("embedded", True): ("latent-diffusion/txt2img-finetune.yaml", "../models/ldm/creatures/config.yaml"),
}


# Of the vectors for the text encoders of a family; side by side they are as wide as the denoiser's condition.
_WIDTHS: dict[Family | None, tuple[int, ...]] = {
    "sd1": (768,),
    "sd2": (1024,),
    "sdxl": (768, 1280),
    "ldm": (1280,),
    "embedded": (128,),
}


@dataclass(frozen=True)
class BaseModel:
    """A base model that can be read.

    Attributes:
        source: what the user named: a file, a folder or a hub id.
        path: the file, or the folder, which a hub id was fetched to.
        family: key of `FAMILIES`.
        prediction: what its denoiser predicts.
        known_by: how `prediction` is known: by notes in the files, by the family, or not at all: it is a guess.
        folder: the reader of a folder in the layout of diffusers; None for a file in that of LDM.
        zero_snr: whether a file notes that its noise schedule leaves no signal at the last step.
    """

    source: str
    path: Path
    family: Family
    prediction: Prediction
    known_by: Known = "family"
    folder: Folder | None = None
    zero_snr: bool = False

    @property
    def name(self) -> str:
        """The family for messages, such as "Stable Diffusion 2 (v)"."""
        return FAMILIES[self.family] + (" (v)" if self.prediction == "v" else "")

    @property
    def finetune_config(self) -> Path:
        """The YAML that learns a word on this model."""
        return CONFIGS / self._yamls[0]

    @property
    def inference_config(self) -> Path:
        """The YAML that generates with this model."""
        return CONFIGS / self._yamls[1]

    @property
    def _yamls(self) -> tuple[str, str]:
        return _YAMLS.get((self.family, self.prediction == "v")) or _YAMLS[self.family, False]


def training_yaml(
    model: str | Path, variant: str | None = None, revision: str | None = None, ask: bool = True
) -> Path:
    """The YAML that learns words on a model: a file, a folder of diffusers or a hub id.

    If `ask`, a line asks for what its weights do not tell.

    Raises:
        UserError: the model is missing, none that can be read, or its YAML is not installed.
    """
    base = recognise(model, variant, revision)
    if not base.finetune_config.is_file():
        raise ConfigError(
            f"'{model}' is {base.name}, and its YAML '{base.finetune_config}' is not here; install a checkout with pip "
            f"install -e, or name a YAML with {setting('base')}"
        )
    if ask:
        ask_for_prediction(base)
    return base.finetune_config


def recognise(source: str | Path, variant: str | None = None, revision: str | None = None) -> BaseModel:
    """Find out what a file, a diffusers folder or a hub id is. A hub id is fetched once, only the files needed.

    Args:
        source: what the user named.
        variant: of a folder or hub id, the weights of this name, such as fp16 (default: those without a name).
        revision: of a hub id.

    Raises:
        CheckpointError: it is missing or no base model that can be read; the message says what it is and what to do.
    """
    path = located(source, variant, revision)
    if path.is_dir():
        try:
            return _of_folder(str(source), Folder(path, variant))
        except CheckpointError:
            raise
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"'{source}': its settings are damaged ({error}); download it again"
            ) from error
    header = checked_header(path)
    found = of_header(header, path.name)
    if isinstance(found, Kind):
        raise CheckpointError(f"'{source}' is {found.name}; {found.remedy}")
    return _of_file(source, header, found)


def fitting(source: str | Path, node: Mapping[str, Any]) -> BaseModel | None:
    """Return what a file is that a `model:` node is to be loaded with; None if the node alone describes it.

    Raises:
        CheckpointError: it is missing, no model of this kind, or one of another family.
    """
    base = recognise_for(source, family_of(node), _channels(node))
    if base is not None:
        check_family(base, node)
    return base


def _channels(node: Any) -> int | None:
    return at(node, ["params", "unet_config", "params", "in_channels"])


def family_of(node: Mapping[str, Any]) -> Family | None:
    """The family of the model that a `model:` node describes; None if it is none of them, or of other sizes."""
    encoder = str(at(node, ["params", "cond_stage_config", "target"]) or "").rpartition(".")[2]
    width = at(node, ["params", "unet_config", "params", "context_dim"])
    classes: dict[str, tuple[Family, ...]] = {
        "FrozenCLIPEmbedder": ("sd1", "embedded"),
        "FrozenOpenCLIPEmbedder": ("sd2",),
        "BERTEmbedder": ("ldm",),
    }
    families = classes.get(encoder, ())
    if at(node, ["params", "unet_config", "params", "num_classes"]) == "sequential":
        families = ("sdxl", *families)
    found = next((family for family in families if sum(_WIDTHS[family]) == width), None)
    return None if found == "embedded" and _channels(node) not in (12, 24) else found


def check_family(base: BaseModel, node: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a `model:` node describes another family than that of a model."""
    described = family_of(node)
    if described is not None and described != base.family:
        yamls = (base.inference_config, base.finetune_config)
        generate, train = (Path(os.path.normpath(path)).relative_to(CHECKOUT).as_posix() for path in yamls)
        raise CheckpointError(
            f"'{base.source}' is {base.name}, and the config describes {FAMILIES[described]}; leave the config out, "
            f"or name {generate} to generate, {train} to train"
        )


def recognise_for(source: str | Path, wanted: Family | None, channels: int | None) -> BaseModel | None:
    """Recognise a file that is to be loaded with a config; None for one that the config alone describes.

    Args:
        wanted: the family of the config; None if it describes a model of another kind or of other sizes.
        channels: of the input of the config's denoiser.

    Raises:
        CheckpointError: as `recognise`, unless the config may describe the file.
    """
    path = Path(source)
    header = checked_header(path)
    found = of_header(header, path.name)
    if not isinstance(found, Kind):
        return _of_file(source, header, found)
    denoiser = Denoiser.of(Names(header.shapes))
    if denoiser is None and found is UNKNOWN and wanted is not None:
        held = shown(next(iter(header.shapes), "nothing"))
        raise CheckpointError(
            f"'{source}' is {found.name}: it holds '{held}', and no denoiser (UNet); name another file"
        )
    ones_own = wanted is None and found != EMBEDDING_KIND
    if ones_own or found is UNKNOWN or (denoiser is not None and denoiser.channels == channels != 4):
        return None
    raise CheckpointError(f"'{source}' is {found.name}; {found.remedy}")


def _of_file(source: str | Path, header: Header, found: Found) -> BaseModel:
    zero_snr = found[1] == "v" and "ztsnr" in header.shapes
    return BaseModel(str(source), Path(source), *found, zero_snr=zero_snr)


def what_is(source: str | Path) -> Kind | None:
    """Say what a file is that does not fit a config, and what to do; None if it is unknown or cannot be read."""
    try:
        return kind_of(checked_header(Path(source)), Path(source).name)
    except CheckpointError:
        return None


def family_of_first_stage(path: Path) -> Family | None:
    """The family whose first stage a file holds, by the model around it, its notes or its name; None if unknown."""
    header = checked_header(path)
    found = of_header(header, path.name)
    if not isinstance(found, Kind):
        return found[0]
    noted = header.notes.get("modelspec.architecture", "") + path.name
    return "sdxl" if re.search(r"sd_?xl|stable-diffusion-xl|xl_?vae", noted, re.IGNORECASE) else None


def no_first_stage(source: str | Path, kind: Kind) -> CheckpointError:
    """The error for a file of a kind that holds no first stage."""
    lacks = "without a" if kind.name in FAMILIES.values() else "and no"
    return CheckpointError(
        f"'{source}' is {kind.name} {lacks} first stage (VAE); name the file or folder of one"
    )


# What the latents of a family are multiplied by; another number belongs to another first stage.
_SCALES: dict[Family | None, float] = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}


def check_first_stage(source: str | Path, family: Family | None = None) -> None:
    """Raise CheckpointError for a file that cannot be read, is neither a model nor a first stage, or has that of
    another family than this one."""
    header = checked_header(Path(source))
    kind = kind_of(header, Path(source).name)
    holds = any(name.startswith((VAE, "vae.")) or name == "decoder.conv_in.weight" for name in header.shapes)
    if kind is not None and "VAE" not in kind.name and not holds:
        raise no_first_stage(source, kind)
    own = family_of_first_stage(Path(source))
    if own and family and family in _SCALES and _SCALES.get(own) != _SCALES[family]:
        raise CheckpointError(
            f"'{source}' has the first stage of {FAMILIES[own]}, and the model is {FAMILIES[family]}; name one of its "
            "family"
        )


def what_begins(path: Path) -> str | None:
    """Say what a file is by its first bytes, such as "a 7z archive"; None for weights and what is not known."""
    with path.open("rb") as file:
        head = file.read(16)
    return next((what for start, what, _ in BY_BYTES if head.startswith(start)), None)


def ask_for_prediction(model: BaseModel) -> None:
    """Log the one line that asks for what weights cannot tell: whether Stable Diffusion 2's denoiser predicts v."""
    if model.known_by == "guess":
        other = _YAMLS[model.family, model.prediction != "v"]
        logger.warning(
            "'%s': its weights do not tell whether this %s predicts v (768) or noise (512 base); %s is assumed. If "
            "that is wrong, name configs/%s to train, configs/%s to generate",
            model.source,
            FAMILIES[model.family],
            model.prediction,
            *other,
        )


# -- the YAML of a model -------------------------------------------------------------------------------------


def config_of(ckpt: str | Path) -> Path:
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


def complete_config(
    config: Mapping[str, Any] | str | Path,
    ckpt: str | Path,
    variant: str | None = None,
    revision: str | None = None,
    find: Find = get_obj_from_str,
) -> tuple[Any, BaseModel | None]:
    """Return the `model:` node of a YAML as it is for a checkpoint, and what that is if it is known.

    Paths are found (see `ldm.yaml_files.find_paths`); the settings of a folder of diffusers, and what a file notes of
    itself, replace those of the YAML. With `stand_in` for `find`, nothing heavy is imported, and what the sources of
    classes do not say is not checked. Raises as `ldm.checkpoint.load_model_from_config`.
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
    raise_problems(list(config_problems(node, "model", find)), place)
    find_paths(node, places)
    path = Path(ckpt)
    base: BaseModel | None
    if path.is_dir() or (not path.exists() and is_hub_id(str(ckpt))):
        base = recognise(ckpt, variant, revision)
    else:
        base = fitting(ckpt, node)
    before = copy.deepcopy(node)
    if base is not None:
        _adapt(node, base)
    if node != before:
        if (
            base is not None and base.folder is not None
        ):  # a node that has its sizes already may be of any family
            check_family(base, before)
        raise_problems(list(config_problems(node, "model", find)), place)
    if find is stand_in:
        raise_problems(list(absent_packages({"model": node})), place)
    return node, base


def read_config(ckpt: str, config: str | Path | None = None) -> DictConfig:
    """Return a YAML, by default the one of a model (see `config_of`), with its `model:` node completed for the model.

    It is checked without importing its classes; loading the model does that. Raises UserError if there is no YAML, or
    it is damaged, or does not fit the model.
    """
    return OmegaConf.create({"model": complete_config(config or config_of(ckpt), ckpt, find=stand_in)[0]})


def check_classes(config: Mapping[str, Any], path: str | Path) -> None:
    """Check the config of `read_config`, whose YAML is at `path`, against its classes, which are imported.

    Raises:
        ConfigError: as `complete_config`.
    """
    raise_problems(list(config_problems(config["model"], "model")), partial(place_in, [path]))


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


def check_parts(state: Collection[str], node: Mapping[str, Any], ckpt: str | Path) -> bool:
    """Whether weights with these names are complete; False if the text encoder has to be read from elsewhere.

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
    if encoder is None or any(key.startswith(ENCODERS) for key in state):
        return True
    if not str(encoder).endswith(("FrozenCLIPEmbedder", "BERTEmbedder")) and str(encoder).startswith("ldm."):
        raise CheckpointError(f"'{ckpt}' has no text encoder; name a file or a folder with the whole model")
    return False


def check_steps(steps: int, train_steps: int | None = None) -> None:
    """Raise UserError unless 1 <= `steps` <= `train_steps`, if the latter is known."""
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"the number of sampling steps is {steps!r}; it must be at least 1")
    if train_steps is not None and steps > train_steps:
        raise UserError(
            f"{steps} sampling steps are more than the model's {train_steps} timesteps; use fewer"
        )


def size_multiple(config: Mapping[str, Any]) -> int | None:
    """What the sides of images are multiples of, in pixels, by the YAML of a model; None if it does not say so."""
    params = config["model"].get("params") or {}
    first, denoiser = (
        (params.get(name) or {}).get("params") or {} for name in ("first_stage_config", "unet_config")
    )
    levels = (first.get("ddconfig") or {}).get("ch_mult"), denoiser.get("channel_mult")
    return 2 ** sum(len(level or ()) - 1 for level in levels) if all(levels) else None


def check_weights(node: Mapping[str, Any], ckpt: str | Path, vae: str | None = None) -> None:
    """Check by their names that a file has the weights that the model of a completed node needs.

    Args:
        vae: what the first stage comes from, if not from the file.
    Raises:
        CheckpointError: a part is missing, or the first stage is none, or is of another family.
    """
    names = checked_header(Path(ckpt)).shapes if Path(ckpt).is_file() else {}
    if not vae and names and not any(name.startswith(VAE) for name in names):
        vae = at(node, ["params", "first_stage_config", "params", "ckpt_path"])
    if vae and not Path(vae).is_dir() and not (is_hub_id(str(vae)) and not Path(vae).exists()):
        check_first_stage(vae, family_of(node))
    if names:
        check_parts({*names, *([VAE] if vae else [])}, node, ckpt)


def check_size_conditions(sizes: Mapping[str, Sequence[int]], has_them: bool) -> None:
    """Raise UserError for size conditions out of range, or for a model without them (`has_them`).

    `sizes` are pairs by the names in `ldm.models.diffusion.sdxl.OPTIONS`.
    """
    for name, pair in sizes.items():
        least = 0 if name == "crop" else 1
        if not has_them:
            raise UserError(
                f"--{name} is for Stable Diffusion XL, and this model has no size conditions; leave it out"
            )
        if len(pair) != 2 or min(pair) < least:
            raise UserError(
                f"--{name} is {' '.join(map(str, pair)) or 'empty'}; use two numbers from {least}"
            )


# -- files ---------------------------------------------------------------------------------------------------


def checked_header(path: Path) -> Header:
    """Return what a file of weights holds.

    Raises:
        CheckpointError: it is missing, truncated, or no file of weights; the message says what it is.
    """
    if is_address(path):
        raise CheckpointError(no_address(path))
    kind = file_kind(path)
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(16)
        known = next((what for start, *what in BY_BYTES if head.startswith(start)), None)
        if known is None and kind not in ("safetensors", "zip", "pickle", "web page", "Git LFS pointer"):
            known = list(BY_SUFFIX.get(path.suffix.lower(), ())) or None
        if known is not None:
            raise CheckpointError(f"'{path}' is {known[0]}; {known[1]}")
    if kind == "image":
        raise CheckpointError(f"'{path}' is an image; name the file with the weights of the model")
    if kind in NO_TENSORS:
        raise CheckpointError(f"checkpoint '{path}' {NO_TENSORS[kind]}")
    if kind == "unknown":
        raise CheckpointError(
            f"'{path}' is no file of weights: it is neither safetensors nor PyTorch, or its beginning is damaged; "
            "download it again or name another file"
        )
    return read_header(path)


# -- folders -------------------------------------------------------------------------------------------------


def _of_folder(source: str, folder: Folder) -> BaseModel:
    """What a folder is; CheckpointError unless it is a model in the layout of diffusers that can be read."""
    index = folder.index()
    unet = folder.config("unet")
    pipeline = str(index.get("_class_name", ""))
    other = next((name for start, name in PIPELINES.items() if pipeline.startswith(start)), None)
    if other is None and "transformer" in index and "unet" not in index:
        other = f"a model of {pipeline}, whose denoiser is a transformer"
    if other is not None:
        raise CheckpointError(f"'{source}' is {other}; {OTHER_MODEL}")
    check_variant(source, folder.names, folder.variant)
    if not folder.weights("unet"):
        kind = kind_of_folder(folder)
        raise CheckpointError(f"'{source}' {kind[0]}; {kind[1]}")
    if not unet:
        raise CheckpointError(f"'{source}' has no unet/config.json; download it completely")
    sizes = unet.get("cross_attention_dim")
    added = unet.get("projection_class_embeddings_input_dim") if unet.get("addition_embed_type") else None
    if not added and unet.get("class_embed_type"):
        added = unet.get("projection_class_embeddings_input_dim") or -1
    context: Any = sizes[0] if isinstance(sizes, list) and sizes else sizes
    family: Family = (
        "sdxl"
        if unet.get("addition_embed_type") == "text_time"
        else "sd2"
        if context == 1024 or unet.get("use_linear_projection")
        else "sd1"
    )
    special = Denoiser(int(unet.get("in_channels", 4)), context, added, alone=False).special(family)
    if special is not None:
        raise CheckpointError(f"'{source}' is {special.name}; {special.remedy}")
    scheduler = folder.config("scheduler")
    if not scheduler:
        guess = family == "sd2"
        return BaseModel(
            source, folder.path, family, "v" if guess else "eps", "guess" if guess else "family", folder
        )
    noted = scheduler.get("prediction_type", "epsilon")
    if noted not in PREDICTIONS:
        raise CheckpointError(
            f"'{source}': the scheduler's prediction_type is '{noted}'; known are {', '.join(PREDICTIONS)}"
        )
    return BaseModel(source, folder.path, family, PREDICTIONS[noted], "notes", folder)
