from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.weighting import SAMPLINGS, WEIGHTINGS, check, loss_weights, sample_timesteps
from ldm.util import ConfigError

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


def test_stratified_draws_one_timestep_from_each_range() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        t = sample_timesteps("stratified", 8, 1000, torch.device("cpu"))
        assert sorted((t // 125).tolist()) == list(range(8))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_all_timesteps_are_about_equally_likely(sampling: str) -> None:
    torch.manual_seed(0)
    t = torch.cat([sample_timesteps(sampling, 4, 10, torch.device("cpu")) for _ in range(5000)])
    share = torch.bincount(t, minlength=10) / len(t)
    assert (share - 0.1).abs().max() < 0.01


def test_unknown_names() -> None:
    for weighting in WEIGHTINGS:
        check(weighting, "uniform")
    with pytest.raises(ConfigError, match="loss_weighting 'snr'.*min_snr"):
        check("snr", "uniform")
    with pytest.raises(ConfigError, match="timestep_sampling 'even'.*stratified"):
        check("none", "even")
