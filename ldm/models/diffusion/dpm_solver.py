"""DPM-Solver++ (2M), the multistep sampler of Lu et al. 2022 (arXiv 2211.01095), algorithm 2."""

from __future__ import annotations

import math

from torch import Tensor

from ldm.models.diffusion.sampler import Sampler, SamplingRun
from ldm.models.diffusion.steps import Step, log_snr, predict_x0, solver_steps
from ldm.util import UserError


class DPMSolverSampler(Sampler):
    """DPM-Solver++ of order 2: deterministic, one model call per step; 15 to 20 steps suffice.

    Timesteps are evenly spaced from the last training timestep to the first. Between two training timesteps the log
    of the signal-to-noise ratio is interpolated, and the model is given the fractional timestep.
    """

    def schedule(self, steps: int, eta: float) -> list[Step]:
        if eta != 0.0:
            raise UserError(f"DPM-Solver++ is deterministic, but eta is {eta}; set it to 0, or use DDIM")
        return solver_steps(self.alphas, steps)

    def loop(self, x: Tensor, run: SamplingRun) -> Tensor:
        """Take steps of order 2, but of order 1 first, without history, and last, where order 1 is more stable."""
        earlier: Tensor | None = None
        earlier_width = 0.0
        for step in run.steps:
            x = run.keep_known(x, step)
            x0 = run.quantized(predict_x0(x, run.eps(x, step.t, step.alpha), step.alpha))
            width = float(log_snr(step.alpha_prev) - log_snr(step.alpha))
            mean_x0 = x0
            if earlier is not None and step.index > 0:
                mean_x0 = extrapolated(x0, earlier, earlier_width / width)
            x = exponential_step(x, mean_x0, step, width)
            earlier, earlier_width = x0, width
            run.report(x, x0, step)
        return x


def extrapolated(x0: Tensor, earlier: Tensor, ratio: float) -> Tensor:
    """Return the predicted clean latent half a step ahead; `ratio` is the width of the earlier step over this one's."""
    return x0 + (x0 - earlier) / (2.0 * ratio)


def exponential_step(x: Tensor, x0: Tensor, step: Step, width: float) -> Tensor:
    """Return the exact solution after `width` in log-SNR, if the predicted clean latent stays `x0` (equation 9)."""
    shrink = math.sqrt((1.0 - step.alpha_prev) / (1.0 - step.alpha))
    return shrink * x - math.sqrt(step.alpha_prev) * math.expm1(-width) * x0
