"""The noise schedule of a diffusion process, and the quantities that follow from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ldm.util import ConfigError

SCHEDULES = ("linear", "cosine", "sqrt_linear", "sqrt")


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
