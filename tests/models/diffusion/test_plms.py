from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.plms import PLMSSampler
from ldm.util import UserError


def test_plms_converges_with_order_two(observed_order) -> None:
    assert observed_order(PLMSSampler) == pytest.approx(2.0, abs=0.15)


def test_only_the_first_step_calls_the_model_twice(gaussian_model) -> None:
    model = gaussian_model()
    PLMSSampler(model).sample(4, 1, (1, 4, 4))
    assert [t for _, t in model.calls] == [751.0, 501.0, 501.0, 251.0, 1.0]


def test_the_noise_is_extrapolated_from_up_to_three_earlier_steps(gaussian_model) -> None:
    """On a model that answers with given numbers, against the formulas of the paper (equation 12)."""
    model, answers = gaussian_model(), iter([0.3, -0.7, 1.1, 0.2, -0.4, 0.9, 0.5])
    model.apply_model = lambda x, t, cond: torch.full_like(x, next(answers))
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    sample, _ = PLMSSampler(model).sample(6, 1, (1, 1, 1), x_T=x)
    means = [
        (0.3 - 0.7) / 2,
        (3 * 1.1 - 0.3) / 2,
        (23 * 0.2 - 16 * 1.1 + 5 * 0.3) / 12,
        (55 * -0.4 - 59 * 0.2 + 37 * 1.1 - 9 * 0.3) / 24,
        (55 * 0.9 - 59 * -0.4 + 37 * 0.2 - 9 * 1.1) / 24,
        (55 * 0.5 - 59 * 0.9 + 37 * -0.4 - 9 * 0.2) / 24,
    ]
    for step, mean in zip(PLMSSampler(model).schedule(6, 0.0), means, strict=True):
        x0 = (x - (1 - step.alpha) ** 0.5 * mean) / step.alpha**0.5
        x = step.alpha_prev**0.5 * x0 + (1 - step.alpha_prev) ** 0.5 * mean
    torch.testing.assert_close(sample, x)


def test_eta_above_zero_is_an_error(gaussian_model) -> None:
    with pytest.raises(UserError, match="PLMS is deterministic, but eta is 0.5; set it to 0"):
        PLMSSampler(gaussian_model()).sample(4, 1, (1, 4, 4), eta=0.5, x_T=torch.zeros(1, 1, 4, 4))
