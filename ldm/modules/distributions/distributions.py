"""The diagonal Gaussian that a KL first stage predicts."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


class DiagonalGaussianDistribution:
    """A Gaussian given by its moments [B, 2C, H, W]: the mean, then the log variance, which is clamped to [-30, 20]."""

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters
        self.mean, logvar = rearrange(parameters, "b (moment c) h w -> moment b c h w", moment=2)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return self.std**2

    def sample(self) -> Tensor:
        """Return a random sample, [B, C, H, W]."""
        return self.mean + self.std * torch.randn_like(self.mean)

    def mode(self) -> Tensor:
        """Return the mean, [B, C, H, W]."""
        return self.mean

    def kl(self) -> Tensor:
        """Return the KL divergence [B] to the standard normal distribution in nats, summed over each sample."""
        terms = self.mean**2 + self.var - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(dim=1)
