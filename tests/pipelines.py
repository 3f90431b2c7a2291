"""Small pipelines of diffusers with random weights, as people hold their models: one folder of each family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

from tests.embeddings.samples import clip_folder

CROSS, PLAIN = "CrossAttn", ""


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """Give every weight a number, those too that begin at zero; differences then show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            noise *= 0.05 if "embedding" in name else 0.9 / parameter[0].numel() ** 0.5
        else:
            noise = noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
        parameter.data.copy_(noise)
    return module.eval()


def tokenizer_folder(folder: Path, pad: str) -> Path:
    """The small vocabulary of the golden records, padded with `pad` as the tokenizers of published models are."""
    folder.mkdir(parents=True)
    clip_folder(folder)
    (folder / "config.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def tower(
    act: str, layers: int = 3, projection: bool = False, width: int = 32, vocabulary: int = 49408
) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=4,
        num_hidden_layers=layers,
        max_position_embeddings=77,
        hidden_act=act,
        projection_dim=width,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


UNETS: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    },
    "sd2": {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": (4, 8),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32 + 64,
        "attention_head_dim": (4, 8),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 6 * 16 + 64,
    },
}


def make_pipeline(
    family: str,
    folder: Path,
    prediction: str = "epsilon",
    zero_snr: bool = False,
    words: tuple[str, ...] = (),
) -> Any:
    """A small pipeline of `family` (sd1, sd2 or sdxl); `folder` receives its tokenizers.

    `words` are added to the vocabulary, as by tools that keep what was learned in the model.
    """
    import diffusers

    unet = diffusers.UNet2DConditionModel(sample_size=8, layers_per_block=1, **UNETS[family])
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        timestep_spacing="trailing" if zero_snr else "leading",
        rescale_betas_zero_snr=zero_snr,
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    end, exclamation = "<|endoftext|>", "!"

    def tokenizer(name: str, pad: str) -> Any:
        made = CLIPTokenizerFast.from_pretrained(tokenizer_folder(folder / name, pad), model_max_length=77)
        made.add_tokens(list(words))
        return made

    vocabulary = 49408 + len(words)

    parts: dict[str, Any] = {
        "unet": randomised(unet, 1),
        "vae": randomised(vae, 2),
        "scheduler": scheduler,
        "text_encoder": randomised(
            tower("gelu" if family == "sd2" else "quick_gelu", vocabulary=vocabulary), 3
        ),
        "tokenizer": tokenizer("tokenizer", exclamation if family == "sd2" else end),
    }
    if family == "sdxl":
        parts["text_encoder_2"] = randomised(
            tower("gelu", projection=True, width=64, vocabulary=vocabulary), 4
        )
        parts["tokenizer_2"] = tokenizer("tokenizer_2", exclamation)
        pipeline = diffusers.StableDiffusionXLPipeline(**parts)
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
