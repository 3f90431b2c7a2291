from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.loss_weighting import (
    WEIGHTINGS,
    cell_weights,
    check_loss_options,
    loss_weights,
    noise_bias,
    sample_means,
    sample_timesteps,
)
from ldm.util import ConfigError, UserError

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
