"""DDIM, the sampler of Song et al. 2021 (arXiv 2010.02502)."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.models.diffusion.conditioning import Condition
from ldm.models.diffusion.sampler import Generators, GuidedEps, Sampler, SamplingRun, gaussian
from ldm.models.diffusion.steps import Step, ddim_step, ddim_steps, diffuse, predict_x0
from ldm.util import UserError


class DDIMSampler(Sampler):
    """DDIM: deterministic with eta 0, ancestral with eta 1; `decode` starts from a noised latent."""

    steps: list[Step] | None = None  # of `decode` and `stochastic_encode`

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = False,
    ) -> None:
        """Set the steps that `stochastic_encode` and `decode` use.

        Args:
            ddim_discretize: uniform or quad; see `ddim_steps`.
            verbose: not used.
        Raises:
            UserError: see `ddim_steps`.
        """
        self.steps = ddim_steps(self.alphas, ddim_num_steps, ddim_eta, ddim_discretize)

    def schedule(self, steps: int, eta: float) -> list[Step]:
        self.make_schedule(steps, ddim_eta=eta)
        return self._steps()

    def loop(self, x: Tensor, run: SamplingRun) -> Tensor:
        """Equation 12 of the paper, from the noisiest step to the cleanest."""
        for step in run.steps:
            x = run.keep_known(x, step)
            eps = run.eps(x, step.t, step.alpha)
            x0 = run.quantized(predict_x0(x, eps, step.alpha))
            x = ddim_step(x0, eps, step) + run.noise(x, step)
            run.report(x, x0, step)
        return x

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor | int, noise: Tensor | None = None, generator: Generators = None
    ) -> Tensor:
        """Return `x0` [B, C, H, W] noised to the level of the `t`-th step, counted from 0 at the clean end.

        Args:
            t: one index, or one per image; an index beyond the last step means the last.
            noise: the noise to add, drawn if absent.
        """
        ascending = self._steps()[::-1]
        indices = torch.as_tensor(t).reshape(-1).expand(x0.shape[0]).tolist()
        noise = gaussian(x0, generator) if noise is None else noise
        levels = [ascending[min(index, len(ascending) - 1)].alpha for index in indices]
        return torch.stack([diffuse(*row) for row in zip(x0, noise, levels, strict=True)])

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Condition | None,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Denoise `x_latent` [B, C, H, W] by the last `t_start` steps of the schedule."""
        steps = self._steps()
        eps = GuidedEps(self.model, cond, unconditional_conditioning, unconditional_guidance_scale)
        return self.loop(
            x_latent, SamplingRun(steps[max(len(steps) - t_start, 0) :], eps, generator=generator)
        )

    def _steps(self) -> list[Step]:
        if self.steps is None:
            raise UserError("call make_schedule(ddim_num_steps) before encoding or decoding")
        return self.steps
