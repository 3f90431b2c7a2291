"""Names and settings of the two layouts: at full size by the manifests, with numbers by diffusers' own modules."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm import diffusers_layout as layout
from ldm import diffusers_settings as settings
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.modules.encoders.open_clip import OpenCLIPText
from ldm.weights import CheckpointError
from tests.golden_record import GOLDEN, golden_state
from tests.pipelines import UNETS, randomised, tower

diffusers = pytest.importorskip("diffusers")

FAMILIES = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base"}
ATTENTION = {
    "sd1": {"num_heads": 8, "num_head_channels": -1},
    "sd2": {"num_heads": -1, "num_head_channels": 64},
    "sdxl": {"num_heads": -1, "num_head_channels": 64},
}
# What the YAMLs of the full-size denoisers say.
UNET_PARAMS: dict[str, dict[str, Any]] = {
    "sd1": {"channel_mult": [1, 2, 4, 4], "attention_resolutions": [1, 2, 4], "context_dim": 768},
    "sd2": {
        "channel_mult": [1, 2, 4, 4],
        "attention_resolutions": [1, 2, 4],
        "context_dim": 1024,
        "use_linear_in_transformer": True,
    },
    "sdxl": {
        "channel_mult": [1, 2, 4],
        "attention_resolutions": [2, 4],
        "context_dim": 2048,
        "use_linear_in_transformer": True,
        "transformer_depth": [1, 2, 10],
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    },
}


def full(family: str) -> dict[str, Any]:
    common = {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "num_res_blocks": 2,
        "transformer_depth": 1,
        "use_spatial_transformer": True,
        "use_scale_shift_norm": False,
        "legacy": False,
    }
    return common | ATTENTION[family] | UNET_PARAMS[family]


def manifest(family: str) -> dict[str, Tensor]:
    shapes = json.loads((GOLDEN / f"{FAMILIES[family]}.state_dict.json").read_text())
    prefixes = (layout.UNET, layout.VAE, *(prefix for prefix, _ in layout.TEXT_ENCODERS[family].values()))
    return {
        name: torch.empty(shape, device="meta")
        for name, shape in shapes.items()
        if name.startswith(prefixes) and not name.endswith("position_ids")
    }


def shapes(state: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_published_models_have_the_names_and_shapes_of_diffusers(family: str) -> None:
    ours = manifest(family)
    parts = layout.to_diffusers(ours, family)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**settings.unet_settings(full(family), 64))
    assert shapes(parts["unet"]) == shapes(unet.state_dict())
    ddconfig = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "resolution": 256, "in_channels": 3}
    ddconfig |= {"out_ch": 3, "z_channels": 4, "num_groups": 32}
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(**settings.vae_settings(ddconfig, 0.18215))
    assert shapes(parts["vae"]) == shapes(vae.state_dict())
    assert shapes(layout.to_ldm(parts, family)) == shapes(ours)
    read = settings.vae_params(vae.config)
    assert read["embed_dim"] == 4 and {key: read["ddconfig"][key] for key in ddconfig} == ddconfig
    assert settings.unet_params(unet.config) == full(family)


@pytest.mark.parametrize("family", UNETS)
def test_weights_come_back_unchanged(family: str) -> None:
    unet = diffusers.UNet2DConditionModel(sample_size=8, layers_per_block=1, **UNETS[family])
    state = randomised(unet, 1).state_dict()
    ours = layout.unet_weights(state, "ldm")
    assert "input_blocks.0.0.weight" in ours and not ours.keys() & state.keys()
    back = layout.unet_weights(ours, "diffusers")
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


PROMPT = torch.tensor([[49406, 320, 1125, 49407, *([0] * 73)]])


@torch.no_grad()
def test_a_text_model_of_transformers_becomes_the_tower_of_stable_diffusion_2() -> None:
    theirs = randomised(tower("gelu", layers=2), 3)
    state = layout.clip_to_tower(theirs.state_dict())
    ours = OpenCLIPText(width=32, heads=4, layers=2).eval()
    ours.load_state_dict(state)
    output = ours.ln_final(ours(PROMPT))
    torch.testing.assert_close(output, theirs(PROMPT).last_hidden_state, rtol=0, atol=2e-5)
    bare = {name.removeprefix("text_model."): value for name, value in state.items()}
    back = layout.tower_to_clip(bare)
    back.pop("text_projection.weight")  # the identity in place of none
    own = layout.clip_weights(theirs.state_dict())
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)


@torch.no_grad()
def test_the_second_tower_of_stable_diffusion_xl() -> None:
    theirs = randomised(tower("gelu", projection=True), 4)
    ours = OpenCLIPText(width=32, heads=4, layers=3).eval()
    ours.load_state_dict(layout.clip_to_tower(theirs.state_dict()))
    expected = theirs(PROMPT, output_hidden_states=True)
    torch.testing.assert_close(ours(PROMPT, skip_last=1), expected.hidden_states[-2], rtol=0, atol=2e-5)
    pooled = ours.ln_final(ours(PROMPT))[:, 3] @ ours.text_projection
    torch.testing.assert_close(pooled, expected.text_embeds, rtol=0, atol=2e-5)


@torch.no_grad()
def test_the_recorded_tower_of_stable_diffusion_2_without_its_last_block() -> None:
    """As in its folders: transformers' model of one block less gives the recorded penultimate states."""
    from safetensors.torch import load_file

    io = load_file(GOLDEN / "sd2_tiny" / "io.safetensors")
    state = golden_state(OpenCLIPText(width=32, heads=4, layers=3), "cond_stage_model.model.")
    for skip, recorded in ((0, "last"), (1, "penultimate")):
        model = tower("gelu", layers=3 - skip).eval()
        weights = layout.tower_to_clip(state, skip_last=skip)
        weights.pop("text_projection.weight")
        inner = getattr(model, "text_model", model)
        missing, unexpected = inner.load_state_dict(weights, strict=False)
        assert not unexpected and all(name.endswith("position_ids") for name in missing)
        output = model(io["tokens"]).last_hidden_state
        torch.testing.assert_close(output, io[recorded], rtol=0, atol=2e-5)


