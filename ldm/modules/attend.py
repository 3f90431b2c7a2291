"""The one place where attention is computed."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention without a mask: softmax(q k^T / sqrt(d)) v.

    q: [B, H, N, d], k and v: [B, H, M, d]; returns [B, H, N, d]. The kernel is torch's fused one,
    except where its backward pass is slower than the plain product: short sequences on a CPU.
    """
    if q.device.type == "cpu" and q.requires_grad and q.shape[-2] * k.shape[-2] <= _SHORT:
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return weights.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


_SHORT = 256 * 256
