"""Full-size models on the meta device: keys and shapes of the shipped YAMLs, and the original's YAMLs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from ldm.base_models import family_of
from ldm.checkpoint import uninitialised
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import check_config, instantiate_from_config, skip_pretrained
from tests.golden_record import GOLDEN

CONFIGS = Path(__file__).parent.parent / "configs"
# Published files hold it; transformers 5 counts positions itself, and loading passes over it.
IGNORED = {
    f"{encoder}.transformer.text_model.embeddings.position_ids"
    for encoder in ("cond_stage_model", "conditioner.embedders.0")
}


@pytest.mark.parametrize(
    ("manifest", "config", "encoder"),
    [
        ("sd_v1", "stable-diffusion/v1-finetune.yaml", {"version": "clip"}),
        (
            "ldm_text2img_large",
            "latent-diffusion/txt2img-1p4B-finetune.yaml",
            {"tokenizer": "bert_tiny_tokenizer"},
        ),
    ],
)
def test_keys_and_shapes(manifest: str, config: str, encoder: dict[str, str], clip_vit_l: Path) -> None:
    node = OmegaConf.load(CONFIGS / config).model
    own: dict[str, str] = {}
    if "version" in encoder:
        own["version"] = str(clip_vit_l)
    else:
        own["tokenizer"] = str(GOLDEN / encoder["tokenizer"])
    node.params.cond_stage_config = OmegaConf.merge(node.params.cond_stage_config, {"params": own})
    with skip_pretrained(), torch.device("meta"):
        model = instantiate_from_config({"target": node.target, "params": node.params})
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    recorded = json.loads((GOLDEN / f"{manifest}.state_dict.json").read_text())
    assert {k: v for k, v in ours.items() if k not in IGNORED} == {
        k: v for k, v in recorded.items() if k not in IGNORED
    }


@pytest.mark.parametrize("config", ["v2-finetune", "v2-finetune_v", "v2-inference", "v2-inference-v"])
def test_keys_and_shapes_of_stable_diffusion_2(config: str) -> None:
    node = OmegaConf.load(CONFIGS / f"stable-diffusion/{config}.yaml").model
    node.params.cond_stage_config.params.tokenizer = str(GOLDEN / "clip_tiny")
    with skip_pretrained(), torch.device("meta"):
        model = instantiate_from_config({"target": node.target, "params": node.params})
    recorded = json.loads((GOLDEN / "sd_v2.state_dict.json").read_text())
    # The record is without the buffers of the schedule, which have no dot in their names.
    assert {
        name: list(value.shape)
        for name, value in model.state_dict().items()
        if "." in name and not name.startswith("embedding_manager.")
    } == recorded
    assert model.parameterization == ("v" if config.endswith("v") else "eps")
    assert model.embedding_manager.width == 1024


# The parameters of Stability's v2-inference.yaml; they train no word. Its other YAMLs differ in those below.
STABILITYS: dict[str, Any] = {
    "linear_start": 0.00085,
    "linear_end": 0.0120,
    "num_timesteps_cond": 1,
    "log_every_t": 200,
    "timesteps": 1000,
    "first_stage_key": "jpg",
    "cond_stage_key": "txt",
    "image_size": 64,
    "channels": 4,
    "cond_stage_trainable": False,
    "conditioning_key": "crossattn",
    "monitor": "val/loss_simple_ema",
    "scale_factor": 0.18215,
    "use_ema": False,
    "unet_config": {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {
            "use_checkpoint": True,
            "use_fp16": True,
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 320,
            "attention_resolutions": [4, 2, 1],
            "num_res_blocks": 2,
            "channel_mult": [1, 2, 4, 4],
            "num_head_channels": 64,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": True,
            "transformer_depth": 1,
            "context_dim": 1024,
            "legacy": False,
        },
    },
    "first_stage_config": {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "embed_dim": 4,
            "monitor": "val/rec_loss",
            "ddconfig": {
                "double_z": True,
                "z_channels": 4,
                "resolution": 256,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 128,
                "ch_mult": [1, 2, 4, 4],
                "num_res_blocks": 2,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
            "lossconfig": {"target": "torch.nn.Identity"},
        },
    },
    "cond_stage_config": {
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
        "params": {"freeze": True, "layer": "penultimate"},
    },
}


CPU = {"use_checkpoint": False, "use_fp16": False}  # of the YAMLs in its folders intel and ipex
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "v2-inference": ({}, {}),
    "v2-inference-v": ({"parameterization": "v"}, {}),
    "v2-inference-fp32": ({}, CPU),
    "v2-inference-v-fp32": ({"parameterization": "v"}, CPU),
    "v2-inference-bf16": ({}, CPU | {"use_bf16": True}),
    "v2-inference-v-bf16": ({"parameterization": "v"}, CPU | {"use_bf16": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_stabilitys_own_yamls_load_unchanged(name: str) -> None:
    further, of_unet = VARIANTS[name]
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    unet = STABILITYS["unet_config"] | {"params": STABILITYS["unet_config"]["params"] | of_unet}
    params = STABILITYS | further | {"unet_config": unet}
    node: Any = OmegaConf.create({"base_learning_rate": 1.0e-4, "target": target, "params": params})
    check_config(node, "model")
    assert family_of(node) == "sd2"
    own = {"cond_stage_config": {"params": {"tokenizer": str(GOLDEN / "clip_tiny")}}}
    node = OmegaConf.merge(node, {"params": own})  # the tokenizer that is fetched otherwise
    with skip_pretrained(), torch.device("meta"):
        model = instantiate_from_config(node)
    recorded = json.loads((GOLDEN / "sd_v2.state_dict.json").read_text())
    state = model.state_dict()
    assert {name: list(value.shape) for name, value in state.items() if "." in name} == recorded
    assert model.parameterization == further.get("parameterization", "eps")
    assert not model.personalised


@pytest.mark.parametrize("config", ["xl-finetune", "xl-inference"])
def test_keys_and_shapes_of_stable_diffusion_xl(config: str, clip_vit_l: Path) -> None:
    node = OmegaConf.load(CONFIGS / f"stable-diffusion/{config}.yaml").model
    node.params.cond_stage_config.params = {"version": str(clip_vit_l)}
    check_config({"target": node.target, "params": node.params})
    with skip_pretrained(), torch.device("meta"):
        model = instantiate_from_config({"target": node.target, "params": node.params})
    recorded = json.loads((GOLDEN / "sdxl_base.state_dict.json").read_text())
    assert len(recorded) == 2515
    assert {
        name: list(value.shape)
        for name, value in model.state_dict().items()
        if "." in name and not name.startswith("embedding_manager.")
    } == {name: shape for name, shape in recorded.items() if name not in IGNORED}
    assert (model.size_width, model.embedding_manager.width) == (256, 768 + 1280)


# The `model:` nodes of the YAMLs beside the models that CompVis/latent-diffusion published.
ORIGINAL_MODELS = sorted((Path(__file__).parent / "old_yamls" / "models").glob("*.yaml"))
DENOISER_SIZES = {  # in millions of parameters
    "bsr_sr": 114,
    "celeba256": 274,
    "cin256": 395,
    "ffhq256": 274,
    "inpainting_big": 387,
    "layout2img-openimages256": 246,
    "lsun_beds256": 274,
    "lsun_churches256": 295,
    "semantic_synthesis256": 215,
    "semantic_synthesis512": 215,
    "text2img256": 404,
}


@pytest.mark.parametrize("path", ORIGINAL_MODELS, ids=lambda path: path.stem)
def test_the_original_models_build(path: Path) -> None:
    node = OmegaConf.load(path).model
    if path.stem == "text2img256":
        node.params.cond_stage_config.params.tokenizer = str(GOLDEN / "bert_tiny_tokenizer")
    check_config({key: node[key] for key in ("target", "params")})
    with skip_pretrained(), uninitialised(), torch.device("meta"):
        model = instantiate_from_config({"target": node.target, "params": node.params})
    with torch.device("meta"):
        first_stage = getattr(model, "first_stage_model", model)
        images = torch.zeros(1, 3, 64, 64)
        assert first_stage.decode(latent_of(first_stage, images)).shape == images.shape
        if first_stage is not model:
            size = sum(parameter.numel() for parameter in model.model.parameters())
            assert round(size / 1e6) == DENOISER_SIZES[path.stem]
            x = torch.zeros(1, node.params.channels, 16, 16)
            assert model.apply_model(x, torch.ones(1), condition_of(model, node.params)).shape == x.shape


def latent_of(first_stage: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    encoded = first_stage.encode(images)
    if isinstance(encoded, DiagonalGaussianDistribution):
        return encoded.mode()
    return encoded[0] if isinstance(encoded, tuple) else encoded


def condition_of(model: torch.nn.Module, params: DictConfig) -> torch.Tensor | None:
    """The kind of condition that a model was trained with, encoded."""
    if params.cond_stage_key == "masked_image":  # the mask is a channel of its own
        masked = model.get_learned_conditioning(torch.zeros(1, 3, 64, 64))
        return torch.cat([masked, torch.zeros(1, 1, 16, 16)], dim=1)
    raw = {
        "segmentation": torch.zeros(1, 182, 64, 64),
        "LR_image": torch.zeros(1, 3, 16, 16),
        "coordinates_bbox": torch.zeros(1, 92, dtype=torch.long),
        "caption": ["a dog"],
        "class_label": {"class_label": torch.zeros(1, dtype=torch.long)},
    }
    if params.cond_stage_config == "__is_unconditional__":
        return None
    return model.get_learned_conditioning(raw[params.cond_stage_key])


def test_all_original_models_are_tested() -> None:
    assert len(ORIGINAL_MODELS) == 20
