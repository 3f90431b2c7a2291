"""Pictures that show a model at work while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm import random_state
from ldm.images import text_image, to_tensor
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import DDPM

GUIDANCE_SCALE = 5.0


@torch.no_grad()
def preview_images(
    model: DDPM,
    batch: Mapping[str, Any],
    N: int = 8,
    n_row: int = 4,
    sample: bool | None = None,
    ddim_steps: int | None = None,
    ddim_eta: float = 0.0,
    return_keys: Sequence[str] | None = None,
    inpaint: bool = False,
    plot_progressive_rows: bool = False,
    plot_diffusion_rows: bool = False,
    guidance_scale: float = GUIDANCE_SCALE,
    seed: int = 0,
    prompts: Sequence[str] = (),
    images_per_prompt: int = 1,
) -> dict[str, Tensor]:
    """inputs, reconstruction, conditioning, samples and samples_scaled (guided), [n, 3, H, W] in [-1, 1] each.

    The same `seed` gives the same noise at every call, so that pictures of a run can be compared. The sampler is
    DPM-Solver++ (2M) with 20 steps, or DDIM with `ddim_steps` if that is given. With `prompts` there are, under
    that name and guided, `images_per_prompt` pictures of each, one after the other; every prompt begins from the
    same noises. They take the place of the samples under the batch's captions, unless `sample` is true.
    `n_row`, `inpaint` and the `plot_...` switches are taken from old YAMLs: the grid is the logger's business, and
    the latter drew what nobody trains on.
    """
    images = model.first_stage_key
    x = torch.as_tensor(batch[images])[:N].movedim(-1, 1).to(model.device, torch.float32)
    shown: dict[str, Tensor] = {"inputs": x}
    few = {key: value[: len(x)] for key, value in batch.items()}
    if not hasattr(model, "first_stage_model"):
        return shown
    with random_state.isolated(seed), model.first_stage_on(model.device):
        z, raw = model.get_input(few, images)
        shown["reconstruction"] = model.decode_first_stage(z)
        if isinstance(raw, list) and raw and isinstance(raw[0], str):
            size = x.shape[-1]
            shown["conditioning"] = torch.stack([to_tensor(text_image(text, size, size)) for text in raw])
        if raw is not None and (not prompts if sample is None else sample):
            noise = torch.randn(z.shape)
            shown["samples"] = _samples(model, raw, noise, ddim_steps, ddim_eta)
            if isinstance(raw, list):
                shown["samples_scaled"] = _samples(model, raw, noise, ddim_steps, ddim_eta, guidance_scale)
        if prompts:
            # Drawn picture by picture: those of a prompt stay the same when there are more of them.
            noise = torch.stack([_noise(z.shape[1:], seed + place) for place in range(images_per_prompt)])
            texts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
            noise = noise.repeat(len(prompts), 1, 1, 1)
            shown["prompts"] = torch.cat(
                [
                    _samples(
                        model,
                        texts[start : start + N],
                        noise[start : start + N],
                        ddim_steps,
                        ddim_eta,
                        guidance_scale,
                    )
                    for start in range(0, len(texts), N)
                ]
            )
    return {key: value for key, value in shown.items() if not return_keys or key in return_keys}


def _samples(
    model: DDPM, raw: Any, noise: Tensor, ddim_steps: int | None, ddim_eta: float, scale: float = 1.0
) -> Tensor:
    """Pictures of conditions, from noise [B, C, h, w] on the CPU; guided away from the empty caption by `scale`."""
    sampler = DPMSolverSampler(model) if ddim_steps is None else DDIMSampler(model)
    guidance: dict[str, Any] = {}
    if scale != 1.0:
        empty = model.get_learned_conditioning([""] * len(noise))
        guidance = {"unconditional_guidance_scale": scale, "unconditional_conditioning": empty}
    with model.ema_scope("previews"):
        latents, _ = sampler.sample(
            S=ddim_steps or 20,
            batch_size=len(noise),
            shape=tuple(noise.shape[1:]),
            conditioning=model.get_learned_conditioning(raw),
            x_T=noise.to(model.device),
            eta=0.0 if ddim_steps is None else ddim_eta,
            verbose=False,
            **guidance,
        )
    return model.decode_first_stage(latents)


def _noise(shape: Sequence[int], seed: int) -> Tensor:
    """Noise of one picture, the same on every device."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
