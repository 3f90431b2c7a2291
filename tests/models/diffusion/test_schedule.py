from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ldm.models.diffusion.schedule import (
    SCHEDULES,
    WEIGHTINGS,
    NoiseSchedule,
    cell_weights,
    check_loss_options,
    loss_weights,
    make_beta_schedule,
    noise_bias,
    sample_means,
    sample_timesteps,
    schedule_buffers,
)
from ldm.util import ConfigError, UserError


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


SNR = torch.tensor([0.01, 1.0, 5.0, 100.0])


def test_weights_in_terms_of_x0_do_not_depend_on_the_parameterisation() -> None:
    for kind in ("min_snr", "min_snr_plus_one"):
        of_x0 = loss_weights(kind, 5.0, SNR, "x0")
        torch.testing.assert_close(loss_weights(kind, 5.0, SNR, "eps") * SNR, of_x0)
        torch.testing.assert_close(loss_weights(kind, 5.0, SNR, "v") * (SNR + 1), of_x0)


def test_min_snr_truncates_at_gamma() -> None:
    assert loss_weights("min_snr", 5.0, SNR, "x0").tolist() == pytest.approx([0.01, 1, 5, 5])
    assert loss_weights("min_snr", 5.0, SNR, "eps").tolist() == pytest.approx([1, 1, 1, 0.05])
    assert loss_weights("min_snr_plus_one", 5.0, SNR, "v").tolist() == pytest.approx([1, 1, 1, 6 / 101])
    assert loss_weights("none", 5.0, SNR, "v") == 1.0


def test_a_weighted_mean_counts_cells_by_the_share_of_their_pixels() -> None:
    error = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample_means(error), error.flatten(1).mean(1))
    pixels = torch.zeros(2, 4, 4)
    pixels[:, :2, :2] = 1  # the first cell
    pixels[:, 0, 2] = 1  # a quarter of the second
    cells = cell_weights(pixels, 2, 2)
    assert cells[0, 0].tolist() == [[1, 0.25], [0, 0]]
    expected = (error[:, :, 0, 0] + 0.25 * error[:, :, 0, 1]).sum(1) / (3 * 1.25)
    torch.testing.assert_close(sample_means(error, pixels), expected)
    torch.testing.assert_close(sample_means(error, cells[:, 0]), expected)
    torch.testing.assert_close(sample_means(error, torch.full((2, 4, 4), 0.1)), sample_means(error))


def test_stratified_draws_one_timestep_from_each_range() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        t = sample_timesteps("stratified", 8, 1000, torch.device("cpu"))
        assert sorted((t // 125).tolist()) == list(range(8))


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
def test_all_timesteps_are_about_equally_likely(sampling: str) -> None:
    torch.manual_seed(0)
    t = torch.cat([sample_timesteps(sampling, 4, 10, torch.device("cpu")) for _ in range(5000)])
    share = torch.bincount(t, minlength=10) / len(t)
    assert (share - 0.1).abs().max() < 0.01


def test_biased_sampling_follows_the_log_snr() -> None:
    snr = torch.logspace(2, -2, 10)
    bias = noise_bias(snr)
    assert bias[0] == 0 and bias[-1].item() == pytest.approx(1)
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    t = torch.cat([sample_timesteps("biased", 4, 10, cpu, bias=bias) for _ in range(5000)])
    share = torch.bincount(t, minlength=10) / len(t)
    torch.testing.assert_close(share, torch.arange(10) / 45, atol=0.01, rtol=0)
    late = torch.cat(
        [sample_timesteps("biased", 4, 10, cpu, span=(0.5, 0.8), bias=bias) for _ in range(5000)]
    )
    share = torch.bincount(late, minlength=10) / len(late)
    torch.testing.assert_close(share[5:8], torch.tensor([5.0, 6, 7]) / 18, atol=0.01, rtol=0)
    assert share[:5].sum() == share[8:].sum() == 0


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
def test_a_timestep_range_limits_the_draws(sampling: str) -> None:
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    t = torch.cat([sample_timesteps(sampling, 4, 1000, cpu, span=(0.5, 0.9)) for _ in range(3000)])
    assert 500 <= t.min() < 505 and 895 < t.max() < 900
    assert t.float().mean().item() == pytest.approx(699.5, abs=5)


def test_the_default_range_draws_the_same_numbers_as_randint() -> None:
    cpu = torch.device("cpu")
    torch.manual_seed(3)
    uniform, stratified = (sample_timesteps(kind, 6, 1000, cpu) for kind in ("uniform", "stratified"))
    torch.manual_seed(3)
    assert torch.equal(uniform, torch.randint(0, 1000, (6,)))
    assert torch.equal(stratified, ((torch.randperm(6) + torch.rand(6)) / 6 * 1000).long())


@pytest.mark.parametrize("span", [(0.9, 0.5), (0, 2), (0.1,), ("a", "b")])
def test_an_invalid_timestep_range_is_an_error(span) -> None:
    with pytest.raises(UserError, match=r"timestep_range(\[\d\])? is"):
        check_loss_options("none", "uniform", span)


def test_unknown_names_are_errors() -> None:
    for weighting in WEIGHTINGS:
        check_loss_options(weighting, "uniform")
    with pytest.raises(ConfigError, match="loss_weighting 'snr'.*min_snr"):
        check_loss_options("snr", "uniform")
    with pytest.raises(ConfigError, match="timestep_sampling 'even'.*stratified"):
        check_loss_options("none", "even")
