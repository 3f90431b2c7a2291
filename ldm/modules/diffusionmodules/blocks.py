"""Blocks of the UNet (Dhariwal and Nichol 2021), under the names that checkpoints use."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.attend import attend
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.convolution import Conv3x3
from ldm.modules.diffusionmodules.util import checkpoint, normalization, zero_module


class Upsample(nn.Module):
    """Double the resolution by nearest neighbours, then convolve if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool, out_channels: int | None = None) -> None:
        super().__init__()
        if use_conv:
            self.conv = nn.Conv2d(channels, out_channels or channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x) if hasattr(self, "conv") else x


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution if `use_conv`, else by averaging."""

    def __init__(self, channels: int, use_conv: bool, out_channels: int | None = None) -> None:
        super().__init__()
        if use_conv:
            self.op = nn.Conv2d(channels, out_channels or channels, 3, stride=2, padding=1)
        else:
            self.op = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block that takes the timestep embedding; [B, C, H, W], [B, E] -> [B, out, H', W'].

    `up` and `down` change the resolution inside the block; `use_scale_shift_norm` lets the embedding scale and
    shift the normalised features instead of being added to them.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_scale_shift_norm: bool = False,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(normalization(channels), nn.SiLU(), Conv3x3(channels, out_channels))
        self.resample = _resampling(channels, up, down)
        emb_out = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_out))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(Conv3x3(out_channels, out_channels)),
        )
        if out_channels == channels:
            self.skip_connection = nn.Identity()
        else:
            self.skip_connection = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, (x, emb), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.resample(activation(norm(x))))
        x = self.resample(x)
        emb = self.emb_layers(emb)[:, :, None, None].to(h.dtype)  # (B, out or 2*out, 1, 1)
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


def _resampling(channels: int, up: bool, down: bool) -> nn.Module:
    if up:
        return Upsample(channels, use_conv=False)
    if down:
        return Downsample(channels, use_conv=False)
    return nn.Identity()


class AttentionBlock(nn.Module):
    """Multi-head self-attention over positions, for UNets without a context; [B, C, H, W] -> the same.

    Old checkpoints order the joint projection by heads first, those with `use_new_attention_order` by q, k, v.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.new_order = use_new_attention_order
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, (x,), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # (B, C, N)
        qkv = self.qkv(self.norm(flat))
        if self.new_order:
            q, k, v = qkv.unflatten(1, (3, self.num_heads, -1)).transpose(-1, -2).unbind(1)
        else:
            q, k, v = qkv.unflatten(1, (self.num_heads, 3, -1)).transpose(-1, -2).unbind(2)
        h = attend(q, k, v).transpose(-1, -2).flatten(1, 2)  # (B, C, N)
        return (flat + self.proj_out(h)).view_as(x)


class TimestepEmbedSequential(nn.Sequential):
    """A sequence that hands the timestep embedding and the context to the layers that take them."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x
