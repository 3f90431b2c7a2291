"""A latent diffusion model as a pipeline of diffusers, which draws the same pictures from the same noise.

Names and layouts are translated by diffusers' own converters for single-file checkpoints; `check` then
holds every part against the model, so that nothing that diffusers cannot represent is written unnoticed.
diffusers is an optional package and imported where it is used.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.checkpoint import uninitialised
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.model import Decoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import UserError

TOLERANCE = 2e-3  # of the largest number that is compared: float32, summed in another order
_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@torch.no_grad()
def to_pipeline(model: nn.Module, config: Mapping[str, Any]) -> Any:
    """The StableDiffusionPipeline of a model, in float32 on the CPU, with the averaged denoiser if it has one.

    `config` is the model's YAML, with or without its `model:` node. Learned vectors are left out: see
    `add_words`. Raises UserError without diffusers, and for a model that is not text-to-image by CLIP with a
    KL first stage.
    """
    diffusers, converters = _diffusers()
    _check_kind(model)
    node = {"model": {"params": _params(config.get("model", config))}}
    with model.ema_scope():
        kept = {k: v for k, v in model.state_dict().items() if not k.startswith(("model_ema.", "embedding_"))}
        state = {key: value.detach().cpu().float() for key, value in kept.items()}
        with _translating("denoiser"):
            settings = converters.create_unet_diffusers_config_from_ldm(node, state)
            settings |= {"sample_size": model.image_size} | _heads(node)
            weights = converters.convert_ldm_unet_checkpoint(state, settings)
            unet = _filled(diffusers.UNet2DConditionModel, settings, weights)
        with _translating("first stage"):
            settings = converters.create_vae_diffusers_config_from_ldm(node, state)
            ours = node["model"]["params"]["first_stage_config"]["params"]["ddconfig"]
            settings |= {"sample_size": ours["resolution"], "norm_num_groups": ours["num_groups"]}
            settings |= {"scaling_factor": float(model.scale_factor)}
            weights = converters.convert_ldm_vae_checkpoint(state, settings)
            vae = _filled(diffusers.AutoencoderKL, settings, weights)
        with _translating("text encoder"):
            text_encoder = _text_encoder(
                model.cond_stage_model, converters.convert_ldm_clip_checkpoint(state)
            )
    tokenizer = copy.deepcopy(model.cond_stage_model.tokenizer)
    tokenizer.model_max_length = model.cond_stage_model.max_length
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_scheduler(diffusers.DDIMScheduler, model),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def add_words(pipeline: Any, words: Mapping[str, Tensor]) -> None:
    """Teach a pipeline learned words: vectors [N, d] by word, saved with its tokenizer and text encoder.

    Raises UserError for a word that the tokenizer knows already, as it does `*`, or that it would split.
    """
    known, size = pipeline.tokenizer.get_vocab(), pipeline.text_encoder.get_input_embeddings().num_embeddings
    if len(pipeline.tokenizer) != size:
        raise UserError(
            f"the tokenizer has {len(pipeline.tokenizer)} words and the text encoder {size}: diffusers cannot "
            "add to it; export without --embedding_path"
        )
    for word, vectors in words.items():
        if word in known or f"{word}_1" in known:
            raise UserError(
                f"'{word}' is a word of the tokenizer, which diffusers cannot learn anew; give it another name, "
                f"as with --rename '{word}=<my-cat>'"
            )
        with _translating(f"word '{word}'"):
            pipeline.load_textual_inversion({word: vectors.detach().cpu().float()})


@torch.no_grad()
def compare_with_model(
    model: nn.Module, pipeline: Any, words: Mapping[str, str] | None = None
) -> dict[str, float]:
    """How far the pipeline's parts are from the model's, relative to the largest number; UserError if too far.

    `words` maps the model's placeholders to their names in the pipeline; each is tried in a prompt.
    """
    prompts = {"a photo": "a photo"}
    prompts |= {
        f"a photo of {ours}, small": f"a photo of {theirs}, small" for ours, theirs in (words or {}).items()
    }
    device, generator = model.alphas_cumprod.device, torch.Generator().manual_seed(0)
    side = 2 ** len(pipeline.unet.config.block_out_channels)
    latent = torch.randn(1, model.channels, side, side, generator=generator)
    time = torch.tensor([model.num_timesteps // 2])
    found: dict[str, float] = {}
    with model.ema_scope():
        for prompt, translated in prompts.items():
            ours = model.get_learned_conditioning([prompt]).cpu()
            theirs, _ = pipeline.encode_prompt(translated, "cpu", 1, False)
            found[f'prompt "{translated}"'] = _distance(ours, theirs)
        denoised = model.apply_model(latent.to(device), time.to(device), ours.to(device)).cpu()
        found["denoiser"] = _distance(denoised, pipeline.unet(latent, time, ours).sample)
    picture = model.decode_first_stage(latent.to(device)).cpu()
    scaled = latent / pipeline.vae.config.scaling_factor
    found["first stage"] = _distance(picture, pipeline.vae.decode(scaled).sample)
    found["noise schedule"] = _distance(model.alphas_cumprod.cpu(), pipeline.scheduler.alphas_cumprod)
    for part, distance in found.items():
        if not distance <= TOLERANCE:
            raise UserError(
                f"diffusers cannot represent this model: its {part} is off by {distance:.1e} of the largest number"
            )
    return found


def save_pipeline(pipeline: Any, folder: str | Path) -> Path:
    """Write a pipeline's folder, whole or not at all; one that holds something is refused with UserError."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{folder}' exists already; name another folder with --out")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as home:
            pipeline.save_pretrained(Path(home) / "pipeline")
            if folder.is_dir():
                folder.rmdir()
            (Path(home) / "pipeline").rename(folder)
    except OSError as error:
        raise UserError(f"cannot write '{folder}' ({error.strerror or error})") from error
    return folder


