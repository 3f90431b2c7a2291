"""The diagonal Gaussian that a KL first stage predicts."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


class DiagonalGaussianDistribution:
    """A Gaussian given by its moments [B, 2C, H, W]: the mean, then the log variance, which is clamped to [-30, 20].

    If `deterministic`, its standard deviation is zero and `sample` returns the mean.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.mean, logvar = rearrange(parameters, "b (moment c) h w -> moment b c h w", moment=2)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.deterministic = deterministic

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return self.std**2

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return a sample [B, C, H, W]; `generator` is on the CPU, so that a seed gives the same on every device."""
        if generator is None:
            noise = torch.randn_like(self.mean)
        else:
            noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype).to(
                self.mean.device
            )
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """Return the mean, [B, C, H, W]."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Return the KL divergence [B] in nats, summed over each sample, to `other` or to the standard normal."""
        if self.deterministic:
            return self.mean.new_zeros(self.mean.shape[0])
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            terms = (
                (self.mean - other.mean) ** 2 / other.var
                + self.var / other.var
                - 1.0
                - self.logvar
                + other.logvar
            )
        return 0.5 * terms.flatten(1).sum(dim=1)
