"""Settings of diffusers' folders: what they mean here, and what is named because it cannot be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ldm import diffusers_settings as settings
from ldm.models.diffusion.schedule import make_beta_schedule
from ldm.weights import CheckpointError
from tests.pipelines import UNETS

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.02},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
        {"trained_betas": np.linspace(0.001, 0.02, 1000).tolist()},
    ],
)
def test_noise_schedules_are_those_of_diffusers(options) -> None:
    usual = {"beta_start": 0.00085, "beta_end": 0.012}
    scheduler = diffusers.EulerDiscreteScheduler(**usual | options)
    params = settings.schedule_params(scheduler.config)
    betas = params["given_betas"]
    if betas is None:
        betas = make_beta_schedule(
            params["beta_schedule"], params["timesteps"], params["linear_start"], params["linear_end"]
        )
    kept = torch.tensor(np.cumprod(1 - np.asarray(betas)))
    torch.testing.assert_close(kept.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_what_cannot_be_read_is_named() -> None:
    usual: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "layers_per_block": 1} | UNETS["sd1"]
    for change, message in (
        ({"act_fn": "gelu"}, "the unet's act_fn is 'gelu'"),
        ({"class_embed_type": "projection"}, "class_embed_type is 'projection'"),
        ({"block_out_channels": (32, 48)}, "no multiples of the first"),
        ({"layers_per_block": (1, 2)}, "layers_per_block differ per level"),
        (
            {"attention_head_dim": (4, 4, 2), "block_out_channels": (32, 64, 64)},
            "neither equal in number nor in width",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            settings.unet_params(usual | change)
    with pytest.raises(CheckpointError, match="AsymmetricAutoencoderKL"):
        settings.vae_params({"_class_name": "AsymmetricAutoencoderKL"})
    with pytest.raises(CheckpointError, match="beta_schedule is 'sigmoid'"):
        settings.schedule_params({"beta_schedule": "sigmoid"})
