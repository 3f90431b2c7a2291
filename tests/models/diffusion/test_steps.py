from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.models.diffusion.steps import (
    ADAMS_BASHFORTH,
    ddim_step,
    ddim_steps,
    diffuse,
    interpolated_alpha,
    log_snr,
    multistep_eps,
    predict_x0,
    quad_timesteps,
    solver_steps,
    uniform_timesteps,
)
from ldm.util import UserError

ALPHAS = np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


@pytest.mark.parametrize("steps", [1, 10, 20, 50, 200, 250, 500])
def test_divisors_have_the_timesteps_of_the_original(steps: int) -> None:
    assert uniform_timesteps(steps, 1000) == [t + 1 for t in range(0, 1000, 1000 // steps)]


@pytest.mark.parametrize("steps", [3, 7, 30, 60, 300, 999, 1000])
@pytest.mark.parametrize("spacing", [uniform_timesteps, quad_timesteps])
def test_any_number_of_steps_is_kept_and_inside_the_schedule(steps: int, spacing) -> None:
    times = spacing(steps, 1000)
    assert len(times) == steps
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= 999


@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_without_signal_at_the_end_sampling_begins_there(steps: int) -> None:
    """As diffusers' trailing spacing; other schedules begin where the original does."""
    times = [int(step.t) for step in ddim_steps(np.linspace(0.999, 1e-8, 1000), steps)]
    assert times == [round(1000 - i * 1000 / steps) - 1 for i in range(steps)] and times[0] == 999
    usual = ddim_steps(np.linspace(0.999, 0.005, 1000), steps)
    assert [step.t for step in usual] == uniform_timesteps(steps, 1000)[::-1]


def test_uniform_timesteps_are_never_visited_twice() -> None:
    assert all(len(set(uniform_timesteps(steps, 97))) == steps for steps in range(1, 98))


def test_ddim_steps_form_a_chain_down_to_the_cleanest_level() -> None:
    steps = ddim_steps(ALPHAS, 10)
    assert [step.t for step in steps] == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert [step.alpha_prev for step in steps[:-1]] == [step.alpha for step in steps[1:]]
    assert steps[-1].alpha_prev == ALPHAS[0]
    assert [step.index for step in steps] == list(range(9, -1, -1))
    assert all(step.sigma == 0.0 for step in steps)


def test_eta_one_has_the_variance_of_the_posterior() -> None:
    betas = 1.0 - ALPHAS[1:] / ALPHAS[:-1]
    posterior = betas * (1.0 - ALPHAS[:-1]) / (1.0 - ALPHAS[1:])
    sigmas = [step.sigma for step in ddim_steps(ALPHAS, 1000, eta=1.0)][::-1]
    np.testing.assert_allclose(np.square(sigmas[1:]), posterior)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "sampling steps is 0; it must be at least 1"),
        ({"steps": -5}, "sampling steps is -5"),
        ({"steps": 1001}, "1001 sampling steps are more than the model's 1000"),
        ({"steps": 5, "eta": 1.5}, "eta is 1.5"),
        ({"steps": 5, "eta": -0.1}, "eta is -0.1"),
        (
            {"steps": 5, "discretize": "cubic"},
            'unknown timestep spacing "cubic"; use one of uniform, quad',
        ),
    ],
)
def test_impossible_schedules_are_errors(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ddim_steps(ALPHAS, **arguments)


def test_predict_x0_undoes_diffuse_and_a_step_is_the_same_noising() -> None:
    x0, eps = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    step = ddim_steps(ALPHAS, 10)[3]
    x = diffuse(x0, eps, step.alpha)
    torch.testing.assert_close(predict_x0(x, eps, step.alpha), x0)
    torch.testing.assert_close(ddim_step(x0, eps, step), diffuse(x0, eps, step.alpha_prev))


def test_multistep_weights_integrate_polynomials() -> None:
    """With n earlier values Adams-Bashforth is exact for the mean over the next step of a polynomial of degree n."""
    for degree, weights in enumerate(ADAMS_BASHFORTH):
        assert len(weights) == degree + 1
        values = [torch.tensor((-float(k)) ** degree, dtype=torch.float64) for k in range(degree, -1, -1)]
        exact = torch.tensor(1.0 / (degree + 1), dtype=torch.float64)  # the mean of s^degree over [0, 1]
        torch.testing.assert_close(multistep_eps(values[-1], values[:-1]), exact)


def test_interpolated_levels_pass_through_the_schedule() -> None:
    np.testing.assert_allclose(interpolated_alpha(ALPHAS, np.arange(1000.0)), ALPHAS)
    halfway = log_snr(interpolated_alpha(ALPHAS, np.array([500.5])))
    np.testing.assert_allclose(halfway, (log_snr(ALPHAS[500]) + log_snr(ALPHAS[501])) / 2)


def test_solver_steps_span_the_schedule() -> None:
    steps = solver_steps(ALPHAS, 20)
    assert len(steps) == 20 and steps[0].t == 999 and steps[-1].index == 0
    np.testing.assert_allclose([steps[0].alpha, steps[-1].alpha_prev], [ALPHAS[-1], ALPHAS[0]])
