"""Pictures that show a model at work while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.images import text_picture, to_tensor
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler

if TYPE_CHECKING:
    from ldm.models.diffusion.pixel import DDPM

GUIDANCE_SCALE = 5.0


@torch.no_grad()
def preview_images(
    model: DDPM,
    batch: Mapping[str, Any],
    N: int = 8,
    n_row: int = 4,
    sample: bool = True,
    ddim_steps: int | None = None,
    ddim_eta: float = 0.0,
    return_keys: Sequence[str] | None = None,
    inpaint: bool = False,
    plot_progressive_rows: bool = False,
    plot_diffusion_rows: bool = False,
    guidance_scale: float = GUIDANCE_SCALE,
    seed: int = 0,
) -> dict[str, Tensor]:
    """inputs, reconstruction, conditioning, samples and samples_scaled (guided), [n, 3, H, W] in [-1, 1] each.

    The same `seed` gives the same noise at every call, so that pictures of a run can be compared. The sampler is
    DPM-Solver++ with 20 steps, or DDIM with `ddim_steps` if that is given. `n_row`, `inpaint` and the `plot_...`
    switches are taken from old YAMLs: the grid is the logger's business, and the latter drew what nobody trains on.
    """
    images = model.first_stage_key
    x = torch.as_tensor(batch[images])[:N].movedim(-1, 1).to(model.device, torch.float32)
    shown: dict[str, Tensor] = {"inputs": x}
    few = {key: value[: len(x)] for key, value in batch.items()}
    with _own_random_state(seed, model.device):
        if not hasattr(model, "first_stage_model"):
            return shown
        z, raw = model.get_input(few, images)
        shown["reconstruction"] = model.decode_first_stage(z)
        if isinstance(raw, list) and raw and isinstance(raw[0], str):
            size = x.shape[-1]
            shown["conditioning"] = torch.stack([to_tensor(text_picture(text, size, size)) for text in raw])
        if sample and raw is not None:
            shown |= _samples(model, z, raw, ddim_steps, ddim_eta, guidance_scale)
    return {key: value for key, value in shown.items() if not return_keys or key in return_keys}


def _samples(
    model: DDPM, z: Tensor, raw: Any, ddim_steps: int | None, ddim_eta: float, scale: float
) -> dict[str, Tensor]:
    sampler = DPMSolverSampler(model) if ddim_steps is None else DDIMSampler(model)
    common = {
        "S": ddim_steps or 20,
        "batch_size": len(z),
        "shape": tuple(z.shape[1:]),
        "conditioning": model.get_learned_conditioning(raw),
        "x_T": torch.randn(z.shape).to(z.device),
        "eta": 0.0 if ddim_steps is None else ddim_eta,
        "verbose": False,
    }
    guided = isinstance(raw, list)
    with model.ema_scope("previews"):
        pictures = {"samples": sampler.sample(**common)[0]}
        if guided:
            empty = model.get_learned_conditioning([""] * len(z))
            pictures["samples_scaled"] = sampler.sample(
                **common, unconditional_guidance_scale=scale, unconditional_conditioning=empty
            )[0]
    return {name: model.decode_first_stage(latents) for name, latents in pictures.items()}


@contextmanager
def _own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers are seeded within this block, and the training's stay as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