def _diffusers() -> tuple[Any, Any]:
    try:
        import diffusers
        from diffusers.loaders import single_file_utils
    except ImportError as error:
        raise UserError(f"diffusers is needed for this ({error}); pip install diffusers") from error
    return diffusers, single_file_utils


def _check_kind(model: nn.Module) -> None:
    parts = {"cond_stage_model": FrozenCLIPEmbedder, "first_stage_model": AutoencoderKL}
    if not isinstance(model, LatentDiffusion):
        raise UserError(
            f"{type(model).__name__} is no latent diffusion model; diffusers has no pipeline for it"
        )
    if model.model.conditioning_key != "crossattn":
        raise UserError(
            f"the model's conditioning_key is {model.model.conditioning_key}; only models with crossattn are exported"
        )
    for name, wanted in parts.items():
        part = getattr(model, name)
        if not isinstance(part, wanted):
            raise UserError(
                f"the model's {name} is {type(part).__name__}; only models with {wanted.__name__} are exported"
            )


def _params(node: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the model's node, defaults written out where diffusers' converters look for them."""
    plain = OmegaConf.to_container(OmegaConf.create(node), resolve=True)["params"]
    unet, first_stage = plain["unet_config"]["params"], plain["first_stage_config"]["params"]
    plain["unet_config"]["params"] = _with_defaults(UNetModel, unet)
    first_stage["ddconfig"] = _with_defaults(Decoder, first_stage["ddconfig"])
    return plain


def _with_defaults(made: type, given: Mapping[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(made).bind(**given)
    bound.apply_defaults()
    # The converters take a class number for given whenever the key is there.
    return {key: value for key, value in bound.arguments.items() if value is not None or key != "num_classes"}


def _heads(node: Mapping[str, Any]) -> dict[str, Any]:
    """Attention heads, of which diffusers' converters know one number for all levels."""
    unet = node["model"]["params"]["unet_config"]["params"]
    if unet["num_head_channels"] == -1:
        return {}
    channels = [unet["model_channels"] * factor for factor in unet["channel_mult"]]
    return {"attention_head_dim": [count // unet["num_head_channels"] for count in channels]}


@contextlib.contextmanager
def _translating(part: str) -> Iterator[None]:
    """Turn whatever diffusers raises for a model unlike its own into one line."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"diffusers cannot represent the {part} of this model ({reason})") from error


def _filled(made: Any, settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    with uninitialised():
        module = made(**settings)
    module.load_state_dict(weights)
    return module.eval()


def _text_encoder(encoder: FrozenCLIPEmbedder, weights: Mapping[str, Tensor]) -> nn.Module:
    from transformers import CLIPTextModel

    with uninitialised():
        module = CLIPTextModel(copy.deepcopy(encoder.transformer.text_model.config))
    # transformers 5 has the text model itself where 4 has one that holds it
    if not hasattr(module, "text_model"):
        weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
    missing, unexpected = module.load_state_dict(weights, strict=False)
    strange = [key for key in (*missing, *unexpected) if not key.endswith("position_ids")]
    if strange:
        raise ValueError(f"the weight {strange[0]} is only in one of the two")
    return module.eval()


def _scheduler(made: Any, model: nn.Module) -> Any:
    """DDIM as the original samples: steps from 1 on, ending at the model's cleanest level, nothing clipped."""
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
    for name in ("scaled_linear", "linear"):  # these are `linear` and `sqrt_linear` of the YAMLs
        scheduler = made(beta_schedule=name, **settings)
        if torch.allclose(scheduler.betas.double(), betas, rtol=1e-4, atol=0):
            return scheduler
    return made(trained_betas=betas.tolist(), **settings)


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-6))
