"""Which timesteps a sampler visits, and the maths of one step between two noise levels.

A noise level is written by `alpha`, the cumulative product of (1 - beta): a latent at that level is
`sqrt(alpha) * x0 + sqrt(1 - alpha) * eps`. Levels are python floats taken in float64, so that a step
never waits for the device and a model in half precision still has a precise schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ldm.util import UserError


@dataclass(frozen=True)
class Step:
    """From level `alpha`, at timestep `t` (a fraction between two training steps is possible), to `alpha_prev`.

    `sigma` is the standard deviation of the noise added on the way; `index` counts down to 0.
    """

    index: int
    t: float
    alpha: float
    alpha_prev: float
    sigma: float = 0.0


def check_steps(steps: int, train_steps: int | None = None) -> None:
    """Raise UserError unless `steps` sampling steps fit a model of `train_steps` timesteps, if it is known."""
    if steps < 1:
        raise UserError(f"the number of sampling steps is {steps}; it must be at least 1")
    if train_steps is not None and steps > train_steps:
        raise UserError(
            f"{steps} sampling steps are more than the model's {train_steps} timesteps; ask for fewer"
        )


def check_eta(eta: float) -> None:
    """Raise UserError unless `eta` is a share of the ancestral sampler's noise."""
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta is {eta}; it must lie between 0 (deterministic) and 1 (ancestral)")


def uniform_timesteps(steps: int, train_steps: int) -> list[int]:
    """Exactly `steps` evenly spaced timesteps, increasing.

    For divisors of `train_steps` they are 1, 1 + stride, ..., as in every LDM sampler; all of the
    timesteps, asked for, are 0 ... `train_steps` - 1.
    """
    stepped = [index * train_steps // steps for index in range(steps)]
    shift = min(1, train_steps - 1 - stepped[-1])
    return [t + shift for t in stepped]


def quad_timesteps(steps: int, train_steps: int) -> list[int]:
    """`steps` timesteps growing quadratically to 0.8 of the range: more of them at low noise."""
    roots = np.linspace(0.0, math.sqrt(0.8 * train_steps), steps)
    return [min(int(root**2) + 1, train_steps - 1) for root in roots]


TIMESTEPS = {"uniform": uniform_timesteps, "quad": quad_timesteps}


def ddim_steps(alphas: np.ndarray, steps: int, eta: float = 0.0, discretize: str = "uniform") -> list[Step]:
    """The visits of DDIM from the noisiest to the cleanest; sigma as in DDIM (Song et al. 2021), equation 16.

    Args:
        alphas: [T] cumulative alphas, float64.
        eta: 0 is the deterministic sampler, 1 has the variance of the ancestral one.
    Raises:
        UserError: no step, more steps than T, an eta outside [0, 1], or an unknown `discretize`.
    """
    check_steps(steps, len(alphas))
    check_eta(eta)
    if discretize not in TIMESTEPS:
        raise UserError(f'unknown timestep spacing "{discretize}"; choose one of {", ".join(TIMESTEPS)}')
    times = TIMESTEPS[discretize](steps, len(alphas))
    levels = [float(alphas[t]) for t in times]
    # the last step ends at the cleanest level that the model was trained on, not at 1
    previous = [float(alphas[0]), *levels[:-1]]
    visits = [
        Step(index, t, alpha, alpha_prev, ddim_sigma(alpha, alpha_prev, eta))
        for index, (t, alpha, alpha_prev) in enumerate(zip(times, levels, previous, strict=True))
    ]
    return visits[::-1]


def ddim_sigma(alpha: float, alpha_prev: float, eta: float) -> float:
    """Standard deviation of the noise that one DDIM step adds."""
    return eta * math.sqrt((1.0 - alpha_prev) / (1.0 - alpha) * (1.0 - alpha / alpha_prev))


def predict_x0(x: Tensor, eps: Tensor, alpha: float) -> Tensor:
    """The clean latent that `x` at level `alpha` holds if its noise is `eps`."""
    return (x - math.sqrt(1.0 - alpha) * eps) / math.sqrt(alpha)


def diffuse(x0: Tensor, noise: Tensor, alpha: float) -> Tensor:
    """`x0` noised to level `alpha`."""
    return math.sqrt(alpha) * x0 + math.sqrt(1.0 - alpha) * noise


def ddim_step(x0: Tensor, eps: Tensor, step: Step) -> Tensor:
    """The mean of DDIM's next latent: the predicted `x0`, noised again along `eps`."""
    direction = math.sqrt(max(1.0 - step.alpha_prev - step.sigma**2, 0.0))
    return math.sqrt(step.alpha_prev) * x0 + direction * eps


def multistep_eps(eps: Tensor, history: Sequence[Tensor]) -> Tensor:
    """Adams-Bashforth mean of `eps` and up to three earlier ones, newest last (Liu et al. 2022, equation 12)."""
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
    """Half of the log of the signal-to-noise ratio: the natural time of a diffusion ODE."""
    return 0.5 * (np.log(alpha) - np.log1p(-np.asarray(alpha)))


def interpolated_alpha(alphas: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Levels at fractional timesteps `t`, the log of the signal-to-noise ratio interpolated linearly."""
    return 1.0 / (1.0 + np.exp(-2.0 * np.interp(t, np.arange(len(alphas)), log_snr(alphas))))


def solver_steps(alphas: np.ndarray, steps: int) -> list[Step]:
    """`steps` equal stretches of time from the noisiest training level to the cleanest."""
    check_steps(steps, len(alphas))
    times = np.linspace(len(alphas) - 1, 0.0, steps + 1)
    levels = interpolated_alpha(alphas, times)
    return [
        Step(steps - 1 - index, float(times[index]), float(levels[index]), float(levels[index + 1]))
        for index in range(steps)
    ]
