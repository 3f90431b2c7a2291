"""The one place where attention is computed."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

# Positions times positions. Up to here the plain product was faster on an AVX-512 CPU, with the backward pass up to
# four times (bfloat16, 64 x 64), and in float32 at worst as fast; its weights take little memory.
SHORT = 1 << 17


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention without a mask: softmax(q k^T / sqrt(d)) v.

    q: [B, H, N, d], k and v: [B, H, M, d]; returns [B, H, N, d]. The kernel is torch's fused one, but for short
    sequences on a CPU, where it is slower than the product.
    """
    if q.device.type == "cpu" and q.shape[-2] * k.shape[-2] <= SHORT:
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return weights.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)
