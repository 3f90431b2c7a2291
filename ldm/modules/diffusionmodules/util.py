"""Small layers and helpers of the denoiser and the first stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as torch_checkpoint

MAX_PERIOD = 10_000


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = MAX_PERIOD) -> Tensor:
    """Return the sinusoidal embedding of timesteps (Vaswani et al. 2017, section 3.5), cosines first.

    timesteps: [B], may be fractional; returns float32 [B, dim].
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


def channels_first(images: Tensor, device: torch.device) -> Tensor:
    """Return the images of a batch, [B, H, W, C] or [B, H, W], as contiguous float32 [B, C, H, W] on a device."""
    images = images[..., None] if images.ndim == 3 else images
    images = rearrange(images, "b h w c -> b c h w")
    return images.to(device, torch.float32, memory_format=torch.contiguous_format)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters to zero and return the module: a residual branch then starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm32(nn.GroupNorm):
    """Group normalisation that computes in float32 whatever the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def normalization(channels: int) -> nn.GroupNorm:
    """Return the denoiser's group normalisation, with 32 groups."""
    return GroupNorm32(32, channels)


def checkpoint(function: Callable[..., Tensor], inputs: tuple[Any, ...], enabled: bool) -> Tensor:
    """Return `function(*inputs)`; if `enabled`, its activations are recomputed in the backward pass."""
    if enabled and torch.is_grad_enabled():
        return torch_checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


# Within these limits the matrix product was faster, forward and backward, on an AVX-512 CPU in float32 and bfloat16:
# the direct algorithm of oneDNN works on blocks of positions, and an 8x8 map at batch 1 has too few of them.
MOST_POSITIONS = 64
LEAST_CHANNELS = 1280


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1 that keeps the size; weights and results are those of nn.Conv2d, up to rounding.

    On a CPU, small maps of many channels are convolved by the matrix product of the kernels, [out, in * 9], and the
    unfolded map, [in * 9, H * W]; these are the innermost levels of a large denoiser at batch size 1.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        small = batch * height * width <= MOST_POSITIONS and channels >= LEAST_CHANNELS
        if not small or x.device.type != "cpu":
            return super().forward(x)
        kernels = rearrange(self.weight, "out c kh kw -> out (c kh kw)")
        product = kernels @ F.unfold(x, 3, padding=1)
        if self.bias is not None:
            product = product + self.bias[:, None].to(product.dtype)
        return rearrange(product, "b out (h w) -> b out h w", h=height)
