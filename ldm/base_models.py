"""What a model's file, folder or hub id is, by the names and shapes of its tensors; their numbers are not read."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ldm.diffusers_settings import PREDICTIONS, Prediction
from ldm.files import CHECKOUT, NO_TENSORS, file_kind, is_address, no_address
from ldm.front_ends import setting
from ldm.model_kinds import (
    ADAPTER,
    BY_BYTES,
    BY_SUFFIX,
    EMBEDDING,
    EMBEDDING_KIND,
    FAMILIES,
    KINDS,
    NAME_AS_MODEL,
    OTHER_MODEL,
    PART,
    PARTS,
    PIPELINES,
    UNKNOWN,
    Family,
    Kind,
    kind_of_folder,
)
from ldm.util import ConfigError, UserError, shown
from ldm.values import at
from ldm.weights import CheckpointError, Folder, Header, Shapes, check_variant, located, read_header

logger = logging.getLogger(__name__)

Known = Literal["notes", "family", "guess"]
# What a file is: its family, what its denoiser predicts, and how that is known.
Found = tuple[Family, Prediction, Known]

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
    found = _of_header(header, path.name)
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
    found = _of_header(header, path.name)
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
        return _kind_of(checked_header(Path(source)), Path(source).name)
    except CheckpointError:
        return None


def family_of_first_stage(path: Path) -> Family | None:
    """The family whose first stage a file holds, by the model around it, its notes or its name; None if unknown."""
    header = checked_header(path)
    found = _of_header(header, path.name)
    if not isinstance(found, Kind):
        return found[0]
    noted = header.notes.get("modelspec.architecture", "") + path.name
    return "sdxl" if re.search(r"sd_?xl|stable-diffusion-xl|xl_?vae", noted, re.IGNORECASE) else None


def what_holds(shapes: Shapes) -> str | None:
    """Say what a file with these tensors is, such as "a LoRA" or "Stable Diffusion 2"; None if it is unknown."""
    kind = _kind_of(Header(shapes, {}), "")
    return kind and kind.name


def no_first_stage(source: str | Path, kind: Kind) -> CheckpointError:
    """The error for a file of a kind that holds no first stage."""
    lacks = "without a" if kind.name in FAMILIES.values() else "and no"
    return CheckpointError(
        f"'{source}' is {kind.name} {lacks} first stage (VAE); name the file or folder of one"
    )


def check_first_stage(source: str | Path) -> None:
    """Raise CheckpointError for a file that cannot be read, or is neither a model nor a first stage."""
    kind = _kind_of(checked_header(Path(source)), Path(source).name)
    if kind is not None and "VAE" not in kind.name and kind.name not in FAMILIES.values():
        raise no_first_stage(source, kind)


# Of the tensors, enough to know what a file is.
_MOST_NAMES = 2**14


def no_embedding(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why a file with these tensors is no embedding, and what to do; None for one that may be."""
    what = what_holds(dict(itertools.islice(shapes.items(), _MOST_NAMES)))
    remedy = "it is used in other tools; name a file of textual inversion here"
    if any(name.startswith("embedding_manager.") for name in shapes):
        what, remedy = (
            "the state of a training run",
            "name the embedding that the run saved beside it, such as embeddings.pt",
        )
    elif what in (None, EMBEDDING):
        return None
    elif what in FAMILIES.values():
        remedy = NAME_AS_MODEL
    elif "VAE" in what:
        remedy = f"name it with {setting('vae')}, and an embedding here"
    return f"it is {what}, not an embedding; {remedy}"


def check_vectors(path: str | Path, node: Mapping[str, Any]) -> None:
    """Check that a file of vectors may belong to the model of a `model:` node, by its names and shapes alone.

    Raises:
        UserError: it is a model or a state, or its vectors have another width than those of the text encoder.
    """
    if file_kind(path) == "image":
        return
    with contextlib.suppress(CheckpointError):  # which the reader of embeddings says better
        header = read_header(path)
        shapes, kind = header.shapes, _kind_of(header, "")
        adapter = kind is not None and kind.remedy == ADAPTER  # which may bring vectors with it
        if not adapter and (why := no_embedding(shapes)):
            raise UserError(f"'{path}': {why}")
        widths, wanted = {shape[-1] for shape in shapes.values() if shape}, _WIDTHS.get(family_of(node))
        if wanted and kind == EMBEDDING_KIND and widths.isdisjoint(wanted):
            have, need = (" and ".join(map(str, sorted(one))) for one in (widths, wanted))
            raise UserError(
                f"'{path}': its vectors have width {have}, and the text encoder of this model has {need}; use the "
                "model that they were trained on"
            )


def _kind_of(header: Header, name: str) -> Kind | None:
    found = _of_header(header, name)
    if isinstance(found, Kind):
        return None if found is UNKNOWN else found
    return Kind(FAMILIES[found[0]], "use the config that belongs to it")


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


class Names:
    """The names and shapes in a file, to look for."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self._all = "\n".join(shapes)

    def match(self, *patterns: str) -> bool:
        """Whether each of these regular expressions is found; ^ and $ are the ends of a name."""
        return all(re.search(pattern, self._all, re.MULTILINE) for pattern in patterns)

    def size(self, axis: int, *ends: str) -> int | None:
        """The size along an axis of the first tensor whose name ends with one of these texts."""
        for name, shape in self.shapes.items():
            if name.endswith(ends) and len(shape) > axis:
                return shape[axis]
        return None


def _is_vectors(shape: tuple[int, ...]) -> bool:
    """Whether a shape is that of an embedding's vectors: [d] or [N, d] of the width of one of the text encoders."""
    return (
        1 <= len(shape) <= 2 and shape[-1] in (128, 768, 1024, 1280) and (len(shape) == 1 or shape[0] <= 75)
    )


