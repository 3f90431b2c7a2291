"""PLMS, the pseudo linear multistep sampler of Liu et al. 2022 (arXiv 2202.09778)."""

from __future__ import annotations

from torch import Tensor

from ldm.models.diffusion.sampler import Sampler, SamplingRun
from ldm.models.diffusion.steps import Step, ddim_step, ddim_steps, multistep_eps, predict_x0
from ldm.util import UserError


class PLMSSampler(Sampler):
    """PLMS: deterministic, with two model calls in the first step and one in each of the others."""

    def schedule(self, steps: int, eta: float) -> list[Step]:
        if eta != 0.0:
            raise UserError(f"PLMS is deterministic, but eta is {eta}; set it to 0, or use DDIM")
        return ddim_steps(self.alphas, steps)

    def loop(self, x: Tensor, run: SamplingRun) -> Tensor:
        """Take DDIM's step along a noise estimate that is extrapolated from the last three steps."""
        history: list[Tensor] = []
        for step in run.steps:
            x = run.keep_known(x, step)
            eps = run.eps(x, step.t, step.alpha)
            mean_eps = multistep_eps(eps, history) if history else self._two_point_eps(x, eps, step, run)
            history = [*history, eps][-3:]
            x0 = run.quantized(predict_x0(x, mean_eps, step.alpha))
            x = ddim_step(x0, mean_eps, step)
            run.report(x, x0, step)
        return x

    @staticmethod
    def _two_point_eps(x: Tensor, eps: Tensor, step: Step, run: SamplingRun) -> Tensor:
        """Return the first step's noise: the mean of that here and after a trial step (improved Euler)."""
        following = run.steps[min(1, len(run.steps) - 1)]
        trial = ddim_step(run.quantized(predict_x0(x, eps, step.alpha)), eps, step)
        return (eps + run.eps(trial, following.t, step.alpha_prev)) / 2.0
