"""The base of all samplers: `sample`, guidance, random numbers, inpainting and intermediate results."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ldm.models.diffusion.conditioning import Condition, condition_rows, extrapolated, outputs_under
from ldm.models.diffusion.steps import Step, diffuse, steps_taken
from ldm.util import UserError

logger = logging.getLogger(__name__)


def to_eps(output: Tensor, x: Tensor, alpha: float, parameterization: str) -> Tensor:
    """Return the noise in `x` at level `alpha`, from the output of a model of that parameterization.

    Raises:
        UserError: the parameterization is not one of eps, x0, v.
    """
    if parameterization == "eps":
        return output
    if parameterization == "x0":
        return (x - math.sqrt(alpha) * output) / math.sqrt(1.0 - alpha)
    if parameterization == "v":  # v = sqrt(alpha) eps - sqrt(1 - alpha) x0 (Salimans and Ho 2022)
        return math.sqrt(alpha) * output + math.sqrt(1.0 - alpha) * x
    raise UserError(
        f'cannot sample from a model with parameterization "{parameterization}"; known are eps, x0 and v'
    )


@dataclass(frozen=True)
class GuidedEps:
    """Classifier-free guidance: `eps(x, uncond) + scale * (eps(x, cond) - eps(x, uncond))` (Ho and Salimans 2022).

    With a condition `base`, `eps(x, cond)` is replaced by `eps(x, base) + strength * (eps(x, cond) - eps(x, base))`,
    which scales what the condition adds to the base; and `eps(x, uncond)` likewise with `uncond_base`. Guidance and the
    conversion of outputs to eps are both linear, so the guided output is converted once.

    Attributes:
        model: see `Sampler`.
        cond, uncond: the conditions; without `uncond` there is no guidance.
        scale: 1 is no guidance.
        base, uncond_base, strength: see above; without a base, or with strength 1, there is none of it.
        corrector: an object with `modify_score(model, eps, x, t, cond, **corrector_kwargs) -> eps`.
    """

    model: Any
    cond: Condition | None
    uncond: Condition | None = None
    scale: float = 1.0
    corrector: Any = None
    corrector_kwargs: Mapping[str, Any] = field(default_factory=dict)
    base: Condition | None = None
    strength: float = 1.0
    uncond_base: Condition | None = None

    def __call__(self, x: Tensor, t: float, alpha: float) -> Tensor:
        """Return the guided noise in `x` [B, C, H, W] at timestep `t`, whose level is `alpha`."""
        # Integer timesteps stay integers, because a model may use them as an index.
        dtype = torch.long if float(t).is_integer() else torch.float32
        times = torch.full((x.shape[0],), t, device=x.device, dtype=dtype)  # (B,)
        output = self._output(x, times).to(x.dtype)
        eps = to_eps(output, x, alpha, getattr(self.model, "parameterization", "eps"))
        if self.corrector is not None:
            eps = self.corrector.modify_score(self.model, eps, x, times, self.cond, **self.corrector_kwargs)
        return eps

    def _output(self, x: Tensor, times: Tensor) -> Tensor:
        guided = self.uncond is not None and self.scale != 1.0
        bases = (self.uncond_base, self.base) if self.strength != 1.0 else (None, None)
        pairs = list(zip(bases, (self.uncond, self.cond), strict=True))[0 if guided else 1 :]
        asked = [one for base, whole in pairs for one in ([whole] if base is None else [base, whole])]
        outputs = iter(outputs_under(self.model.apply_model, x, times, asked))
        ends = [
            next(outputs) if base is None else extrapolated(next(outputs), next(outputs), self.strength)
            for base, _ in pairs
        ]
        return extrapolated(ends[0], ends[1], self.scale) if guided else ends[0]


# One generator for the batch, or one for each of its images.
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


def gaussian(like: Tensor, generator: Generators) -> Tensor:
    """Return standard normal noise with the shape, device and dtype of `like` [B, ...].

    It is drawn on the generator's device, so that a CPU generator gives the same noise on every device.
    """
    if isinstance(generator, Sequence):
        return torch.cat([gaussian(row[None], one) for row, one in zip(like, generator, strict=True)])
    if generator is None:
        return torch.randn_like(like)
    drawn = torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype)
    return drawn.to(like.device)


@dataclass(frozen=True)
class SamplingRun:
    """The arguments of a sampler's loop besides the latent; see `Sampler.sample`."""

    steps: Sequence[Step]
    eps: GuidedEps
    quantize: Callable[[Tensor], Any] | None = None
    mask: Tensor | None = None
    x0: Tensor | None = None
    temperature: float = 1.0
    noise_dropout: float = 0.0
    normals: Sequence[Tensor] | None = None
    callback: Callable[[int], Any] | None = None
    img_callback: Callable[[Tensor, int], Any] | None = None
    log_every_t: int = 100
    generator: Generators = None
    intermediates: dict[str, list[Tensor]] = field(default_factory=lambda: {"x_inter": [], "pred_x0": []})

    def keep_known(self, x: Tensor, step: Step) -> Tensor:
        """Return `x`, with `x0` noised to this step's level where the mask is 1."""
        if self.mask is None or self.x0 is None:
            return x
        return diffuse(self.x0, gaussian(x, self.generator), step.alpha) * self.mask + (1.0 - self.mask) * x

    def quantized(self, x0: Tensor) -> Tensor:
        """Return `x0`, moved to the nearest codebook vectors with `quantize_x0`."""
        return x0 if self.quantize is None else self.quantize(x0)[0]

    def noise(self, x: Tensor, step: Step) -> Tensor | float:
        """Return the noise that a step adds; a deterministic step draws no random numbers."""
        if step.sigma == 0.0:
            return 0.0
        number = len(self.steps) - 1 - step.index
        drawn = self.normals[number].to(x) if self.normals is not None else gaussian(x, self.generator)
        return functional.dropout(step.sigma * self.temperature * drawn, p=self.noise_dropout)

    def report(self, x: Tensor, x0: Tensor, step: Step) -> None:
        """Call the callbacks, and keep the latent and the predicted x0 every `log_every_t` steps."""
        number = len(self.steps) - 1 - step.index
        if self.callback is not None:
            self.callback(number)
        if self.img_callback is not None:
            self.img_callback(x0, number)
        if step.index % self.log_every_t == 0 or number == 0:
            self.intermediates["x_inter"].append(x)
            self.intermediates["pred_x0"].append(x0)


