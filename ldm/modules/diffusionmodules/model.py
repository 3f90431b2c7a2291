"""Encoder and decoder of the first stage (Esser et al. 2021; the layout of LDM's KL and VQ checkpoints)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.attention import attend
from ldm.modules.diffusionmodules.util import GroupNorm32
from ldm.util import ConfigError


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return GroupNorm32(groups, channels, eps=1e-6)


def _attention(attn_type: str, channels: int, groups: int) -> nn.Module:
    """Return the attention block that `attn_type` of a YAML names: `vanilla`, or `none` for the identity."""
    if attn_type not in ("vanilla", "none"):
        raise ConfigError(f"ddconfig.attn_type is '{attn_type}'; use vanilla or none")
    return AttnBlock(channels, groups) if attn_type == "vanilla" else nn.Identity()


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
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        h = rearrange(attend(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halve the resolution; as in the original, only the right and the bottom are padded."""

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
    """The blocks of one resolution, under the names that checkpoints use; [B, C, H, W] -> [B, C', H, W].

    An attention block, if there are any, follows each residual block. Encoder and decoder add a `downsample` or an
    `upsample`, which they call themselves.
    """

    downsample: Downsample
    upsample: Upsample

    def __init__(self, blocks: Sequence[nn.Module], attentions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attentions)

    def forward(self, h: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            h = block(h)
            if len(self.attn):
                h = self.attn[index](h)
        return h


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution; [B, C, h, w] -> the same."""

    def __init__(self, channels: int, dropout: float, groups: int, attn_type: str) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout, groups)
        self.attn_1 = _attention(attn_type, channels, groups)
        self.block_2 = ResnetBlock(channels, channels, dropout, groups)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Images to latent moments: [B, in_channels, H, W] -> [B, z_channels (twice that if double_z), H/f, W/f].

    Encoder and decoder are built from the same node, `ddconfig`, so each accepts the other's parameters. There are
    as many levels as entries in `ch_mult`, and f is 2^(levels - 1).

    Args:
        ch, ch_mult: level i has `ch * ch_mult[i]` channels.
        resolution: the image size for which `attn_resolutions` names the levels with attention.
        resamp_with_conv: convolve when the resolution changes.
        num_groups: groups of the group normalisation.
        attn_type: `vanilla`, or `none` for a network without attention.
        out_ch, tanh_out, give_pre_end: of the decoder alone.
    Raises:
        ConfigError: `attn_type` is neither.
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
        attn_type: str = "vanilla",
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
                    attentions.append(_attention(attn_type, channels, num_groups))
            level = Level(blocks, attentions)
            if index < len(ch_mult) - 1:
                level.downsample = Downsample(channels, resamp_with_conv)
                resolution //= 2
            self.down.append(level)
        self.mid = Middle(channels, dropout, num_groups, attn_type)
        self.norm_out = _norm(channels, num_groups)
        self.conv_out = nn.Conv2d(channels, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            assert isinstance(level, Level)
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents to images: [B, z_channels, h, w] -> [B, out_ch, f*h, f*w].

    The parameters are those of `Encoder`, and besides them:

    Args:
        tanh_out: end with a hyperbolic tangent.
        give_pre_end: return the features before the last normalisation and convolution.
    """

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
        attn_type: str = "vanilla",
    ) -> None:
        super().__init__()
        self.give_pre_end = give_pre_end
        self.tanh_out = tanh_out
        resolution //= 2 ** (len(ch_mult) - 1)
        channels = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, dropout, num_groups, attn_type)
        levels: list[Level] = []
        for index, mult in reversed(list(enumerate(ch_mult))):
            blocks, attentions = [], []
            for _ in range(num_res_blocks + 1):
                blocks.append(ResnetBlock(channels, ch * mult, dropout, num_groups))
                channels = ch * mult
                if resolution in attn_resolutions:
                    attentions.append(_attention(attn_type, channels, num_groups))
            level = Level(blocks, attentions)
            if index > 0:
                level.upsample = Upsample(channels, resamp_with_conv)
                resolution *= 2
            levels.insert(0, level)  # checkpoints number levels from the highest resolution
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(channels, num_groups)
        self.conv_out = nn.Conv2d(channels, out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            assert isinstance(level, Level)
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(F.silu(self.norm_out(h)))
        return torch.tanh(h) if self.tanh_out else h
