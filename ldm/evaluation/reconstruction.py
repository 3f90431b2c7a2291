"""What a model's first stage makes of pictures: nothing that the model generates can be more like them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import kornia
import torch
from PIL import Image

from ldm.images import to_pil, to_tensor
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

_BATCH = 16


@torch.no_grad()
def reconstructed(model: Any, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Each picture encoded, at the posterior's mode, and decoded again by the first stage of a LatentDiffusion."""
    found = []
    for start in range(0, len(pictures), _BATCH):
        pixels = torch.stack([to_tensor(one) for one in pictures[start : start + _BATCH]])
        encoded = model.encode_first_stage(pixels.to(model.device, model.dtype))
        if isinstance(encoded, DiagonalGaussianDistribution):
            encoded = encoded.mode()
        found += [to_pil(one) for one in model.decode_first_stage(model.get_first_stage_encoding(encoded))]
    return found


def psnr(pictures: Sequence[Image.Image], found: Sequence[Image.Image]) -> tuple[float, float]:
    """Mean and standard deviation over pictures of the peak signal-to-noise ratio in dB."""
    values = torch.stack(
        [
            kornia.metrics.psnr(to_tensor(theirs), to_tensor(ours), max_val=2.0)
            for ours, theirs in zip(pictures, found, strict=True)
        ]
    )
    return values.mean().item(), values.std(correction=0).item()
