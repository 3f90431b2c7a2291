"""What files and folders are, by the names and shapes of their tensors: a family of base models, or another kind.

The other kinds hold no base model that is read here; each has a line on what to do about it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from ldm.front_ends import setting
from ldm.weights import Folder, Header, Shapes

# How the names of a checkpoint's weights begin.
UNET, VAE = "model.diffusion_model.", "first_stage_model."
ENCODERS = ("cond_stage_model.", "conditioner.")

Family = Literal["sd1", "sd2", "sdxl", "ldm", "embedded"]
FAMILIES: dict[Family, str] = {
    "sd1": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL",
    "ldm": "LDM text2img-large",
    "embedded": "the embedded model",
}


# What a denoiser predicts: the noise, the velocity v of Salimans and Ho 2022 (arXiv 2202.00512), or the image.
Prediction = Literal["eps", "v", "x0"]
Known = Literal["notes", "family", "guess"]
# What a file is: its family, what its denoiser predicts, and how that is known.
Found = tuple[Family, Prediction, Known]


class Kind(NamedTuple):
    """What a file is that is no base model to be read, and what to do."""

    name: str
    remedy: str


READ = "read are Stable Diffusion 1, 2 and XL and LDM text2img-large"

# Files of other tools by their first bytes, then by their suffix -> what they are and what to do.
BY_BYTES: tuple[tuple[bytes, str, str], ...] = (
    (b"GGUF", "a GGUF file, quantised weights for other programs", "name the .safetensors it was made from"),
    (b"\x89HDF", "a Keras file", "name the .safetensors or .ckpt of the model"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it and name the file in it"),
    (b"Rar!", "a RAR archive", "unpack it and name the file in it"),
    (b"\x1f\x8b", "a gzip archive", "unpack it and name the file in it"),
)
BY_SUFFIX: dict[str, tuple[str, str]] = {
    ".gguf": BY_BYTES[0][1:],
    ".onnx": ("an ONNX model", "name the PyTorch model that it was made from"),
    ".xml": ("the network of an OpenVINO model", "name the PyTorch model that it was made from"),
    ".engine": ("a TensorRT engine", "name the PyTorch model that it was made from"),
    ".plan": ("a TensorRT engine", "name the PyTorch model that it was made from"),
    ".trt": ("a TensorRT engine", "name the PyTorch model that it was made from"),
    ".mlmodel": ("a Core ML model", "name the PyTorch model that it was made from"),
    ".msgpack": ("Flax weights", "name the .safetensors or .bin of the model"),
    ".h5": BY_BYTES[1][1:],
    ".tflite": ("a TensorFlow Lite model", "name the PyTorch model that it was made from"),
    ".yaml": ("a YAML", f"name the file with the weights here, and the YAML with {setting('config')}"),
    ".yml": ("a YAML", f"name the file with the weights here, and the YAML with {setting('config')}"),
    ".crdownload": ("an unfinished download", "wait until it is complete"),
    ".part": ("an unfinished download", "wait until it is complete"),
    ".aria2": ("an unfinished download", "wait until it is complete"),
    ".incomplete": ("an unfinished download", "wait until it is complete"),
}


UNKNOWN = Kind(
    "no model that is known here", f"{READ}; for a model of your own, name its YAML with {setting('config')}"
)
OTHER_MODEL = f"it cannot be used here: {READ}"
ADAPTER = "it changes a base model and is none itself: name the base model it was made for"
PART = "name the whole model, a .safetensors or .ckpt or the folder above it"
EMBEDDING = "a textual inversion embedding"
EMBEDDING_KIND = Kind(
    EMBEDDING,
    f"name the base model here, and the embedding with {setting('embedding')}",
)
# Parts of a folder of diffusers by the beginnings of their classes' names.
FOLDER_PARTS: dict[str, str] = {
    "UNet2DConditionModel": "the unet of a diffusers model",
    "AutoencoderKL": "the VAE of a diffusers model",
    "CLIPText": "the text encoder of a diffusers model",
    "T5": "a T5 text encoder",
    "ControlNet": "a ControlNet",
    "T2IAdapter": "a T2I adapter",
    "MotionAdapter": "a motion module of AnimateDiff",
}
NAME_AS_MODEL = f"name it as the model ({setting('model')}), and an embedding here"
# The end of the error for a method that shapes the states of one text encoder.
ONLY_VECTORS = (
    "learns more than vectors, which is not possible for Stable Diffusion XL yet; use "
    "ldm.modules.embedding_manager.EmbeddingManager"
)
_DISTILLED = "name the model it was distilled from"
_NO_DENOISER = r"\A(?![\s\S]*diffusion_model)"

# What a file is, what to do, and expressions that must all be found in its names; the first row that fits counts.
KINDS: tuple[tuple[str, ...], ...] = (
    (*EMBEDDING_KIND, r"^string_to_(param|token)|^emb_params|^clip_[lg]$"),
    (
        "the state of a training run, with the learned vectors only",
        "name the base model it was trained on",
        r"^embedding_manager\.",
        _NO_DENOISER,
    ),
    # What is added to a base model.
    ("a ControlNet LoRA", ADAPTER, r"lora_controlnet"),
    (
        "a LoRA",
        ADAPTER,
        r"[._]lora[._](up|down|A|B)\b|lora_(up|down)\.|^lora_(unet|te\d?)_|lora_linear_layer",
    ),
    ("a LyCORIS file (LoHa, LoKr)", ADAPTER, r"hada_w1|lokr_w1|oft_blocks|oft_diag"),
    ("a ControlNet", ADAPTER, r"^control_model\.|^zero_convs\.|input_hint_block\.|^controlnet_"),
    ("an IP-Adapter", ADAPTER, r"^(image_proj|ip_adapter)\."),
    ("an InstantID or PhotoMaker file", ADAPTER, r"^(id_encoder|image_proj_model)\."),
    ("a T2I adapter", ADAPTER, r"^(adapter\.)?body\.0\.(block1|resnets|in_conv)"),
    ("a motion module of AnimateDiff", ADAPTER, r"motion_modules\.|temporal_transformer\."),
    ("a hypernetwork", ADAPTER, r"^(320|640|768|1024|1280)\.\d+\..*linear"),
    (
        "a model with quantised weights (NF4, int8 or scaled fp8)",
        "name the file in half precision that it was made from",
        r"\.(absmax|quant_map|SCB|scale_weight|weight_scale)$|^scaled_fp8$",
    ),
    # Models of Stable Diffusion's architecture that compute something else.
    (
        "a latent consistency model (LCM), which is conditioned on the guidance scale",
        _DISTILLED,
        r"\.cond_proj\.",
    ),
    ("Playground 2.5, whose noise and latents are scaled otherwise (EDM)", OTHER_MODEL, r"^edm_(mean|std)$"),
    (
        "CosXL or a model like it, whose noise is scaled otherwise (EDM)",
        OTHER_MODEL,
        r"^edm_vpred\.sigma_max$",
    ),
    ("GLIGEN, which needs boxes", OTHER_MODEL, r"transformer_blocks\.\d+\.fuser\."),
    ("Zero123, which needs an image", OTHER_MODEL, r"^cc_projection\."),
    # Other models that generate images or videos.
    ("Hunyuan Video", OTHER_MODEL, r"individual_token_refiner"),
    ("AuraFlow", OTHER_MODEL, r"double_layers\.|cond_seq_linear|joint_transformer_blocks\.|register_tokens"),
    ("Flux", OTHER_MODEL, r"double_blocks\.|single_transformer_blocks\."),
    (
        "Würstchen or Stable Cascade",
        OTHER_MODEL,
        r"clip_txt(_pooled)?_mapper|effnet_mapper|\.depthwise\.weight",
    ),
    ("Hunyuan-DiT", OTHER_MODEL, r"mlp_t5\.|text_embedding_padding"),
    ("Sana", OTHER_MODEL, r"conv_inverted|glumb_conv|attention_y_norm"),
    ("PixArt", OTHER_MODEL, r"t_block\.|adaln_single\.", r"y_embedder\.|caption_projection\."),
    ("Stable Diffusion 3", OTHER_MODEL, r"joint_blocks\."),
    ("Stable Diffusion 3", OTHER_MODEL, r"pos_embed\.proj\.", r"time_text_embed\."),
    ("Lumina", OTHER_MODEL, r"cap_embedder\.|time_caption_embed\."),
    ("Qwen-Image, Wan or another video model", OTHER_MODEL, r"img_mlp\.|patch_embedding\.|txt_norm\."),
    ("Kandinsky or Kolors", OTHER_MODEL, r"add_k_proj|encoder_hid_proj\.|encoder_kv"),
    ("Stable Video Diffusion", OTHER_MODEL, r"time_stack\.|temporal_transformer_blocks|time_mixer"),
    ("DeepFloyd IF", OTHER_MODEL, r"encoder_pooling\.|add_embedding\.pool\."),
)
# The same for files without a denoiser.
PARTS: tuple[tuple[str, ...], ...] = (
    (
        "a VAE alone",
        f"name the model here and the VAE with {setting('vae')}",
        r"^(first_stage_model\.|vae\.)?(decoder|encoder)\.conv_in\.",
    ),
    ("a tiny preview VAE (TAESD)", PART, r"^(decoder\.layers|taesd_decoder|decoder\.1)\."),
    ("a CLIP model of images and texts", PART, r"^(vision_model|visual)\."),
    (
        "a text encoder alone",
        PART,
        r"^(text_model|cond_stage_model|conditioner|transformer\.resblocks|text_encoder|embeddings)\.",
    ),
    ("a T5 text encoder alone", PART, r"(encoder\.block\.0\.layer|enc\.blk\.0)\."),
    (
        "an image upscaler",
        "name the model that generates the images",
        r"model\.1\.sub\.0\.|body\.0\.rdb1|RDB1\.",
    ),
)


# Beginnings of pipeline classes in model_index.json -> what the folder holds.
PIPELINES = {
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux": "Flux",
    "PixArt": "PixArt",
    "Wuerstchen": "Würstchen",
    "StableCascade": "Stable Cascade",
    "AuraFlow": "AuraFlow",
    "Kandinsky": "Kandinsky",
    "HunyuanDiT": "Hunyuan-DiT",
    "Lumina": "Lumina",
    "Sana": "Sana",
    "QwenImage": "Qwen-Image",
    "Chroma": "Chroma",
    "StableVideo": "Stable Video Diffusion",
    "StableUnCLIP": "Stable unCLIP",
    "IF": "DeepFloyd IF",
    "Kolors": "Kolors",
    "AltDiffusion": "AltDiffusion, whose text encoder is not CLIP",
    "VersatileDiffusion": "Versatile Diffusion",
    "StableDiffusionImageVariation": "a model of image variations, which needs an image in place of a text",
    "StableDiffusionLatentUpscale": "an upscaler of latents",
    "TextToVideo": "a model of videos",
    "LDMTextToImage": "LDM text2img-large in the layout of diffusers; name its model.ckpt",
}
# Suffixes in a folder, or in a part of it -> other programs' formats.
FORMATS = {
    ".onnx": "ONNX",
    ".engine": "TensorRT",
    ".plan": "TensorRT",
    ".mlpackage": "Core ML",
    ".mlmodelc": "Core ML",
    ".msgpack": "Flax",
}


def kind_of_folder(folder: Folder) -> tuple[str, str]:
    """What a folder is that holds no denoiser's weights of diffusers, and what to do."""
    path, names = folder.path, folder.names
    suffixes = {Path(name).suffix.lower() for name in [*names, *(entry.name for entry in path.iterdir())]}
    for suffix, name in FORMATS.items():
        if suffix in suffixes:
            return f"is an {name} model" if name[0] in "AEIO" else f"is a {name} model", (
                "name the PyTorch model that it was made from"
            )
    if any(name.endswith("openvino_model.xml") for name in names):
        return "is an OpenVINO model", "name the PyTorch model that it was made from"
    if any(name.startswith("unet/") for name in names) or "model_index.json" in names:
        return "is a diffusers folder without the weights of its unet", "download it completely"
    if (path / "snapshots").is_dir():
        inside = sorted((path / "snapshots").iterdir())
        return "is a folder of the hub's cache", f"name '{inside[-1] if inside else path / 'snapshots'}'"
    own = folder.config("")
    part = str(own.get("_class_name") or next(iter(own.get("architectures") or []), "") or "")
    above = (
        "name the folder above it" if (path.parent / "model_index.json").is_file() else "name the whole model"
    )
    named = next((name for start, name in FOLDER_PARTS.items() if part.startswith(start)), None)
    if part.startswith("AutoencoderKL"):
        above += f", and bring this VAE with {setting('vae')}"
    if named is not None:
        return f"is {named} alone", above
    if any(Path(name).name in ("adapter_config.json", "pytorch_lora_weights.safetensors") for name in names):
        return "is a LoRA", ADAPTER
    if "scheduler_config.json" in names or "tokenizer_config.json" in names:
        return "is a part of a diffusers model without weights", above
    if (path / "checkpoints").is_dir() or "embeddings.pt" in names:
        return (
            "is the folder of a training run",
            f"name the base model here and the embedding with {setting('words')}",
        )
    files = [name for name in names if Path(name).suffix.lower() in (".ckpt", ".safetensors", ".pt", ".bin")]
    if files:
        return "is a folder and no diffusers model", f"name the file in it, such as '{path / files[0]}'"
    return "is a folder without a model", "name a .ckpt or .safetensors file, or a folder of diffusers"


# -- files by their tensors -----------------------------------------------------------------------------------


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


def of_header(header: Header, name: str) -> Found | Kind:
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


def kind_of(header: Header, name: str) -> Kind | None:
    found = of_header(header, name)
    if isinstance(found, Kind):
        return None if found is UNKNOWN else found
    return Kind(FAMILIES[found[0]], "use the config that belongs to it")


def what_holds(shapes: Shapes) -> str | None:
    """Say what a file with these tensors is, such as "a LoRA" or "Stable Diffusion 2"; None if it is unknown."""
    kind = kind_of(Header(shapes, {}), "")
    return kind and kind.name


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
