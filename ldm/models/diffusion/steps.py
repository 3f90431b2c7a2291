"""The timesteps of a sampler, and the equations of one step between two noise levels.

A noise level is given by `alpha`, the cumulative product of (1 - beta): a latent at that level is
`sqrt(alpha) * x0 + sqrt(1 - alpha) * eps`. Levels are Python floats, computed in float64: a step never waits for the
device, and the schedule is precise for a model in half precision too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ldm.base_models import check_steps
from ldm.util import UserError


@dataclass(frozen=True)
class Step:
    """One step of a sampler, from noise level `alpha` to `alpha_prev`.

    Attributes:
        index: counts down to 0 at the last step.
        t: the timestep that the model is given; it may be a fraction.
        sigma: the standard deviation of the noise that the step adds.
    """

    index: int
    t: float
    alpha: float
    alpha_prev: float
    sigma: float = 0.0


def steps_taken(strength: float, steps: int) -> int:
    """Return how many of `steps` are taken at a strength in [0, 1]: that share of them, rounded up."""
    return min(math.ceil(round(strength * steps, 6)), steps)


def check_eta(eta: float) -> None:
    """Raise UserError unless 0 <= `eta` <= 1."""
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta is {eta}; it must lie between 0 (deterministic) and 1 (ancestral)")


def uniform_timesteps(steps: int, train_steps: int) -> list[int]:
    """Return exactly `steps` evenly spaced timesteps, increasing.

    For divisors of `train_steps` they are 1, 1 + stride, ..., as in every LDM sampler; `train_steps` of them are 0 to
    `train_steps` - 1.
    """
    stepped = [index * train_steps // steps for index in range(steps)]
    shift = min(1, train_steps - 1 - stepped[-1])
    return [t + shift for t in stepped]


def trailing_timesteps(steps: int, train_steps: int) -> list[int]:
    """Return `steps` evenly spaced timesteps, increasing to the last one (Lin et al. 2024, section 3.3)."""
    return [round((index + 1) * train_steps / steps) - 1 for index in range(steps)]


def quad_timesteps(steps: int, train_steps: int) -> list[int]:
    """Return `steps` timesteps that grow quadratically to 0.8 of the range: more of them at low noise."""
    roots = np.linspace(0.0, math.sqrt(0.8 * train_steps), steps)
    return [min(int(root**2) + 1, train_steps - 1) for root in roots]


TIMESTEPS = {"uniform": uniform_timesteps, "quad": quad_timesteps}
# A schedule whose last level is below this leaves no signal there: pure noise, where sampling begins, is that level.
NO_SIGNAL = 1e-6


def ddim_steps(alphas: np.ndarray, steps: int, eta: float = 0.0, discretize: str = "uniform") -> list[Step]:
    """Return the steps of DDIM, noisiest first, with sigma from Song et al. 2021, equation 16.

    Args:
        alphas: cumulative alphas [T], float64.
        eta: 0 is the deterministic sampler, 1 has the variance of the ancestral one.
        discretize: the spacing of timesteps, uniform or quad; uniform is `trailing_timesteps` where no signal is left
            at the last level (zero terminal SNR).
    Raises:
        UserError: `steps` is not in 1 to T, `eta` is not in [0, 1], or `discretize` is unknown.
    """
    check_steps(steps, len(alphas))
    check_eta(eta)
    if discretize not in TIMESTEPS:
        raise UserError(f'unknown timestep spacing "{discretize}"; use one of {", ".join(TIMESTEPS)}')
    spacing = TIMESTEPS[discretize]
    if spacing is uniform_timesteps and alphas[-1] < NO_SIGNAL:
        spacing = trailing_timesteps
    times = spacing(steps, len(alphas))
    levels = [float(alphas[t]) for t in times]
    # The last step ends at the cleanest level that the model was trained on, not at 1.
    previous = [float(alphas[0]), *levels[:-1]]
    visits = [
        Step(index, t, alpha, alpha_prev, ddim_sigma(alpha, alpha_prev, eta))
        for index, (t, alpha, alpha_prev) in enumerate(zip(times, levels, previous, strict=True))
    ]
    return visits[::-1]


def ddim_sigma(alpha: float, alpha_prev: float, eta: float) -> float:
    """Return the standard deviation of the noise that one DDIM step adds."""
    return eta * math.sqrt((1.0 - alpha_prev) / (1.0 - alpha) * (1.0 - alpha / alpha_prev))


def predict_x0(x: Tensor, eps: Tensor, alpha: float) -> Tensor:
    """Return the clean latent of `x` at level `alpha`, if its noise is `eps`."""
    return (x - math.sqrt(1.0 - alpha) * eps) / math.sqrt(alpha)


def diffuse(x0: Tensor, noise: Tensor, alpha: float) -> Tensor:
    """Return `x0` noised to level `alpha`."""
    return math.sqrt(alpha) * x0 + math.sqrt(1.0 - alpha) * noise


def ddim_step(x0: Tensor, eps: Tensor, step: Step) -> Tensor:
    """Return the mean of the next latent of DDIM: the predicted `x0`, noised again along `eps`."""
    direction = math.sqrt(max(1.0 - step.alpha_prev - step.sigma**2, 0.0))
    return math.sqrt(step.alpha_prev) * x0 + direction * eps


def multistep_eps(eps: Tensor, history: Sequence[Tensor]) -> Tensor:
    """Return the Adams-Bashforth mean of `eps` and up to three earlier ones (Liu et al. 2022, equation 12).

    `history` holds the earlier ones, newest last.
    """
    weights = ADAMS_BASHFORTH[min(len(history), 3)]
    earlier = reversed(history[-3:])
    return weights[0] * eps + sum(weight * old for weight, old in zip(weights[1:], earlier, strict=False))


ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def log_snr(alpha: float | np.ndarray) -> np.ndarray:
    """Return half the log of the signal-to-noise ratio, the time variable of DPM-Solver."""
    return 0.5 * (np.log(alpha) - np.log1p(-np.asarray(alpha)))


def interpolated_alpha(alphas: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Return the levels at fractional timesteps `t`, by linear interpolation of the log SNR."""
    return 1.0 / (1.0 + np.exp(-2.0 * np.interp(t, np.arange(len(alphas)), log_snr(alphas))))


def solver_steps(alphas: np.ndarray, steps: int) -> list[Step]:
    """Return `steps` steps with equal differences of timesteps, from the noisiest training level to the cleanest."""
    check_steps(steps, len(alphas))
    times = np.linspace(len(alphas) - 1, 0.0, steps + 1)
    levels = interpolated_alpha(alphas, times)
    return [
        Step(steps - 1 - index, float(times[index]), float(levels[index]), float(levels[index + 1]))
        for index in range(steps)
    ]
