from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.util import UserError


def test_dpm_solver_converges_with_order_two(observed_order) -> None:
    assert observed_order(DPMSolverSampler) == pytest.approx(2.0, abs=0.15)


def test_twenty_steps_are_closer_to_the_solution_than_with_ddim(gaussian_model) -> None:
    x_T = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = {}
    for sampler_class in (DDIMSampler, DPMSolverSampler):
        model = gaussian_model()
        sampler = sampler_class(model)
        visits = sampler.schedule(20, 0.0)
        samples, _ = sampler.sample(20, 4, (1, 4, 4), x_T=x_T)
        exact = model.flow(x_T, visits[0].alpha, visits[-1].alpha_prev)
        errors[sampler_class] = (samples - exact).abs().max()
    assert errors[DPMSolverSampler] < 0.7 * errors[DDIMSampler]


def test_the_model_is_called_once_per_step_at_fractional_times(gaussian_model) -> None:
    model = gaussian_model()
    DPMSolverSampler(model).sample(4, 1, (1, 4, 4))
    assert [t for _, t in model.calls] == [999.0, 749.25, 499.5, 249.75]


def test_eta_above_zero_is_an_error(gaussian_model) -> None:
    with pytest.raises(UserError, match=r"DPM-Solver\+\+ is deterministic, but eta is 1.0; set it to 0"):
        DPMSolverSampler(gaussian_model()).sample(4, 1, (1, 4, 4), eta=1.0)
