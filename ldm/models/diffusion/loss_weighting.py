"""The timesteps that a training step draws, and their weights in the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ldm.util import ConfigError, check_together, check_value

WEIGHTINGS = ("none", "min_snr", "min_snr_plus_one")
SAMPLINGS = ("uniform", "stratified", "biased")
# Under this key a batch may hold the weights [B, H, W] of its pixels, or of its latent's cells, in the loss.
LOSS_WEIGHT = "loss_weight"


def check_loss_options(weighting: str, sampling: str, span: Sequence[float] = (0.0, 1.0)) -> None:
    """Raise UserError for unknown names, and for a span that is not 0 <= first < last <= 1."""
    if weighting not in WEIGHTINGS:
        raise ConfigError(f"loss_weighting '{weighting}' is unknown; use one of {', '.join(WEIGHTINGS)}")
    if sampling not in SAMPLINGS:
        raise ConfigError(f"timestep_sampling '{sampling}' is unknown; use one of {', '.join(SAMPLINGS)}")
    check_value("timestep_range", span, "timestep_range", Sequence[float])
    check_together(timestep_range=span)


def cell_weights(weight: Tensor, height: int, width: int) -> Tensor:
    """Return the weights [B, 1, height, width] of a latent's cells: the means of those of their pixels [B, H, W]."""
    return functional.adaptive_avg_pool2d(weight[:, None], (height, width))


def sample_means(error: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean [B] of each sample's error [B, C, h, w].

    With `weight` [B, H, W] it is the weighted mean, sum(error * w) / (C * sum(w)), w the weights of the cells: a sample
    counts as much as any other, however small its mask is.
    """
    if weight is None:
        return error.flatten(1).mean(dim=1)
    cells = cell_weights(weight.to(error), *error.shape[-2:])
    return (error * cells).flatten(1).sum(dim=1) / (error.shape[1] * cells.flatten(1).sum(dim=1))


def loss_weights(weighting: str, gamma: float, snr: Tensor, parameterization: str) -> Tensor | float:
    """Return the weight [B] of each sample's squared error, given its signal-to-noise ratio [B].

    `min_snr` weights the error of x_0 by min(SNR, gamma) (Hang et al. 2023, equation 5), and `min_snr_plus_one` by
    1 + min(SNR, gamma), the truncated "SNR + 1" of Salimans and Ho (2022, section 4), which does not vanish at the
    noisiest timesteps. They decide on colours and layout.
    """
    if weighting == "none":
        return 1.0
    of_x0 = snr.clamp(max=gamma) + (1.0 if weighting == "min_snr_plus_one" else 0.0)
    natural = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[parameterization]
    return of_x0 / natural


def noise_bias(snr: Tensor) -> Tensor:
    """Return cumulative probabilities [T] of timesteps, of which noisier ones are more probable.

    The probability is proportional to the largest log SNR minus that of the timestep, as in TextBoost (Park et al.
    2024, arXiv 2409.08248): a word affects the image most while there is much noise.
    """
    share = snr.log().max() - snr.log()
    return (share / share.sum()).cumsum(0)


def sample_timesteps(
    sampling: str,
    count: int,
    num_timesteps: int,
    device: torch.device,
    *,
    span: Sequence[float] = (0.0, 1.0),
    bias: Tensor | None = None,
) -> Tensor:
    """Return random timesteps, int64 [count].

    Args:
        sampling: `uniform` draws each independently; `stratified` draws one from each of `count` equal ranges, which
            has the same expectation with less variance; `biased` draws like `stratified`, but from `bias`.
        span: the part of the schedule to draw from, as fractions. ZOODiP (Seo et al., CVPR 2025) learns subjects from
            [0.5, 0.9], and finds that the less noisy half alone does not suffice.
        bias: cumulative probabilities [num_timesteps], see `noise_bias`.
    """
    first, last = int(span[0] * num_timesteps), max(int(span[1] * num_timesteps), 1)
    if sampling == "uniform":
        return torch.randint(first, last, (count,), device=device)
    places = (torch.randperm(count, device=device) + torch.rand(count, device=device)) / count
    if sampling == "biased" and bias is not None:
        below = bias[first - 1] if first else torch.zeros((), device=device)
        places = below + places * (bias[last - 1] - below)
        return torch.searchsorted(bias, places.to(bias.dtype)).clamp(first, last - 1)
    return (first + places * (last - first)).long().clamp(max=last - 1)
