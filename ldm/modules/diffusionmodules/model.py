"""Encoder and decoder of the first stage (Esser et al. 2021; the layout of LDM's KL and VQ checkpoints)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.attention import attend
from ldm.modules.diffusionmodules.util import GroupNorm32


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return GroupNorm32(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection; [B, in, H, W] -> [B, out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions; [B, C, H, W] -> the same."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        h = attend(q, k, v)[:, 0].transpose(1, 2)  # (B, C, H*W)
        return x + self.proj_out(h.reshape(b, c, height, width))


class Downsample(nn.Module):
    """Halve the resolution; the original pads on the right and at the bottom only."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "conv"):
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Double the resolution by nearest neighbours."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if hasattr(self, "conv") else x


class Level(nn.Module):
    """The blocks of one resolution; a container that gives checkpoints their names."""

    def __init__(self, blocks: list[nn.Module], attentions: list[nn.Module]) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attentions)

    def run_block(self, index: int, h: Tensor) -> Tensor:
        h = self.block[index](h)
        return self.attn[index](h) if len(self.attn) else h


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, dropout, groups)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Image to latent moments: [B, in_channels, H, W] -> [B, z (2z if double_z), H/f, W/f].

    f is 2^(levels - 1). The parameters are `ddconfig` of the YAMLs; `out_ch`, `tanh_out` and `give_pre_end`
    belong to the decoder and are taken here because both are built from the same node. `num_groups` is the
    number of normalisation groups.
    """

    def __init__(
        self,
        *,
        ch: int,
        in_channels: int,
        resolution: int,
        z_channels: int,
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        out_ch: int = 3,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        double_z: bool = True,
        num_groups: int = 32,
        tanh_out: bool = False,
        give_pre_end: bool = False,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = ch
        for index, mult in enumerate(ch_mult):
            blocks, attentions = [], []
            for _ in range(num_res_blocks):
                blocks.append(ResnetBlock(channels, ch * mult, dropout, num_groups))
                channels = ch * mult
                if resolution in attn_resolutions:
                    attentions.append(AttnBlock(channels, num_groups))
            level = Level(blocks, attentions)
            if index < len(ch_mult) - 1:
                level.downsample = Downsample(channels, resamp_with_conv)
                resolution //= 2
            self.down.append(level)
        self.mid = Middle(channels, dropout, num_groups)
        self.norm_out = _norm(channels, num_groups)
        self.conv_out = nn.Conv2d(channels, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            for index in range(len(level.block)):
                h = level.run_block(index, h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latent to image: [B, z_channels, h, w] -> [B, out_ch, f*h, f*w]; parameters as in `Encoder`."""

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        resolution: int,
        z_channels: int,
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        in_channels: int = 3,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        double_z: bool = True,
        num_groups: int = 32,
        tanh_out: bool = False,
        give_pre_end: bool = False,
    ) -> None:
        super().__init__()
        self.give_pre_end = give_pre_end
        self.tanh_out = tanh_out
        resolution //= 2 ** (len(ch_mult) - 1)
        channels = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, dropout, num_groups)
        levels = []
        for index, mult in reversed(list(enumerate(ch_mult))):
            blocks, attentions = [], []
            for _ in range(num_res_blocks + 1):
                blocks.append(ResnetBlock(channels, ch * mult, dropout, num_groups))
                channels = ch * mult
                if resolution in attn_resolutions:
                    attentions.append(AttnBlock(channels, num_groups))
            level = Level(blocks, attentions)
            if index > 0:
                level.upsample = Upsample(channels, resamp_with_conv)
                resolution *= 2
            levels.insert(0, level)  # checkpoints number the levels from the highest resolution
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(channels, num_groups)
        self.conv_out = nn.Conv2d(channels, out_ch, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradient balances the adversarial loss against the reconstruction."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for index in range(len(level.block)):
                h = level.run_block(index, h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(F.silu(self.norm_out(h)))
        return torch.tanh(h) if self.tanh_out else h
