from __future__ import annotations

import torch
from torch.distributions import Normal, kl_divergence

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


def gaussian(seed: int) -> tuple[DiagonalGaussianDistribution, Normal]:
    moments = torch.randn(3, 8, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean, logvar = moments.chunk(2, 1)
    return DiagonalGaussianDistribution(moments), Normal(mean, (0.5 * logvar).exp())


def test_kl_agrees_with_torch() -> None:
    ours, theirs = gaussian(0)
    standard = Normal(torch.zeros(()).double(), torch.ones(()).double())
    torch.testing.assert_close(ours.kl(), kl_divergence(theirs, standard).flatten(1).sum(1))


def test_samples_have_the_moments() -> None:
    ours, _ = gaussian(2)
    torch.manual_seed(0)
    draws = torch.stack([ours.sample() for _ in range(4000)])
    torch.testing.assert_close(draws.mean(0), ours.mean, atol=0.2, rtol=0.1)
    torch.testing.assert_close(draws.std(0), ours.std, atol=0.05, rtol=0.1)


def test_the_mode_is_the_mean() -> None:
    ours, theirs = gaussian(3)
    assert torch.equal(ours.mode(), theirs.mean)


def test_extreme_log_variances_are_clamped() -> None:
    wild = DiagonalGaussianDistribution(torch.tensor([0.0, 1e6]).reshape(1, 2, 1, 1))
    assert wild.var.isfinite().all()
