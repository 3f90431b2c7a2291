"""Cross-attention of the denoiser with its conditioning (Rombach et al. 2022, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.diffusionmodules.util import GroupNorm32, checkpoint, zero_module

# Queries times keys. Up to this many, the plain product with its backward pass took on an AVX-512 CPU 0.2 (64 x 64) to
# 0.7 (1024 x 77) of the fused kernel's time in bfloat16; its weights take little memory. In float32, and without a
# backward pass, the fused kernel is the faster one: 0.5 to 1.0 of the product's time.
SHORT = 1 << 17


def is_short(queries: int, keys: int, states: Tensor) -> bool:
    """Return whether the plain product is the faster attention: on a CPU, in half precision, with a backward pass.

    `states` is any tensor from which queries or keys are computed; its device and dtype decide.
    """
    if states.device.type != "cpu" or not torch.is_grad_enabled() or queries * keys > SHORT:
        return False
    return states.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu")


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v, attention without a mask.

    q: [B, H, N, d], k and v: [B, H, M, d]; returns [B, H, N, d]. Uses torch's fused kernel, except where the plain
    product is faster, see `is_short`.
    """
    if is_short(q.shape[-2], k.shape[-2], q):
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return weights.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class GEGLU(nn.Module):
    """Linear layer whose first half is multiplied by the GELU of its second half (Shazeer 2020)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two-layer perceptron with a gated hidden layer; [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, dim * mult), nn.Dropout(dropout), nn.Linear(dim * mult, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention of x [B, N, query_dim] to context [B, M, context_dim], or to x without a context.

    A context [B, 1 or 2, M, context_dim] gives what keys and values are made of: the same, or each its own.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or query_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or query_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        keys, values = (context, context) if context.ndim == 3 else (context[:, 0], context[:, -1])
        q, k, v = (
            states.view(*states.shape[:2], self.heads, -1).transpose(1, 2)  # (B, H, N or M, d)
            for states in (self.to_q(x), self.to_k(keys), self.to_v(values))
        )
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with a residual connection."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, None, n_heads, d_head, dropout)
        self.ff = FeedForward(dim, dropout=dropout)
        self.attn2 = CrossAttention(dim, context_dim, n_heads, d_head, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.use_checkpoint = checkpoint

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return checkpoint(self._forward, (x, context), self.use_checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class PositionConv(nn.Conv2d):
    """A convolution of size 1 of positions [B, N, in] -> [B, N, out]: a linear layer with the weights of a convolution.

    The positions of a transformer are thus projected where they lie, without the copies between both layouts.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, positions: Tensor) -> Tensor:
        return F.linear(positions, self.weight.flatten(1), self.bias)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map [B, C, H, W], with context [B, M, context_dim].

    With `use_linear` the weights of the projections in and out have the shape of those of linear layers, as in Stable
    Diffusion 2 and XL, not of convolutions of size 1; the results are the same.

    A layered context [B, layers, 1 or 2, M, context_dim] (see `ldm.modules.personalization`) has a row for each
    transformer of the denoiser, of which this one takes the row `layer`, or one row for all.

    Attributes:
        layer: the place of this transformer among those of the denoiser, in forward order; the denoiser sets it.
    """

    layer = 0

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | None = None,
        use_checkpoint: bool = False,
        use_linear: bool = False,
    ) -> None:
        super().__init__()
        inner = n_heads * d_head
        projection = nn.Linear if use_linear else PositionConv
        self.norm = GroupNorm32(32, in_channels, eps=1e-6)
        self.proj_in = projection(in_channels, inner)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, n_heads, d_head, dropout, context_dim, use_checkpoint)
            for _ in range(depth)
        )
        self.proj_out = zero_module(projection(inner, in_channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None and context.ndim == 5:
            context = context[:, self.layer if context.shape[1] > 1 else 0]
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2).contiguous())  # (B, H*W, inner)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h).transpose(1, 2).reshape(x.shape)
