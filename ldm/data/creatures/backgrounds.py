"""What stands behind a creature: a plain colour or one of a few scenes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.data.creatures.chance import pick, spread
from ldm.data.creatures.world import COLORS, Scene


def paint_background(scenes: Sequence[Scene], x: Tensor, y: Tensor) -> Tensor:
    """Colours [B, 3, S, S] in [0, 1] for picture coordinates `x`, `y` [B, S, S] (y points up)."""
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
    horizon = spread(rng, 0.1, 0.35)
    shore = spread(rng, -0.35, -0.1)
    out = _sky(y, (0.86, 0.95, 1.0), (0.5, 0.8, 0.98))
    out = _mix(out, (1.0, 0.95, 0.55), _disc(x, y, pick(rng, (-0.7, 0.7)), 0.72, 0.2))
    out = _mix(out, (0.1, 0.55, 0.78), y < horizon)
    wave = shore + 0.05 * torch.sin(x * spread(rng, 3, 5) + spread(rng, 0, 6))
    out = _mix(out, (0.93, 0.98, 1.0), y < wave + 0.06)
    return _mix(out, (0.94, 0.83, 0.58), y < wave)


def _forest(rng: random.Random, x: Tensor, y: Tensor) -> Tensor:
    out = _sky(y, (0.8, 0.9, 0.72), (0.68, 0.86, 0.86))
    shift = spread(rng, -0.15, 0.15)
    for k in range(5):
        cx, top, foot = -0.88 + 0.44 * k + shift, spread(rng, 0.55, 0.98), -0.42
        out = _mix(out, (0.34, 0.22, 0.12), ((x - cx).abs() < 0.05) & (y < -0.2))
        shade = spread(rng, 0.8, 1.15)
        width = spread(rng, 0.24, 0.32)
        tree = ((x - cx).abs() < width * (top - y) / (top - foot)) & (y > foot)
        out = _mix(out, (0.07 * shade, 0.36 * shade, 0.16 * shade), tree)
    return _mix(out, (0.24, 0.42, 0.12), y < -0.5 + 0.04 * torch.sin(x * 4 + shift * 20))


def _night(rng: random.Random, x: Tensor, y: Tensor) -> Tensor:
    out = _sky(y, (0.17, 0.14, 0.36), (0.03, 0.04, 0.16))
    for _ in range(12):
        out = _mix(
            out, (1.0, 0.98, 0.85), _disc(x, y, spread(rng, -0.95, 0.95), spread(rng, -0.55, 0.95), 0.042)
        )
    moon_x = pick(rng, (-0.68, 0.68))
    moon = _disc(x, y, moon_x, 0.68, 0.22) & ~_disc(x, y, moon_x + 0.11, 0.74, 0.19)
    out = _mix(out, (1.0, 0.96, 0.7), moon)
    return _mix(out, (0.06, 0.09, 0.1), y < -0.72 + 0.08 * torch.sin(x * 3 + spread(rng, 0, 6)))


def _snow(rng: random.Random, x: Tensor, y: Tensor) -> Tensor:
    out = _sky(y, (0.8, 0.87, 0.95), (0.5, 0.64, 0.8))
    phase = spread(rng, 0, 6)
    out = _mix(out, (0.86, 0.91, 0.97), y < -0.05 + 0.14 * torch.sin(x * 2.4 + phase))
    out = _mix(out, (0.98, 0.99, 1.0), y < -0.32 + 0.08 * torch.sin(x * 2.9 + phase * 2))
    for _ in range(12):
        out = _mix(
            out, (1.0, 1.0, 1.0), _disc(x, y, spread(rng, -0.95, 0.95), spread(rng, -0.1, 0.95), 0.055)
        )
    return out


_PAINTERS = {"beach": _beach, "forest": _forest, "night": _night, "snow": _snow}
