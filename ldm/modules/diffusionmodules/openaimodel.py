"""The denoising UNet (Dhariwal and Nichol 2021) with cross-attention (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.attention import SpatialTransformer, attend
from ldm.modules.diffusionmodules.util import (
    Conv3x3,
    checkpoint,
    normalization,
    timestep_embedding,
    zero_module,
)
from ldm.util import ConfigError


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
        self.op: nn.Module
        if use_conv:
            self.op = nn.Conv2d(channels, out_channels or channels, 3, stride=2, padding=1)
        else:
            self.op = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block with the timestep embedding; [B, C, H, W], [B, E] -> [B, out, H', W'].

    Args:
        use_scale_shift_norm: the embedding scales and shifts normalised features rather than being added to them.
        use_checkpoint: recompute activations in the backward pass.
        up, down: double or halve the resolution inside the block.
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
        self.skip_connection: nn.Module
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

    The channels of the joint projection are ordered by heads first, then by q, k and v; with
    `use_new_attention_order` by q, k and v first.
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
        flat = rearrange(x, "b c h w -> b c (h w)")
        order = "b (qkv heads d) n" if self.new_order else "b (heads qkv d) n"
        q, k, v = rearrange(
            self.qkv(self.norm(flat)), f"{order} -> qkv b heads n d", qkv=3, heads=self.num_heads
        )
        h = rearrange(attend(q, k, v), "b heads n d -> b (heads d) n")
        return rearrange(flat + self.proj_out(h), "b c (h w) -> b c h w", h=x.shape[2])


class TimestepEmbedSequential(nn.Sequential):
    """A sequence of layers that passes the timestep embedding and the context to those that take them."""

    def forward(  # type: ignore[override]  # a Sequential takes one input
        self, x: Tensor, emb: Tensor, context: Tensor | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNetModel(nn.Module):
    """Predicts noise, data or velocity from a noisy latent.

    Args:
        image_size: not used.
        model_channels, channel_mult: level i has `model_channels * channel_mult[i]` channels.
        num_res_blocks: residual blocks per level.
        attention_resolutions: downsampling factors at which attention follows every residual block: a
            `SpatialTransformer` with `use_spatial_transformer`, else self-attention alone.
        conv_resample: convolve when the resolution changes; with `resblock_updown` inside residual blocks.
        num_classes: size of a class embedding; or "sequential" for a vector [B, adm_in_channels] as condition.
        use_checkpoint: recompute activations in the backward pass, which takes less memory and more time.
        num_heads, num_head_channels: set one; `num_head_channels` takes precedence.
        num_heads_upsample: number of heads of self-attention in the second half.
        use_scale_shift_norm: see `ResBlock`.
        use_new_attention_order: see `AttentionBlock`.
        transformer_depth: blocks per `SpatialTransformer`: one number, or one per level; a level with 0 has none.
        transformer_depth_middle: blocks in the middle; default: as in the last level.
        context_dim: width of the context.
        legacy: with `num_head_channels`, round the size of a spatial transformer's heads up to use all channels.
        use_linear_in_transformer: see `use_linear` of `SpatialTransformer`.
        adm_in_channels: width of the condition with `num_classes: sequential`.
        use_fp16, use_bf16, spatial_transformer_attn_type, disable_middle_self_attn: of YAMLs for Stable Diffusion 2
            and XL. The dtype is that of the weights, and attention is chosen by `attend`, so the first three change
            nothing; the last must be false.
    Raises:
        ConfigError: heads are not set, a spatial transformer and a context width do not come together, or another
            value is not possible.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        num_classes: int | str | None = None,
        use_checkpoint: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int | Sequence[int] = 1,
        context_dim: int | None = None,
        legacy: bool = True,
        use_linear_in_transformer: bool = False,
        transformer_depth_middle: int | None = None,
        adm_in_channels: int | None = None,
        use_fp16: bool = False,
        spatial_transformer_attn_type: str = "softmax",
        disable_middle_self_attn: bool = False,
        use_bf16: bool = False,
    ) -> None:
        super().__init__()
        if use_spatial_transformer != (context_dim is not None):
            raise ConfigError(
                f"UNetModel: use_spatial_transformer={use_spatial_transformer} and context_dim={context_dim} "
                "do not fit together; set both or neither"
            )
        if num_heads == num_head_channels == -1:
            raise ConfigError(
                "UNetModel: num_heads and num_head_channels are both unset (-1); set one of them"
            )
        if isinstance(num_classes, str) and (num_classes != "sequential" or adm_in_channels is None):
            raise ConfigError(
                f"UNetModel: num_classes '{num_classes}' with adm_in_channels {adm_in_channels} is not possible; give "
                "a number, or sequential and the width of the vector as adm_in_channels"
            )
        if disable_middle_self_attn:
            raise ConfigError("UNetModel: disable_middle_self_attn is not supported; leave it out")
        depths = _depths(transformer_depth, len(channel_mult))
        middle_depth = depths[-1] if transformer_depth_middle is None else transformer_depth_middle
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_classes = num_classes
        emb_channels = model_channels * 4

        def residual(channels: int, out: int, **resample: bool) -> ResBlock:
            return ResBlock(
                channels, emb_channels, dropout, out, use_scale_shift_norm, use_checkpoint, **resample
            )

        def attention(channels: int, heads: int, depth: int) -> nn.Module:
            if num_head_channels != -1:
                heads = channels // num_head_channels
            if not use_spatial_transformer:
                return AttentionBlock(channels, heads, use_checkpoint, use_new_attention_order)
            dim_head = channels // heads if legacy or num_head_channels == -1 else num_head_channels
            return SpatialTransformer(
                channels,
                heads,
                dim_head,
                depth,
                context_dim=context_dim,
                use_checkpoint=use_checkpoint,
                use_linear=use_linear_in_transformer,
            )

        def downsample(channels: int) -> nn.Module:
            if resblock_updown:
                return residual(channels, channels, down=True)
            return Downsample(channels, conv_resample)

        def upsample(channels: int) -> nn.Module:
            if resblock_updown:
                return residual(channels, channels, up=True)
            return Upsample(channels, conv_resample)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if isinstance(num_classes, int):
            self.label_emb: nn.Module = nn.Embedding(num_classes, emb_channels)
        elif adm_in_channels is not None and num_classes is not None:
            layers: list[nn.Module] = [nn.Linear(adm_in_channels, emb_channels), nn.SiLU()]
            # A sequence within a sequence, as the names in checkpoints have it.
            self.label_emb = nn.Sequential(nn.Sequential(*layers, nn.Linear(emb_channels, emb_channels)))

        first = TimestepEmbedSequential(nn.Conv2d(in_channels, model_channels, 3, padding=1))
        self.input_blocks = nn.ModuleList([first])
        channels, factor = model_channels, 1
        skips = [channels]
        last_level = len(channel_mult) - 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers = [residual(channels, mult * model_channels)]
                channels = mult * model_channels
                if factor in attention_resolutions and depths[level]:
                    layers.append(attention(channels, num_heads, depths[level]))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(channels)
            if level < last_level:
                self.input_blocks.append(TimestepEmbedSequential(downsample(channels)))
                skips.append(channels)
                factor *= 2

        self.middle_block = TimestepEmbedSequential(
            residual(channels, channels),
            attention(channels, num_heads, middle_depth),
            residual(channels, channels),
        )

        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for index in range(num_res_blocks + 1):
                layers = [residual(channels + skips.pop(), mult * model_channels)]
                channels = mult * model_channels
                if factor in attention_resolutions and depths[level]:
                    # As in the original, `num_heads_upsample` applies to self-attention only.
                    heads = num_heads if use_spatial_transformer else heads_up
                    layers.append(attention(channels, heads, depths[level]))
                if level and index == num_res_blocks:
                    layers.append(upsample(channels))
                    factor //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(
            normalization(channels),
            nn.SiLU(),
            zero_module(nn.Conv2d(channels, out_channels, 3, padding=1)),
        )
        for number, transformer in enumerate(self._transformers().values()):
            transformer.layer = number

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The names of the spatial transformers, in forward order, as papers write them: IN01, ..., MID, OUT03, ...

        The number is that of the block (P+, Voynov et al. 2023). All blocks of one transformer share a name.
        """
        return tuple(self._transformers())

    def _transformers(self) -> dict[str, SpatialTransformer]:
        places = [(f"IN{number:02}", block) for number, block in enumerate(self.input_blocks)]
        places.append(("MID", self.middle_block))
        places += [(f"OUT{number:02}", block) for number, block in enumerate(self.output_blocks)]
        return {
            name: layer
            for name, block in places
            for layer in block.children()
            if isinstance(layer, SpatialTransformer)
        }

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """x: [B, in, H, W]; timesteps: [B]; context: [B, M, context_dim]; returns [B, out, H, W].

        context: or [B, layers or 1, 1 or 2, M, context_dim], a row for each of `layer_names`, keys and values apart.
        y: class ids [B], or a vector [B, adm_in_channels].
        """
        if (y is not None) != (self.num_classes is not None):
            raise ValueError(
                f"class labels {'given' if y is not None else 'missing'}: num_classes={self.num_classes}"
            )
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y if isinstance(self.num_classes, int) else y.to(x.dtype))
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)


def _depths(depth: int | Sequence[int], levels: int) -> list[int]:
    """The number of transformer blocks of each level."""
    depths = [depth] * levels if isinstance(depth, int) else list(depth)
    if len(depths) != levels or any(not isinstance(number, int) or number < 0 for number in depths):
        raise ConfigError(
            f"UNetModel: transformer_depth is {depth} for {levels} levels of channel_mult; give a number for each level"
        )
    return depths
