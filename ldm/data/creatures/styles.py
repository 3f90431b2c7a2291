"""Treatments of a finished picture: those the model learns, and two that it never sees in training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def apply_style(style: str, rgb: Tensor, silhouette: Tensor, outline: Tensor) -> Tensor:
    """`rgb` [B, 3, S, S] in [0, 1] redone in `style`; silhouettes and outlines are bool [B, S, S]."""
    return _STYLES[style](rgb, silhouette[:, None].float(), outline[:, None].float()).clamp(0, 1)


def _axes(rgb: Tensor) -> tuple[Tensor, Tensor]:
    axis = (torch.arange(rgb.shape[-1]) + 0.5) / rgb.shape[-1]
    return axis[None, :], axis[:, None]


def _luminance(rgb: Tensor) -> Tensor:
    return (rgb * torch.tensor([0.3, 0.59, 0.11])[:, None, None]).sum(1, keepdim=True)


def _blur(mask: Tensor, width: float) -> Tensor:
    kernel = max(3, int(mask.shape[-1] * width) // 2 * 2 + 1)
    for _ in range(2):
        mask = F.avg_pool2d(mask, kernel, 1, kernel // 2)
    return mask


def _edges(rgb: Tensor, outline: Tensor) -> Tensor:
    """Outlines, and where the brightness inside jumps: eyes, patterns, the horizon."""
    light = _luminance(rgb)
    dx = (light[..., :, 1:] - light[..., :, :-1]).abs()
    dy = (light[..., 1:, :] - light[..., :-1, :]).abs()
    jump = F.pad(dx, (0, 1)) + F.pad(dy, (0, 0, 0, 1))
    return torch.maximum(outline, (jump > 0.14).float())


def _sketch(rgb: Tensor, silhouette: Tensor, outline: Tensor) -> Tensor:
    x, y = _axes(rgb)
    hatch = 0.5 + 0.5 * torch.sin((x + y) * 2 * torch.pi * 8)
    paper = torch.tensor([0.97, 0.96, 0.92])[:, None, None]
    strength = silhouette * (0.5 + 0.2 * hatch) + (1 - silhouette) * (0.18 + 0.16 * hatch)
    drawn = paper * (1 - strength) + rgb * strength
    line = _edges(rgb, outline)
    return drawn * (1 - 0.85 * line) + 0.16 * 0.85 * line


def _neon(rgb: Tensor, silhouette: Tensor, outline: Tensor) -> Tensor:
    edge = _edges(rgb, outline)
    hue = rgb / rgb.amax(1, keepdim=True).clamp(min=0.15)
    hue = (hue - 0.25 * hue.amin(1, keepdim=True)).clamp(0, 1)
    # Outlines are dark: their light takes the colour around them, inside the creature.
    weight = (silhouette * (1 - outline)).clamp(min=1e-3)
    near = _blur(hue * weight, 0.12) / _blur(weight, 0.12).clamp(min=1e-3)
    glow = _blur(outline, 0.07)
    dark = 0.05 + 0.1 * rgb + 0.45 * silhouette * (1 - outline) * rgb
    return dark + near * (0.9 * glow + 0.95 * torch.maximum(outline, 0.5 * edge * silhouette))


def _mosaic(rgb: Tensor, silhouette: Tensor, outline: Tensor) -> Tensor:
    size = rgb.shape[-1]
    tiles = 11
    mean = F.interpolate(F.adaptive_avg_pool2d(rgb, tiles), size=(size, size), mode="nearest")
    x, y = _axes(rgb)
    grout = (torch.frac(x * tiles) < 0.2) | (torch.frac(y * tiles) < 0.2)
    return (0.55 * mean + 0.45 * rgb) * torch.where(grout, 0.66, 1.1)


def _painting(rgb: Tensor, silhouette: Tensor, outline: Tensor) -> Tensor:
    x, y = _axes(rgb)
    u = x + 0.010 * torch.sin(y * 34) + 0.007 * torch.sin(x * 21 + y * 13)
    v = y + 0.010 * torch.sin(x * 31) + 0.007 * torch.sin(y * 23 - x * 17)
    grid = torch.stack([u, v], -1)[None] * 2 - 1
    soft = F.grid_sample(
        _blur(rgb, 0.03),
        grid.expand(len(rgb), -1, -1, -1),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    stroke = 0.5 + 0.5 * torch.sin((x * 0.7 - y) * 2 * torch.pi * 7 + 3 * torch.sin(x * 9))
    light = soft.mean(1, keepdim=True)
    vivid = light + (soft - light) * 1.2
    return vivid * (0.84 + 0.24 * stroke) * torch.tensor([1.03, 1.0, 0.9])[:, None, None] + 0.02


def _blueprint(rgb: Tensor, silhouette: Tensor, outline: Tensor) -> Tensor:
    """White lines on blue paper: colours are gone, the drawing stays."""
    light = _luminance(rgb)
    paper = torch.tensor([0.08, 0.24, 0.62])[:, None, None] * (0.85 + 0.3 * light)
    fill = paper + 0.16 * silhouette
    line = _edges(rgb, outline)
    return fill * (1 - line) + torch.tensor([0.9, 0.96, 1.0])[:, None, None] * line


def _sunset(rgb: Tensor, silhouette: Tensor, outline: Tensor) -> Tensor:
    """Brightness alone, from plum over orange to cream, in few steps, as a printed poster."""
    light = _luminance(rgb).clamp(0, 1)
    stops = torch.tensor([[0.2, 0.05, 0.28], [0.72, 0.16, 0.36], [0.97, 0.52, 0.22], [1.0, 0.92, 0.68]])
    level = (light * 3.999).floor().long().clamp(0, 3)[:, 0]
    return stops[level].permute(0, 3, 1, 2)


_STYLES = {
    "sketch": _sketch,
    "neon": _neon,
    "mosaic": _mosaic,
    "painting": _painting,
    "blueprint": _blueprint,
    "sunset": _sunset,
}
