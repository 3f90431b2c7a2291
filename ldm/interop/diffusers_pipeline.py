"""Converts a latent diffusion model to a pipeline of diffusers that generates the same images from the same noise.

`ldm.diffusers_layout` translates names and settings. `compare_with_model` then compares every part with the model, so
that a model that diffusers cannot represent is not written unnoticed. diffusers is an optional package and is imported
only inside functions.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.checkpoint import uninitialised
from ldm.diffusers_layout import TEXT_ENCODERS, to_diffusers
from ldm.diffusers_settings import PREDICTIONS, SCHEDULES, unet_settings, vae_settings
from ldm.files import check_new, write_text
from ldm.front_ends import setting
from ldm.model_kinds import UNET, VAE
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.conditioning import condition_map, context_of
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.sdxl import LatentDiffusionXL
from ldm.models.diffusion.steps import NO_SIGNAL
from ldm.modules.diffusionmodules.model import Decoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.open_clip import LAYERS, FrozenOpenCLIPEmbedder
from ldm.modules.encoders.sdxl import FrozenSDXLEmbedder
from ldm.util import UserError

ENCODERS = (FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder, FrozenSDXLEmbedder)
# What diffusers appends to the names of the parts of each text tower.
ENDS = ("", "_2")
TOLERANCE = 2e-3  # relative to the largest number compared: float32 sums in another order
# The submodule of transformers' CLIP text models that has all weights but the projection.
_TEXT_MODEL = "text_model."
_PREDICTIONS: dict[str, str] = {ours: theirs for theirs, ours in PREDICTIONS.items()}


@torch.no_grad()
def to_pipeline(model: nn.Module, config: Mapping[str, Any]) -> Any:
    """Convert a model to a StableDiffusionPipeline or StableDiffusionXLPipeline, in float32 on the CPU.

    The averaged weights of the denoiser are used if the model has any. Learned vectors are not included; see
    `add_words`.

    Args:
        model: a LatentDiffusion with one of `ENCODERS`, and AutoencoderKL.
        config: the model's YAML, with or without its `model:` node.
    Raises:
        UserError: diffusers is not installed, or the model is of another kind.
    """
    diffusers = _diffusers()
    model, encoder = _supported(model)
    family = family_of_encoder(encoder)
    params = _params(config.get("model", config))
    unet_config, first_stage = params["unet_config"]["params"], params["first_stage_config"]["params"]
    with model.ema_scope():  # what is converted shares the memory of the averaged weights
        state = {
            key: value.detach().cpu().float()
            for key, value in model.state_dict().items()
            if key.startswith((UNET, VAE, *(prefix for prefix, _ in TEXT_ENCODERS[family].values())))
        }
        weights = to_diffusers(state, family, skip_last=_unused_blocks(encoder))
        with _translating("denoiser"):
            settings = unet_settings(unet_config, model.image_size, getattr(model, "size_width", 0))
            unet = _filled(diffusers.UNet2DConditionModel, settings, weights["unet"])
        with _translating("first stage"):
            settings = vae_settings(first_stage["ddconfig"], float(model.scale_factor))
            vae = _filled(diffusers.AutoencoderKL, settings, weights["vae"])
        parts: dict[str, Any] = {
            "unet": unet,
            "vae": vae,
            "scheduler": _scheduler(diffusers.DDIMScheduler, model),
        }
        with _translating("text encoder"):
            for tower, end in zip(_towers(encoder), ENDS, strict=False):
                parts[f"text_encoder{end}"] = _text_encoder(tower, weights[f"text_encoder{end}"])
                parts[f"tokenizer{end}"] = _tokenizer(tower)
    if family == "sdxl":
        zeros = bool(getattr(model, "zero_empty_negative", True))
        return diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros)
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def add_words(pipeline: Any, words: Mapping[str, Tensor]) -> None:
    """Add learned words, with their vectors [N, d], to the tokenizer and the text encoder of a pipeline.

    Raises UserError for a word that is in the vocabulary already, as `*` is.
    """
    ends = [end for end in ENDS if getattr(pipeline, f"text_encoder{end}", None) is not None]
    encoders = [getattr(pipeline, f"text_encoder{end}") for end in ends]
    tables = [encoder.get_input_embeddings() for encoder in encoders]
    tokenizers = [getattr(pipeline, f"tokenizer{end}") for end in ends]
    for tokenizer, table in zip(tokenizers, tables, strict=True):
        _check_words(words, tokenizer, table.num_embeddings)
    for word, vectors in words.items():
        parts = vectors.detach().cpu().float().split([table.embedding_dim for table in tables], dim=1)
        for tokenizer, encoder, part in zip(tokenizers, encoders, parts, strict=True):
            with _translating(f"word '{word}'"):
                pipeline.load_textual_inversion({word: part}, tokenizer=tokenizer, text_encoder=encoder)


def check_supported(model: nn.Module, words: Iterable[str]) -> None:
    """Raise UserError for a model that `to_pipeline` cannot convert, or for words that `add_words` cannot add."""
    for tower in _towers(_supported(model)[1]):
        _check_words(words, tower.tokenizer, tower.token_embedding.num_embeddings)


def _check_words(words: Iterable[str], tokenizer: Any, rows: int) -> None:
    if len(tokenizer) != rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} words and the text encoder {rows}: diffusers cannot "
            f"add words; export without {setting('words')}"
        )
    known = tokenizer.get_vocab()
    for word in words:
        if word in known or f"{word}_1" in known:
            raise UserError(
                f"'{word}' is a word of the tokenizer already, and diffusers cannot replace it; give it another "
                f"name, for example {setting('export_name', word)}"
            )


def _towers(encoder: Any) -> tuple[Any, ...]:
    """The text towers of an encoder, in the order of `ENDS`."""
    return encoder.towers if isinstance(encoder, FrozenSDXLEmbedder) else (encoder,)


@torch.no_grad()
def compare_with_model(
    model: LatentDiffusion, pipeline: Any, words: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Compare the outputs of the pipeline's parts with those of the model's parts.

    Args:
        words: the model's placeholders with their names in the pipeline; each is compared in a prompt.
    Returns:
        the largest difference of each part, relative to its largest output.
    Raises:
        UserError: a difference exceeds `TOLERANCE`.
    """
    prompts = {"a photo": "a photo"}
    prompts |= {
        f"a photo of {ours}, small": f"a photo of {theirs}, small" for ours, theirs in (words or {}).items()
    }
    device, generator = model.alphas_cumprod.device, torch.Generator().manual_seed(0)
    side = 2 ** len(pipeline.unet.config.block_out_channels)
    latent = torch.randn(1, model.channels, side, side, generator=generator)
    time = torch.tensor([model.num_timesteps // 2])
    differences: dict[str, float] = {}
    with model.ema_scope():
        for prompt, translated in prompts.items():
            condition = condition_map(lambda part: part.cpu(), model.get_learned_conditioning([prompt]))
            theirs, _, *pooled = pipeline.encode_prompt(
                translated, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            ours = context_of(condition)
            differences[f'prompt "{translated}"'] = _difference(ours, theirs)
            if pooled:
                own = condition["c_adm"][0][:, : pooled[0].shape[1]]
                differences[f'pooled prompt "{translated}"'] = _difference(own, pooled[0])
        condition = condition_map(lambda part: part.to(device), condition)
        denoised = model.apply_model(latent.to(device), time.to(device), condition).cpu()
        added = None
        if isinstance(model, LatentDiffusionXL):
            added = {"text_embeds": own, "time_ids": torch.tensor([model.drawn_sizes()])}
        theirs = pipeline.unet(latent, time, ours, added_cond_kwargs=added).sample
        differences["denoiser"] = _difference(denoised, theirs)
    image = model.decode_first_stage(latent.to(device)).cpu()
    scaled = latent / pipeline.vae.config.scaling_factor
    differences["first stage"] = _difference(image, pipeline.vae.decode(scaled).sample)
    differences["noise schedule"] = _difference(model.alphas_cumprod.cpu(), pipeline.scheduler.alphas_cumprod)
    for part, difference in differences.items():
        if not difference <= TOLERANCE:  # true for NaN too
            raise UserError(
                f"diffusers cannot represent this model: its {part} is off by {difference:.1e} of the largest number"
            )
    return differences


def save_pipeline(pipeline: Any, folder: str | Path) -> Path:
    """Write the folder of a pipeline atomically; UserError if the folder exists and is not empty."""
    folder = Path(folder)
    check_new(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            pipeline.save_pretrained(Path(temporary) / "pipeline")
            _save_vocabularies(pipeline, Path(temporary) / "pipeline")
            _rename_text_weights(pipeline, Path(temporary) / "pipeline")
            if folder.is_dir():
                folder.rmdir()
            (Path(temporary) / "pipeline").rename(folder)
    except OSError as error:
        raise UserError(f"cannot write '{folder}' ({error.strerror or error})") from error
    return folder


def _save_vocabularies(pipeline: Any, folder: Path) -> None:
    """Write the files of tokenizers that transformers 4 reads, beside the one file of transformers 5."""
    for name, tokenizer in pipeline.components.items():
        if name.startswith("tokenizer"):
            tokenizer.backend_tokenizer.model.save(str(folder / name))  # vocab.json and merges.txt
            vocabulary = json.loads((folder / name / "vocab.json").read_text(encoding="utf-8"))
            added = {word: row for word, row in tokenizer.get_added_vocab().items() if word not in vocabulary}
            if added:
                write_text(folder / name / "added_tokens.json", json.dumps(added, ensure_ascii=False))


def _rename_text_weights(pipeline: Any, folder: Path) -> None:
    """Give weights of text encoders the names that transformers 4 needs and transformers 5 knows too.

    With the names that transformers 5 writes, transformers 4 takes random weights and says so only in a warning.
    """
    for name in pipeline.components:
        path = folder / name / "model.safetensors"
        if name.startswith("text_encoder") and path.is_file():
            weights = load_file(path)
            inside = {key for key in weights if not key.startswith((_TEXT_MODEL, "text_projection."))}
            named = {f"{_TEXT_MODEL}{key}" if key in inside else key: value for key, value in weights.items()}
            save_file(named, path, {"format": "pt"})


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"diffusers is needed for this ({error}); pip install diffusers") from error
    return diffusers


def _supported(model: nn.Module) -> tuple[LatentDiffusion, Any]:
    """The model and its text encoder; UserError for a kind of model that this module cannot convert."""
    if not isinstance(model, LatentDiffusion):
        raise UserError(f"{type(model).__name__} is not a LatentDiffusion; only such models are exported")
    encoder, first_stage = model.cond_stage_model, model.first_stage_model
    key = "crossattn-adm" if isinstance(model, LatentDiffusionXL) else "crossattn"
    if model.model.conditioning_key != key:
        raise UserError(
            f"the model's conditioning_key is {model.model.conditioning_key}; only models with {key} are exported"
        )
    if not isinstance(encoder, ENCODERS):
        known = ", ".join(kind.__name__ for kind in ENCODERS)
        raise UserError(
            f"the model's cond_stage_model is {type(encoder).__name__}; exported are only {known}"
        )
    if not isinstance(first_stage, AutoencoderKL):
        raise UserError(
            f"the model's first_stage_model is {type(first_stage).__name__}; only AutoencoderKL is exported"
        )
    return model, encoder


def family_of_encoder(encoder: nn.Module) -> str:
    """The family in `ldm.diffusers_layout.TEXT_ENCODERS` that a text encoder belongs to."""
    if isinstance(encoder, FrozenSDXLEmbedder):
        return "sdxl"
    return "sd2" if isinstance(encoder, FrozenOpenCLIPEmbedder) else "sd1"


def _unused_blocks(encoder: nn.Module) -> int:
    return LAYERS[encoder.layer] if isinstance(encoder, FrozenOpenCLIPEmbedder) else 0


def _tokenizer(encoder: Any) -> Any:
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.model_max_length = encoder.max_length
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(encoder.prompt_tokenizer.pad_id)
    return tokenizer


def _params(node: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the model's node, with default values."""
    plain: Any = OmegaConf.to_container(OmegaConf.create(dict(node)), resolve=True)
    params: dict[str, Any] = plain["params"]
    unet, first_stage = params["unet_config"]["params"], params["first_stage_config"]["params"]
    params["unet_config"]["params"] = _with_defaults(UNetModel, unet)
    first_stage["ddconfig"] = _with_defaults(Decoder, first_stage["ddconfig"])
    return params


def _with_defaults(factory: type, params: Mapping[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(factory).bind(**params)
    bound.apply_defaults()
    return dict(bound.arguments)


@contextlib.contextmanager
def _translating(part: str) -> Iterator[None]:
    """Turn any exception that diffusers raises for an unsupported model into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"diffusers cannot represent the {part} of this model ({reason})") from error


def _filled(factory: Any, settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    """A module of diffusers with these settings and weights, in eval mode."""
    with uninitialised():
        module: nn.Module = factory(**settings)
    module.load_state_dict(weights)
    return module.eval()


def _text_encoder(encoder: Any, weights: Mapping[str, Tensor]) -> nn.Module:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    projected = "text_projection.weight" in weights
    with uninitialised():
        module = (CLIPTextModelWithProjection if projected else CLIPTextModel)(_text_config(encoder, weights))
    # CLIPTextModel holds a submodule `text_model` in transformers 4, and is that submodule itself in transformers 5.
    inside = _TEXT_MODEL if hasattr(module, "text_model") else ""
    named = {
        key if key.startswith("text_projection.") else inside + key: value for key, value in weights.items()
    }
    missing, unexpected = module.load_state_dict(named, strict=False)
    different = [key for key in (*missing, *unexpected) if not key.endswith("position_ids")]
    if different:
        raise ValueError(f"the weight {different[0]} is only in one of the two models")
    return module.eval()


def _text_config(encoder: Any, weights: Mapping[str, Tensor]) -> Any:
    """The configuration of transformers' CLIP text model for a text encoder with these weights."""
    from transformers import CLIPTextConfig

    if isinstance(encoder, FrozenCLIPEmbedder):
        return copy.deepcopy(encoder.transformer.text_model.config)
    vocabulary, width = weights["embeddings.token_embedding.weight"].shape
    blocks = encoder.model.blocks()
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(weights["encoder.layers.0.mlp.fc1.bias"]),
        num_attention_heads=blocks[0].attn.num_heads,
        num_hidden_layers=len({key.split(".")[2] for key in weights if key.startswith("encoder.layers.")}),
        max_position_embeddings=len(weights["embeddings.position_embedding.weight"]),
        hidden_act="gelu",
        projection_dim=width,
        bos_token_id=encoder.tokenizer.bos_token_id,
        eos_token_id=encoder.tokenizer.eos_token_id,
        pad_token_id=encoder.prompt_tokenizer.pad_id,
    )


def _scheduler(factory: Any, model: LatentDiffusion) -> Any:
    """DDIM as in `ldm.models.diffusion.steps`: the last step ends at alphas_cumprod[0], nothing is clipped."""
    betas = model.betas.cpu().double()
    settings = {
        "num_train_timesteps": model.num_timesteps,
        "beta_start": float(f"{betas[0]:.6g}"),
        "beta_end": float(f"{betas[-1]:.6g}"),
        "prediction_type": _PREDICTIONS[model.parameterization],
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }
    if model.alphas_cumprod[-1] < NO_SIGNAL:
        return factory(trained_betas=betas.tolist(), **settings | {"timestep_spacing": "trailing"})
    for name in SCHEDULES:
        scheduler = factory(beta_schedule=name, **settings)
        if torch.allclose(scheduler.betas.double(), betas, rtol=1e-4, atol=0):
            return scheduler
    return factory(trained_betas=betas.tolist(), **settings)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-6))
