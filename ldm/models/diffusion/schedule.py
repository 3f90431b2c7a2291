"""The noise schedule of a diffusion process, the timesteps that training draws, and their weights in the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm.util import ConfigError, check_together, check_value

SCHEDULES = ("linear", "cosine", "sqrt_linear", "sqrt")
WEIGHTINGS = ("none", "min_snr", "min_snr_plus_one")
SAMPLINGS = ("uniform", "stratified", "biased")
# Under this key a batch may hold the weights [B, H, W] of its pixels, or of its latent's cells, in the loss.
LOSS_WEIGHT = "loss_weight"


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """Return the variances of the forward process, float64 [T].

    Args:
        schedule: `linear` is linear in the square root of beta, as in LDM; `cosine` is Nichol and Dhariwal 2021,
            equation 17; `sqrt_linear` is linear in beta; `sqrt` is the square root of that.
        n_timestep: T.
        linear_start, linear_end: the first and the last beta, of all but `cosine`.
        cosine_s: the offset of `cosine`.
    Raises:
        ConfigError: the schedule is unknown.
    """
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=np.float64) ** 2
    if schedule == "cosine":
        steps = (np.arange(n_timestep + 1, dtype=np.float64) / n_timestep + cosine_s) / (1 + cosine_s)
        alphas = np.cos(steps * math.pi / 2) ** 2
        return np.clip(1 - alphas[1:] / alphas[:-1], 0.0, 0.999)
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64) ** 0.5
    raise ConfigError(f"beta_schedule '{schedule}' is unknown; use one of {', '.join(SCHEDULES)}")


def schedule_buffers(betas: np.ndarray, v_posterior: float, parameterization: str) -> dict[str, np.ndarray]:
    """Return the buffers that checkpoints hold (Ho et al. 2020), in float64, and the weights of the variational bound.

    `v_posterior` interpolates the variance of the reverse step between its lower (0) and upper (1) bound.
    """
    alphas = 1.0 - betas
    alphas_cumprod = np.cumprod(alphas)
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    variance = (1 - v_posterior) * betas * (1 - alphas_cumprod_prev) / (
        1 - alphas_cumprod
    ) + v_posterior * betas
    buffers = {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
        "log_one_minus_alphas_cumprod": np.log(1 - alphas_cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_cumprod - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - alphas_cumprod_prev) * np.sqrt(alphas) / (1 - alphas_cumprod),
    }
    return buffers | {"lvlb_weights": _vlb_weights(buffers, alphas, parameterization)}


def _vlb_weights(buffers: dict[str, np.ndarray], alphas: np.ndarray, parameterization: str) -> np.ndarray:
    """Return the weight of each timestep's squared error in the variational bound (Ho et al. 2020, equation 12)."""
    # As in the original, from the float32 buffers, to reproduce its numbers.
    betas, cumprod, variance = (
        buffers[name].astype(np.float32) for name in ("betas", "alphas_cumprod", "posterior_variance")
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = betas**2 / (2 * variance * alphas.astype(np.float32) * (1 - cumprod))
    weights[0] = weights[1]  # the first is infinite: the last reverse step has no variance
    if parameterization == "x0":
        weights = weights * cumprod / (1 - cumprod)
    elif parameterization == "v":
        weights = weights * cumprod
    return weights


class NoiseSchedule(nn.Module):
    """Base of a diffusion model: registers the schedule's buffers and computes with them.

    Timesteps are int64 [B] in [0, num_timesteps); x, noise and v share the shape [B, ...].
    """

    betas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    lvlb_weights: Tensor
    parameterization: str
    v_posterior: float

    def register_schedule(
        self,
        given_betas: Sequence[float] | np.ndarray | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Register the buffers of `given_betas` [T], or else of `make_beta_schedule`."""
        if given_betas is None:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        else:
            betas = np.asarray(given_betas, dtype=np.float64)
        self.num_timesteps = len(betas)
        for name, values in schedule_buffers(betas, self.v_posterior, self.parameterization).items():
            # The weights of the bound are not part of published checkpoints.
            self.register_buffer(
                name, torch.tensor(values, dtype=torch.float32), persistent=name != "lvlb_weights"
            )

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the noisy x_t of x_0 (Ho et al. 2020, equation 4)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return (
            at_timesteps(self.sqrt_alphas_cumprod, t, x_start) * x_start
            + at_timesteps(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise
        )

    def get_v(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (Salimans and Ho 2022, section 4)."""
        return (
            at_timesteps(self.sqrt_alphas_cumprod, t, x_start) * noise
            - at_timesteps(self.sqrt_one_minus_alphas_cumprod, t, x_start) * x_start
        )

    def training_target(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return what the network should predict: noise, x_0 or velocity."""
        if self.parameterization == "eps":
            return noise
        return x_start if self.parameterization == "x0" else self.get_v(x_start, noise, t)

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio at timesteps [B]."""
        alphas = self.alphas_cumprod[t]
        return alphas / (1 - alphas)


def at_timesteps(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Return `values[t]`, shaped to multiply `like`: [T], [B], [B, ...] -> [B, 1, ...]."""
    return values[t].to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


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
