"""Backgrounds behind a creature, and styles applied to a finished image."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.creatures.builds import pick, uniform
from ldm.data.creatures.world import COLORS, Scene


def paint_background(scenes: Sequence[Scene], x: Tensor, y: Tensor) -> Tensor:
    """Return colours [B, 3, S, S] in [0, 1] for image coordinates `x`, `y` [B, S, S] (y points up)."""
    plain = torch.tensor([s.rgb for s in scenes])[:, :, None, None]
    slope = torch.tensor([0.05 * (2 * s.light - 1) for s in scenes])[:, None, None]
    out = plain * (1 + slope * y)[:, None]
    for i, scene in enumerate(scenes):
        if scene.background not in COLORS:
            out[i] = _PAINTERS[scene.background](random.Random(f"background {scene.seed}"), x[i], y[i])
    return out.clamp_(0, 1)


def _mix(below: Tensor, rgb: tuple[float, float, float], where: Tensor) -> Tensor:
    return torch.where(where, torch.tensor(rgb)[:, None, None], below)


def _sky(y: Tensor, low: tuple[float, float, float], high: tuple[float, float, float]) -> Tensor:
    share = ((y + 1) / 2)[None]
    return torch.tensor(low)[:, None, None] * (1 - share) + torch.tensor(high)[:, None, None] * share


def _disc(x: Tensor, y: Tensor, cx: float, cy: float, radius: float) -> Tensor:
    return (x - cx).square() + (y - cy).square() < radius * radius


def _beach(rng: random.Random, x: Tensor, y: Tensor) -> Tensor:
    horizon = uniform(rng, 0.1, 0.35)
    shore = uniform(rng, -0.35, -0.1)
    out = _sky(y, (0.86, 0.95, 1.0), (0.5, 0.8, 0.98))
    out = _mix(out, (1.0, 0.95, 0.55), _disc(x, y, pick(rng, (-0.7, 0.7)), 0.72, 0.2))
    out = _mix(out, (0.1, 0.55, 0.78), y < horizon)
    wave = shore + 0.05 * torch.sin(x * uniform(rng, 3, 5) + uniform(rng, 0, 6))
    out = _mix(out, (0.93, 0.98, 1.0), y < wave + 0.06)
    return _mix(out, (0.94, 0.83, 0.58), y < wave)


def _forest(rng: random.Random, x: Tensor, y: Tensor) -> Tensor:
    out = _sky(y, (0.8, 0.9, 0.72), (0.68, 0.86, 0.86))
    shift = uniform(rng, -0.15, 0.15)
    for k in range(5):
        cx, top, foot = -0.88 + 0.44 * k + shift, uniform(rng, 0.55, 0.98), -0.42
        out = _mix(out, (0.34, 0.22, 0.12), ((x - cx).abs() < 0.05) & (y < -0.2))
        shade = uniform(rng, 0.8, 1.15)
        width = uniform(rng, 0.24, 0.32)
        tree = ((x - cx).abs() < width * (top - y) / (top - foot)) & (y > foot)
        out = _mix(out, (0.07 * shade, 0.36 * shade, 0.16 * shade), tree)
    return _mix(out, (0.24, 0.42, 0.12), y < -0.5 + 0.04 * torch.sin(x * 4 + shift * 20))


def _night(rng: random.Random, x: Tensor, y: Tensor) -> Tensor:
    out = _sky(y, (0.17, 0.14, 0.36), (0.03, 0.04, 0.16))
    for _ in range(12):
        out = _mix(
            out, (1.0, 0.98, 0.85), _disc(x, y, uniform(rng, -0.95, 0.95), uniform(rng, -0.55, 0.95), 0.042)
        )
    moon_x = pick(rng, (-0.68, 0.68))
    moon = _disc(x, y, moon_x, 0.68, 0.22) & ~_disc(x, y, moon_x + 0.11, 0.74, 0.19)
    out = _mix(out, (1.0, 0.96, 0.7), moon)
    return _mix(out, (0.06, 0.09, 0.1), y < -0.72 + 0.08 * torch.sin(x * 3 + uniform(rng, 0, 6)))


def _snow(rng: random.Random, x: Tensor, y: Tensor) -> Tensor:
    out = _sky(y, (0.8, 0.87, 0.95), (0.5, 0.64, 0.8))
    phase = uniform(rng, 0, 6)
    out = _mix(out, (0.86, 0.91, 0.97), y < -0.05 + 0.14 * torch.sin(x * 2.4 + phase))
    out = _mix(out, (0.98, 0.99, 1.0), y < -0.32 + 0.08 * torch.sin(x * 2.9 + phase * 2))
    for _ in range(12):
        out = _mix(
            out, (1.0, 1.0, 1.0), _disc(x, y, uniform(rng, -0.95, 0.95), uniform(rng, -0.1, 0.95), 0.055)
        )
    return out


_PAINTERS = {"beach": _beach, "forest": _forest, "night": _night, "snow": _snow}


def apply_style(style: str, rgb: Tensor, silhouette: Tensor, outline: Tensor) -> Tensor:
    """Return `rgb` [B, 3, S, S] in [0, 1] in another style; silhouettes and outlines are bool [B, S, S]."""
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
    # Outlines are dark; their light takes the colour around them, inside the creature.
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
    """White lines on blue paper; no colours of the image remain."""
    light = _luminance(rgb)
    paper = torch.tensor([0.08, 0.24, 0.62])[:, None, None] * (0.85 + 0.3 * light)
    fill = paper + 0.16 * silhouette
    line = _edges(rgb, outline)
    return fill * (1 - line) + torch.tensor([0.9, 0.96, 1.0])[:, None, None] * line


def _sunset(rgb: Tensor, silhouette: Tensor, outline: Tensor) -> Tensor:
    """Brightness only, in four colours from plum to cream, like a printed poster."""
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
