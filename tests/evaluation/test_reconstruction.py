from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.evaluation import evaluate
from ldm.evaluation.evaluate import psnr, reconstructed
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class Halving:
    """A first stage whose latents are the pictures, and whose posterior is wide."""

    device, dtype = torch.device("cpu"), torch.float32

    def encode_first_stage(self, pixels: torch.Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(torch.cat([pixels, torch.full_like(pixels, 3.0)], 1))

    def get_first_stage_encoding(self, latent: torch.Tensor) -> torch.Tensor:
        assert isinstance(latent, torch.Tensor), "a sample of the posterior would be noisy"
        return latent * 5

    def decode_first_stage(self, z: torch.Tensor) -> torch.Tensor:
        return z / 5


def test_pictures_come_back_through_the_posteriors_mode(monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "_BATCH", 2)
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "navy")]
    found = reconstructed(Halving(), pictures)
    assert [np.asarray(one).tolist() for one in found] == [np.asarray(one).tolist() for one in pictures]


def test_psnr_is_of_the_squared_error_of_each_picture() -> None:
    black = Image.new("RGB", (8, 8), (100, 100, 100))
    near, far = Image.new("RGB", (8, 8), (110, 100, 100)), Image.new("RGB", (8, 8), (125, 125, 125))
    wanted = [10 * math.log10(255**2 / (100 / 3)), 10 * math.log10(255**2 / 625)]
    mean, spread = psnr([black, black], [near, far])
    assert mean == pytest.approx(sum(wanted) / 2, abs=0.01)
    assert spread == pytest.approx((wanted[0] - wanted[1]) / 2, abs=0.01)
