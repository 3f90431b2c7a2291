"""The one place where attention is computed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Positions times positions. Up to here the plain product, measured on an AVX-512 CPU with its backward pass, took
# between a quarter (64 x 64) and two thirds of the fused kernel's time in bfloat16, and between half and 1.13 times
# (1024 x 77) of it in float32; its weights take little memory.
SHORT = 1 << 17


def is_short(queries: int, keys: int, device: torch.device) -> bool:
    """Whether sequences of these lengths attend by the plain product on a device; on an accelerator none does."""
    return device.type == "cpu" and queries * keys <= SHORT


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention without a mask: softmax(q k^T / sqrt(d)) v.

    q: [B, H, N, d], k and v: [B, H, M, d]; returns [B, H, N, d]. The kernel is torch's fused one, but for short
    sequences on a CPU, where it is slower than the product.
    """
    if is_short(q.shape[-2], k.shape[-2], q.device):
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return weights.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)
