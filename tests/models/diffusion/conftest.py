"""A model whose diffusion ODE has a solution in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor


class GaussianModel:
    """The perfect denoiser of data that are N(mean, deviation^2) in every element; `cond` shifts the mean.

    At level alpha a latent is N(sqrt(alpha) mean, alpha deviation^2 + 1 - alpha), and the ODE moves it so that its
    standard score never changes.
    """

    def __init__(self, parameterization: str = "eps", timesteps: int = 1000, floor: float = 0.0) -> None:
        self.parameterization = parameterization
        self.num_timesteps = timesteps
        # the SD v1 schedule, refined so that more timesteps are the same curve
        rates = torch.linspace(0.00085**0.5, 0.012**0.5, timesteps, dtype=torch.float64) ** 2
        self.alphas_cumprod = torch.exp(torch.cumsum(-rates * (1000 / timesteps), 0) - floor)
        self.mean = 0.3
        self.deviation = 0.5
        self.calls: list[tuple[int, float]] = []

    def alpha_at(self, t: float) -> float:
        alphas = self.alphas_cumprod.numpy()
        logits = np.log(alphas) - np.log1p(-alphas)
        return 1.0 / (1.0 + math.exp(-np.interp(t, np.arange(len(alphas)), logits)))

    def variance(self, alpha: float) -> float:
        return alpha * self.deviation**2 + 1.0 - alpha

    def apply_model(self, x: Tensor, t: Tensor, cond: Tensor | list | dict | None) -> Tensor:
        self.calls.append((len(x), float(t[0])))
        while isinstance(cond, (list, dict)):
            cond = cond["c_crossattn"] if isinstance(cond, dict) else cond[0]
        mean = self.mean if cond is None else self.mean + cond.reshape(-1, 1, 1, 1)
        alpha = self.alpha_at(float(t[0]))
        eps = math.sqrt(1.0 - alpha) * (x - math.sqrt(alpha) * mean) / self.variance(alpha)
        x0 = (x - math.sqrt(1.0 - alpha) * eps) / math.sqrt(alpha)
        return {"eps": eps, "x0": x0, "v": math.sqrt(alpha) * eps - math.sqrt(1.0 - alpha) * x0}[
            self.parameterization
        ]

    def flow(self, x: Tensor, start: float, end: float) -> Tensor:
        """The exact solution at level `end` of the ODE that is at `x` at level `start`."""
        score = (x - math.sqrt(start) * self.mean) / math.sqrt(self.variance(start))
        return math.sqrt(end) * self.mean + math.sqrt(self.variance(end)) * score


@pytest.fixture
def gaussian_model() -> type[GaussianModel]:
    return GaussianModel


@pytest.fixture
def observed_order():
    """Order of convergence of a sampler on the Gaussian, from errors at 40 and 160 steps."""

    def measure(sampler_class: type) -> float:
        # `floor` keeps clear of level 1, where the square root of the noise level is not smooth
        model = GaussianModel(timesteps=64000, floor=0.1)
        x_T = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        errors = []
        for steps in (40, 160):
            sampler = sampler_class(model)
            visits = sampler.schedule(steps, 0.0)
            samples, _ = sampler.sample(steps, 2, (1, 4, 4), x_T=x_T)
            exact = model.flow(x_T, visits[0].alpha, visits[-1].alpha_prev)
            errors.append((samples - exact).abs().max().item())
        return math.log(errors[0] / errors[1]) / math.log(4)

    return measure
