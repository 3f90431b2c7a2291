"""PLMS, the pseudo linear multistep sampler of Liu et al. 2022 (arXiv 2202.09778)."""

from __future__ import annotations

from torch import Tensor

from ldm.models.diffusion.sampler import Sampler, SamplingRun
from ldm.models.diffusion.steps import Step, ddim_step, ddim_steps, multistep_eps, predict_x0
from ldm.util import UserError


class PLMSSampler(Sampler):
    """PLMS: deterministic, one model call per step after the first, which takes two."""

    def schedule(self, steps: int, eta: float) -> list[Step]:
        if eta != 0.0:
            raise UserError(
                f"PLMS is deterministic: eta must be 0, not {eta}; use DDIM for a stochastic sampler"
            )
        return ddim_steps(self.alphas, steps)

    def loop(self, x: Tensor, run: SamplingRun) -> Tensor:
        """DDIM's transfer along a noise estimate extrapolated from the last three steps."""
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
        """The start has no history: the mean of the noise here and at the end of a trial step (improved Euler)."""
        following = run.steps[min(1, len(run.steps) - 1)]
        trial = ddim_step(run.quantized(predict_x0(x, eps, step.alpha)), eps, step)
        return (eps + run.eps(trial, following.t, step.alpha_prev)) / 2.0
