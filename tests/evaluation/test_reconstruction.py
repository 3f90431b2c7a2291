from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ldm.evaluation import reconstruction
from ldm.evaluation.reconstruction import reconstructed
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
    monkeypatch.setattr(reconstruction, "_BATCH", 2)
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "navy")]
    found = reconstructed(Halving(), pictures)
    assert [np.asarray(one).tolist() for one in found] == [np.asarray(one).tolist() for one in pictures]
