"""diffusers' and transformers' models give the same output from the same checkpoint (dev extra)."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from tests.golden_record import Golden

diffusers = pytest.importorskip("diffusers")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")

CASE = Golden("clip_one_vector")


@pytest.fixture(scope="module")
def model():
    return CASE.model()


@pytest.fixture(scope="module")
def state(model) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if not k.startswith("embedding_manager.")}


@pytest.fixture(scope="module")
def config() -> dict:
    return {"model": OmegaConf.to_container(CASE.config())}


@torch.no_grad()
def test_unet(model, state, config) -> None:
    unet_config = single_file.create_unet_diffusers_config_from_ldm(config, state, image_size=64)
    theirs = diffusers.UNet2DConditionModel(**unet_config).eval()
    theirs.load_state_dict(single_file.convert_ldm_unet_checkpoint(state, unet_config))
    io = CASE.io
    output = theirs(io["unet_x"], io["unet_t"], io["conditioning"]).sample
    torch.testing.assert_close(
        model.apply_model(io["unet_x"], io["unet_t"], io["conditioning"]), output, rtol=0, atol=2e-5
    )


@torch.no_grad()
def test_first_stage(model, state, config) -> None:
    vae_config = single_file.create_vae_diffusers_config_from_ldm(config, state, image_size=64)
    theirs = diffusers.AutoencoderKL(**vae_config).eval()
    theirs.load_state_dict(single_file.convert_ldm_vae_checkpoint(state, vae_config))
    image = CASE.io["image"]
    posterior = theirs.encode(image).latent_dist
    ours = model.encode_first_stage(image)
    torch.testing.assert_close(ours.mean, posterior.mean, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.logvar, posterior.logvar, rtol=0, atol=2e-5)
    latent = ours.mode()
    torch.testing.assert_close(
        model.decode_first_stage(model.scale_factor * latent), theirs.decode(latent).sample, rtol=0, atol=2e-5
    )


@torch.no_grad()
def test_text_encoder(model, state) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    theirs = CLIPTextModel(
        CLIPTextConfig.from_pretrained(CASE.config().params.cond_stage_config.params.version)
    ).eval()
    names = theirs.state_dict().keys()
    prefix = "cond_stage_model.transformer."
    if not any(name.startswith("text_model.") for name in names):
        prefix += "text_model."
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    missing, unexpected = theirs.load_state_dict(own, strict=False)
    assert not unexpected and all(name.endswith("position_ids") for name in missing)
    prompts = CASE.meta["prompts"]
    output = theirs(input_ids=CASE.io["tokens"]).last_hidden_state
    torch.testing.assert_close(model.cond_stage_model.encode(prompts), output, rtol=0, atol=2e-5)
    torch.testing.assert_close(CASE.io["conditioning_plain"], output, rtol=0, atol=2e-5)