class Sampler:
    """Base of the samplers; a subclass defines `schedule` and `loop`.

    Of the model it uses `apply_model(x, t, cond)`, `alphas_cumprod` [T], `parameterization` ("eps" if there is no such
    attribute) and, with `quantize_x0`, `first_stage_model.quantize`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def schedule(self, steps: int, eta: float) -> list[Step]:
        """Return the steps to take, noisiest first."""
        raise NotImplementedError

    def loop(self, x: Tensor, run: SamplingRun) -> Tensor:
        """Denoise `x` [B, C, H, W]."""
        raise NotImplementedError

    @property
    def alphas(self) -> np.ndarray:
        """The model's cumulative alphas [T], float64."""
        return self.model.alphas_cumprod.detach().cpu().double().numpy()

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Condition | None = None,
        callback: Callable[[int], Any] | None = None,
        normals_sequence: Sequence[Tensor] | None = None,
        img_callback: Callable[[Tensor, int], Any] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        verbose: bool = False,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition | None = None,
        generator: Generators = None,
        strength: float | None = None,
        base_conditioning: Condition | None = None,
        concept_strength: float = 1.0,
        unconditional_base_conditioning: Condition | None = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Sample `batch_size` latents of `shape` (C, H, W) in `S` steps.

        Args:
            conditioning: a tensor, list or dict with `batch_size` rows, as `apply_model` takes it.
            callback: called after each step with its number.
            normals_sequence: `S` noise tensors for the stochastic steps, drawn if absent.
            img_callback: called after each step with the predicted x0 and its number.
            quantize_x0: move each predicted x0 to the first stage's codebook.
            eta: 0 is deterministic; 1 adds the noise of the ancestral sampler.
            mask, x0: inpainting; where the mask is 1 the result keeps `x0` [B, C, H, W].
            temperature, noise_dropout: scale and dropout of the noise of stochastic steps.
            score_corrector, corrector_kwargs: see `GuidedEps`.
            verbose: log the sampler, its steps and its shape.
            x_T: the noise to start from, [batch_size, C, H, W], drawn if absent.
            log_every_t: interval of the intermediate results, in steps counted from the end.
            unconditional_guidance_scale, unconditional_conditioning: guidance; without the latter there is none.
            generator: source of random numbers, one for the batch or one per image.
            strength: begin at `x0`, noised by `x_T`, and take only this share of the steps, the last ones (SDEdit).
            base_conditioning, concept_strength, unconditional_base_conditioning: see `base`, `strength` and
                `uncond_base` of `GuidedEps`.

        Returns:
            The latents [B, C, H, W], and {"x_inter", "pred_x0"}: the latent and the predicted x0 at the start, after
            the first step and every `log_every_t` steps.

        Raises:
            UserError: steps or eta are out of range, or sizes do not fit together.
        """
        steps = self.schedule(S, eta)
        x = self._start(x_T, (batch_size, *shape), generator)
        self._check_sizes(batch_size, conditioning, unconditional_conditioning, mask, x0, normals_sequence, S)
        if strength is not None:
            if x0 is None:
                raise UserError("strength is given without x0; give the latents to begin from")
            steps = steps[len(steps) - steps_taken(strength, S) :]
            x = diffuse(x0, x, steps[0].alpha) if steps else x0.expand_as(x)
        run = SamplingRun(
            steps=steps,
            eps=GuidedEps(
                self.model,
                conditioning,
                unconditional_conditioning,
                unconditional_guidance_scale,
                score_corrector,
                corrector_kwargs or {},
                base_conditioning,
                concept_strength,
                unconditional_base_conditioning,
            ),
            quantize=self.model.first_stage_model.quantize if quantize_x0 else None,
            mask=mask,
            x0=x0,
            temperature=temperature,
            noise_dropout=noise_dropout,
            normals=normals_sequence,
            callback=callback,
            img_callback=img_callback,
            log_every_t=log_every_t,
            generator=generator,
            intermediates={"x_inter": [x], "pred_x0": [x]},
        )
        if verbose:
            logger.info("%s: %d steps, latents %s", type(self).__name__, S, tuple(x.shape))
        return self.loop(x, run), run.intermediates

    def _start(self, x_T: Tensor | None, size: tuple[int, ...], generator: Generators) -> Tensor:
        levels = self.model.alphas_cumprod
        if x_T is None:
            return gaussian(torch.empty(size, device=levels.device, dtype=levels.dtype), generator)
        if tuple(x_T.shape) != size:
            raise UserError(f"x_T has shape {tuple(x_T.shape)}; it must have the shape {size} of the latents")
        return x_T.to(levels.device)

    @staticmethod
    def _check_sizes(
        batch_size: int,
        cond: Condition | None,
        uncond: Condition | None,
        mask: Tensor | None,
        x0: Tensor | None,
        normals: Sequence[Tensor] | None,
        steps: int,
    ) -> None:
        for name, given in (("conditioning", cond), ("unconditional_conditioning", uncond)):
            count = condition_rows(given)
            if count is not None and count != batch_size:
                raise UserError(
                    f"{name} has {count} rows, but batch_size is {batch_size}; give one row per image"
                )
        if mask is not None and x0 is None:
            raise UserError("mask is given without x0; give the latents that the mask keeps")
        if normals is not None and len(normals) != steps:
            raise UserError(
                f"normals_sequence holds {len(normals)} tensors; give one for each of the {steps} steps"
            )
