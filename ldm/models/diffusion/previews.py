"""Images that show the progress of a latent diffusion model in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from einops import repeat
from torch import Tensor

from ldm import random_state
from ldm.images import text_image, to_tensor
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.sampler import Sampler
from ldm.modules.diffusionmodules.util import channels_first

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

GUIDANCE_SCALE = 5.0
# Of DPM-Solver++. With the embedded model the images of 12 steps differ by 0.03 from those of 100 (root mean square, of
# a range of 2), which is not to be seen, those of 20 by 0.016; some of 8 steps are other images.
STEPS = 12


@torch.no_grad()
def preview_images(
    model: LatentDiffusion,
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
    steps: int = STEPS,
) -> dict[str, Tensor]:
    """Return images [n, 3, H, W] in [-1, 1] by name, of a batch and of prompts.

    They are `inputs`, their `reconstruction`, their captions as `conditioning`, `samples` under these captions and,
    guided, `samples_scaled`; and with `prompts`, under that name, guided samples of each prompt.

    Args:
        N: the number of images of the batch, and the batch size of sampling.
        sample: sample under the batch's captions; by default only without `prompts`.
        ddim_steps, ddim_eta: sample by DDIM; without `ddim_steps`, by DPM-Solver++ (2M) with `steps` steps.
        return_keys: return these only.
        guidance_scale: scale of the guided samples.
        seed: seed of the noise; it is the same at every call, so that images of a run can be compared.
        prompts, images_per_prompt: sample so many images of each, in this order; every prompt starts from the same
            noises.
        n_row, inpaint, plot_progressive_rows, plot_diffusion_rows: kept for old YAMLs; they change nothing.
    """
    x = channels_first(torch.as_tensor(batch[model.first_stage_key])[:N], model.device)
    shown: dict[str, Tensor] = {"inputs": x}
    first = {key: value[: len(x)] for key, value in batch.items()}
    size = x.shape[-2], x.shape[-1]
    sampler: Sampler = DPMSolverSampler(model)
    options: dict[str, Any] = {"S": steps}
    if ddim_steps is not None:
        sampler, options = DDIMSampler(model), {"S": ddim_steps, "eta": ddim_eta}
    draw = partial(_samples, model, sampler, options)
    with random_state.isolated(seed), model.first_stage_on(model.device), model.drawing_at(*size, {}):
        z, raw = model.get_input(first, model.first_stage_key)
        shown["reconstruction"] = model.decode_first_stage(z)
        if isinstance(raw, list) and raw and isinstance(raw[0], str):
            side = size[-1]
            shown["conditioning"] = torch.stack([to_tensor(text_image(text, side, side)) for text in raw])
        if raw is not None and (not prompts if sample is None else sample):
            noise = torch.randn(z.shape)
            shown["samples"] = draw(raw, noise)
            if isinstance(raw, list):
                shown["samples_scaled"] = draw(raw, noise, guidance_scale)
        if prompts:
            # Drawn image by image, so that those of a prompt stay the same when there are more of them.
            noise = torch.stack([_noise(z.shape[1:], seed + index) for index in range(images_per_prompt)])
            texts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
            noise = repeat(noise, "n c h w -> (p n) c h w", p=len(prompts))
            shown["prompts"] = torch.cat(
                [
                    draw(texts[start : start + N], noise[start : start + N], guidance_scale)
                    for start in range(0, len(texts), N)
                ]
            )
    return {key: value for key, value in shown.items() if not return_keys or key in return_keys}


def _samples(
    model: LatentDiffusion,
    sampler: Sampler,
    options: Mapping[str, Any],
    raw: Any,
    noise: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """Sample images under raw conditions from noise [B, C, h, w], guided by `scale` away from the empty caption."""
    guidance: dict[str, Any] = {}
    if scale != 1.0:
        texts = raw if isinstance(raw, list) else [""] * len(noise)
        empty = model.get_unconditional_conditioning(model.negative_prompts(texts))
        guidance = {"unconditional_guidance_scale": scale, "unconditional_conditioning": empty}
    with model.ema_scope("previews"):
        latents, _ = sampler.sample(
            batch_size=len(noise),
            shape=tuple(noise.shape[1:]),
            conditioning=model.get_learned_conditioning(raw),
            x_T=noise.to(model.device),
            verbose=False,
            **options,
            **guidance,
        )
    return model.decode_first_stage(latents)


def _noise(shape: Sequence[int], seed: int) -> Tensor:
    """Return the noise of one image, the same on every device."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