def test_a_weight_without_a_place_is_named() -> None:
    unet = diffusers.UNet2DConditionModel(sample_size=8, layers_per_block=1, **UNETS["sd1"]).state_dict()
    with pytest.raises(CheckpointError, match="'extra.weight', which the layout of ldm has no place for"):
        layout.unet_weights(unet | {"extra.weight": torch.zeros(1)}, "ldm")


@pytest.mark.parametrize("family", UNETS)
@torch.no_grad()
def test_denoisers_of_diffusers_compute_the_same_here(family: str) -> None:
    unet = diffusers.UNet2DConditionModel(sample_size=8, layers_per_block=1, **UNETS[family])
    randomised(unet, 1)
    params = settings.unet_params(unet.config)
    lacking = params.keys() - inspect.signature(UNetModel).parameters.keys()
    if lacking:
        pytest.skip(f"UNetModel has no {', '.join(lacking)} yet")
    ours = UNetModel(image_size=8, **params).eval()
    ours.load_state_dict(layout.unet_weights(unet.state_dict(), "ldm"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 77, params["context_dim"], generator=generator)
    time = torch.tensor([3, 700])
    vector, added = {}, {}
    if "adm_in_channels" in params:
        pooled, sizes = torch.randn(2, 64, generator=generator), torch.tensor([[64, 48, 0, 4, 64, 64]] * 2)
        embedded = timestep_embedding(sizes.flatten(), 16).reshape(2, -1)
        vector = {"y": torch.cat([pooled, embedded], dim=1)}
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    expected = unet(x, time, context, **added).sample
    torch.testing.assert_close(ours(x, time, context, **vector), expected, rtol=0, atol=5e-5)
