from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ldm.models.diffusion.schedule import SCHEDULES, NoiseSchedule, make_beta_schedule, schedule_buffers
from ldm.util import ConfigError


class Process(NoiseSchedule):
    def __init__(self, parameterization: str = "eps", **schedule) -> None:
        nn.Module.__init__(self)
        self.parameterization, self.v_posterior = parameterization, 0.0
        self.register_schedule(**schedule)
        self.double()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_destroy_the_signal_step_by_step(schedule: str) -> None:
    betas = make_beta_schedule(schedule, 1000, 0.00085, 0.012)
    assert betas.shape == (1000,) and betas.dtype == np.float64
    assert (betas > 0).all() and (betas < 1).all() and (np.diff(betas) >= 0).all()
    assert np.cumprod(1 - betas)[-1] < 0.05


def test_linear_is_linear_in_the_square_root() -> None:
    roots = np.sqrt(make_beta_schedule("linear", 11, 0.01, 0.04))
    np.testing.assert_allclose(np.diff(roots), 0.01)
    np.testing.assert_allclose(np.diff(make_beta_schedule("sqrt_linear", 11, 0.01, 0.04)), 0.003)


def test_cosine_follows_its_formula() -> None:
    betas = make_beta_schedule("cosine", 100)
    at = lambda t: np.cos((t / 100 + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
    np.testing.assert_allclose(np.cumprod(1 - betas)[49], at(50) / at(0), rtol=1e-9)


def test_an_unknown_schedule_is_an_error() -> None:
    with pytest.raises(ConfigError, match="beta_schedule 'cubic'.*linear"):
        make_beta_schedule("cubic", 10)


def test_given_betas_take_precedence() -> None:
    process = Process(given_betas=[0.1, 0.2, 0.3], timesteps=1000)
    assert process.num_timesteps == 3
    torch.testing.assert_close(
        process.alphas_cumprod, torch.tensor([0.9, 0.72, 0.504]).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_noisy_sample_and_target_determine_the_start(parameterization: str) -> None:
    process = Process(parameterization, linear_start=0.00085, linear_end=0.012)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 10, 500, 900, 999])
    x_t = process.q_sample(x0, t, noise)
    target = process.training_target(x0, t, noise)
    alpha = process.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    start = {
        "eps": (x_t - (1 - alpha).sqrt() * target) / alpha.sqrt(),
        "x0": target,
        "v": alpha.sqrt() * x_t - (1 - alpha).sqrt() * target,
    }[parameterization]
    torch.testing.assert_close(start, x0, rtol=1e-4, atol=1e-4)


def test_posterior_agrees_with_bayes() -> None:
    """Mean and variance of x_{t-1} given x_t and x_0, from the product of the two Gaussians."""
    betas = make_beta_schedule("linear", 1000, 0.00085, 0.012)
    buffers = schedule_buffers(betas, 0.0, "eps")
    t = 300
    prior_mean = np.sqrt(np.prod(1 - betas[:t]))
    prior_var = 1 - np.prod(1 - betas[:t])
    precision = 1 / prior_var + (1 - betas[t]) / betas[t]
    np.testing.assert_allclose(buffers["posterior_variance"][t], 1 / precision, rtol=1e-6)
    np.testing.assert_allclose(
        buffers["posterior_mean_coef1"][t], prior_mean / prior_var / precision, rtol=1e-6
    )
    np.testing.assert_allclose(
        buffers["posterior_mean_coef2"][t], np.sqrt(1 - betas[t]) / betas[t] / precision, rtol=1e-6
    )


def test_vlb_weights_measure_the_same_error_in_every_parameterization() -> None:
    """eps, x0 and v errors of one mistake differ by factors of the schedule; their weighted squares agree."""
    betas = make_beta_schedule("linear", 1000, 0.00085, 0.012)
    weights = {p: schedule_buffers(betas, 0.0, p)["lvlb_weights"][1:] for p in ("eps", "x0", "v")}
    alphas = np.cumprod(1 - betas)[1:]
    x0_error = 1.0
    eps_error = x0_error * np.sqrt(alphas / (1 - alphas))
    v_error = x0_error / np.sqrt(1 - alphas)
    np.testing.assert_allclose(weights["x0"] * x0_error**2, weights["eps"] * eps_error**2, rtol=1e-3)
    np.testing.assert_allclose(weights["v"] * v_error**2, weights["eps"] * eps_error**2, rtol=1e-3)