def _of_header(header: Header, name: str) -> Found | Kind:
    """What a file is: a base model, or another kind."""
    names = Names(header.shapes)
    if 0 < len(names.shapes) <= 64 and all(_is_vectors(shape) for shape in names.shapes.values()):
        return EMBEDDING_KIND
    denoiser = Denoiser.of(names)
    for kind, remedy, *patterns in KINDS if denoiser else (*KINDS, *PARTS):
        if names.match(*patterns):
            return Kind(kind, remedy)
    if denoiser is None:
        return UNKNOWN
    special = denoiser.special()
    if special is not None:
        return special
    family = (
        denoiser.family if denoiser.family == "embedded" else _family_by_encoder(names) or denoiser.family
    )
    if family is None:
        return UNKNOWN
    if names.match(r"output_blocks\.") and not names.match(r"middle_block\.1\.transformer_blocks\."):
        return Kind(
            f"a distilled {FAMILIES[family]} with fewer layers (as SSD-1B, Vega or tiny-sd)",
            "name the model it was distilled from",
        )
    if denoiser.alone:
        return Kind(f"the denoiser (UNet) of {FAMILIES[family]} alone", PART)
    return family, *_prediction(family, header, name)


# The layers that a further condition enters by, in the three namings, and by the class that unCLIP uses.
_ADDED = (
    "label_emb.0.0.weight",
    "label_emb00weight",
    "add_embedding.linear_1.weight",
    "class_embedding.linear_1.weight",
)


class Denoiser(NamedTuple):
    """What the names and shapes of a UNet tell.

    Attributes:
        channels: of its input.
        context: width of the text's states.
        added: width of the further condition (sizes and pooled text in Stable Diffusion XL).
        alone: whether it is not under the name that it has in a checkpoint of a whole model.
    """

    channels: int
    context: int | None
    added: int | None
    alone: bool

    @classmethod
    def of(cls, names: Names) -> Denoiser | None:
        """The denoiser in a file, in LDM's naming, as averages, or in that of diffusers; None if there is none."""
        firsts = {
            "model.diffusion_model.input_blocks.0.0.weight": False,
            "model_ema.diffusion_modelinput_blocks00weight": False,
            "input_blocks.0.0.weight": True,
            "conv_in.weight": True,
        }
        first = next((name for name in firsts if len(names.shapes.get(name, ())) == 4), None)
        if first is None or (first == "conv_in.weight" and not names.match(r"^time_embedding\.")):
            return None
        context = names.size(1, "attn2.to_k.weight", "attn2to_kweight")
        added = names.size(1, *_ADDED)
        return cls(names.shapes[first][1], context, added, firsts[first])

    @property
    def family(self) -> Family | None:
        """The family by the widths of its conditions."""
        if self.context == 128 and self.channels in (12, 24):
            return "embedded"
        widths: dict[tuple[int | None, int | None], Family] = {
            (768, None): "sd1",
            (1024, None): "sd2",
            (2048, 2816): "sdxl",
            (1280, None): "ldm",
        }
        return widths.get((self.context, self.added))

    def special(self, family: Family | None = None) -> Kind | None:
        """What it is if it needs more than a text, or other texts; `family` is known of a folder."""
        if (self.context, self.added) == (1280, 2560):
            return Kind("the refiner of Stable Diffusion XL", "name the base model of Stable Diffusion XL")
        versions: dict[int | Family | None, str] = {768: "1", 1024: "2", 2048: "XL"}
        versions |= {"sd1": "1", "sd2": "2", "sdxl": "XL"}
        version = versions.get(self.context) or versions.get(family)
        if version is None:
            return None
        uses = {
            5: f"the depth model of Stable Diffusion {version} (5 input channels)",
            7: f"the upscaler of Stable Diffusion {version} (7 input channels)",
            8: f"an image-editing model (InstructPix2Pix) of Stable Diffusion {version} (8 input channels)",
            9: f"an inpainting model of Stable Diffusion {version} (9 input channels)",
        }
        if self.channels in uses:
            return Kind(
                uses[self.channels], "it needs more than a text; name the text-to-image model of its kind"
            )
        if version == "2" and self.added is not None:
            return Kind(
                "Stable unCLIP, which needs an image", "name a text-to-image model of Stable Diffusion 2"
            )
        return None


def _family_by_encoder(names: Names) -> Family | None:
    prefixes: dict[str, Family] = {
        r"^conditioner\.embedders\.": "sdxl",
        r"^cond_stage_model\.model\.": "sd2",
        r"^cond_stage_model\.transformer\.token_emb\.": "ldm",
        r"^cond_stage_model\.transformer\.": "sd1",
    }
    return next((family for prefix, family in prefixes.items() if names.match(prefix)), None)


def _prediction(family: Family, header: Header, name: str) -> tuple[Prediction, Known]:
    """What the denoiser predicts, and how that is known: by the notes in a file, its family, or not."""
    noted = header.notes.get("modelspec.prediction_type", "").lower()
    if noted.startswith("v") or "v_pred" in header.shapes:
        return "v", "notes"
    if noted.startswith("eps"):
        return "eps", "notes"
    if family != "sd2":
        return "v" if family == "embedded" else "eps", "family"
    # The published files note their training steps: these are of 2.0's base model and of 2.1's 768 model.
    steps: dict[str, Prediction] = {"875000": "eps", "110000": "v"}
    published: dict[str, Prediction] = {
        "512-base": "eps",
        "v2-1_512": "eps",
        "768-v": "v",
        "v2-1_768": "v",
        "sd_turbo": "eps",
    }
    known = steps.get(header.notes.get("global_step", ""))
    known = known or next((value for part, value in published.items() if part in name), None)
    return (known, "notes") if known else ("v", "guess")


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
