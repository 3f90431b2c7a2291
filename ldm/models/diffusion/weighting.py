"""Which timesteps a training step sees, and how much each counts."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.util import ConfigError

WEIGHTINGS = ("none", "min_snr", "min_snr_plus_one")
SAMPLINGS = ("uniform", "stratified")


def check(weighting: str, sampling: str) -> None:
    """Raise ConfigError for names that do not exist."""
    if weighting not in WEIGHTINGS:
        raise ConfigError(f"loss_weighting '{weighting}' is unknown; use one of {', '.join(WEIGHTINGS)}")
    if sampling not in SAMPLINGS:
        raise ConfigError(f"timestep_sampling '{sampling}' is unknown; use one of {', '.join(SAMPLINGS)}")


def loss_weights(weighting: str, gamma: float, snr: Tensor, parameterization: str) -> Tensor | float:
    """Weight [B] of each sample's squared error, given its signal-to-noise ratio [B].

    In terms of the error of x_0, `min_snr` weighs by min(SNR, gamma) (Hang et al. 2023, equation 5) and
    `min_snr_plus_one` by 1 + min(SNR, gamma): Salimans and Ho's "SNR + 1" (2022, section 4), truncated. The second
    keeps the noisiest timesteps, which decide on colours and layout.
    """
    if weighting == "none":
        return 1.0
    of_x0 = snr.clamp(max=gamma) + (1.0 if weighting == "min_snr_plus_one" else 0.0)
    natural = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[parameterization]
    return of_x0 / natural


def sample_timesteps(sampling: str, count: int, num_timesteps: int, device: torch.device) -> Tensor:
    """Random timesteps, int64 [count]; `stratified` draws one from each of `count` equal ranges."""
    if sampling == "uniform":
        return torch.randint(0, num_timesteps, (count,), device=device)
    ranges = torch.randperm(count, device=device) + torch.rand(count, device=device)
    return (ranges / count * num_timesteps).long().clamp(max=num_timesteps - 1)
