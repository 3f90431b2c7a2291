"""Pictures of creatures: hundreds a second on one core, drawn larger and averaged down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.creatures import shapes
from ldm.data.creatures.anatomy import Layer, Parts, parts_of
from ldm.data.creatures.backgrounds import paint_background
from ldm.data.creatures.builds import Build
from ldm.data.creatures.styles import apply_style
from ldm.data.creatures.world import Creature, Scene

SUPERSAMPLE = 2
CHUNK = 32  # pictures painted at once: small enough to stay in a core's cache
OUTLINE = 0.042
SECOND = 12  # material beyond the layers
SHADOW = 13
_MATERIALS = 14
STEADY_FROM = 64  # the size from which stripes and spots lie around the middle of the body
_HORN_RGB, _BEAK_RGB = (0.96, 0.91, 0.74), (0.99, 0.72, 0.12)
_OUTLINED = {
    Layer.BACK,
    Layer.HORN,
    Layer.BODY,
    Layer.SHELL,
    Layer.WING,
    Layer.HEAD,
    Layer.EAR,
    Layer.BEAK,
    Layer.EYE,
}


@dataclass
class Canvas:
    """What a style may use: colours [B, 3, S, S] in [0, 1], the creature's silhouette and outlines [B, S, S] bool."""

    rgb: Tensor
    silhouette: Tensor
    outline: Tensor


def world_version(size: int) -> int:
    """Raise it when the same seed gives another picture of this size: cached files of old versions are then ignored."""
    return 2 if size >= STEADY_FROM else 1


def render(creatures: Sequence[Creature], scenes: Sequence[Scene], size: int) -> Tensor:
    """Pictures as uint8 [B, 3, size, size]."""
    return render_with_masks(creatures, scenes, size)[0]


@torch.no_grad()
def render_with_masks(
    creatures: Sequence[Creature], scenes: Sequence[Scene], size: int
) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [B, 3, size, size] and the share of each pixel the creature covers, float [B, size, size]."""
    if len(creatures) != len(scenes):
        raise ValueError(f"{len(creatures)} creatures but {len(scenes)} scenes")
    pictures, masks = [], []
    for start in range(0, len(creatures), CHUNK):
        chunk = slice(start, start + CHUNK)
        canvas = _paint(creatures[chunk], scenes[chunk], size * SUPERSAMPLE)
        rgb = F.avg_pool2d(canvas.rgb, SUPERSAMPLE)
        pictures.append((rgb.clamp(0, 1) * 255 + 0.5).to(torch.uint8))
        masks.append(F.avg_pool2d(canvas.silhouette.float()[:, None], SUPERSAMPLE)[:, 0])
    return torch.cat(pictures), torch.cat(masks)


def _paint(creatures: Sequence[Creature], scenes: Sequence[Scene], size: int) -> Canvas:
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    x, y = (
        axis[None, None, :].expand(len(scenes), size, size),
        -axis[None, :, None].expand(len(scenes), size, size),
    )
    background = paint_background(scenes, x, y)
    px, py = _pose(scenes, x, y)
    material, depth = _layers([parts_of(c, s) for c, s in zip(creatures, scenes, strict=True)], px, py)
    _pattern(creatures, material, px, py, steady=size >= STEADY_FROM * SUPERSAMPLE)
    palette = _palettes(creatures)
    index = material[:, None].expand(-1, 3, -1, -1).reshape(len(scenes), 3, -1)
    rgb = palette.gather(2, index).view_as(background)
    silhouette = material > 0
    toward = torch.tensor([0.6 * s.light - 0.3 for s in scenes])[:, None, None]
    shade = 1.03 + 0.13 * (y - toward * x * 2) - 0.22 * torch.exp(depth.clamp(max=0) * 14)
    flat = (material == Layer.EYE) | (material == Layer.PUPIL) | (material == SHADOW)
    rgb = (rgb * torch.where(flat, 1.0, shade)[:, None]).clamp_(0, 1)
    rgb = torch.where(silhouette[:, None], rgb, background)
    canvas = Canvas(rgb, silhouette, material == SHADOW)
    for style in sorted({s.style for s in scenes} - {"photo"}):
        chosen = torch.tensor([i for i, s in enumerate(scenes) if s.style == style])
        part = Canvas(canvas.rgb[chosen], silhouette[chosen], canvas.outline[chosen])
        canvas.rgb[chosen] = apply_style(style, part.rgb, part.silhouette, part.outline)
    return canvas


def _pose(scenes: Sequence[Scene], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Picture coordinates into each creature's own."""
    values = torch.tensor([(s.x, s.y, s.scale, math.cos(s.tilt), math.sin(s.tilt), s.facing) for s in scenes])
    dx, dy, scale, cos, sin, facing = (column[:, None, None] for column in values.unbind(1))
    u, v = (x - dx) / scale, (y - dy) / scale
    return ((u * cos + v * sin) * facing).contiguous(), (v * cos - u * sin).contiguous()


def _layers(parts: Sequence[Parts], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Materials [B, S, S] (0 where the background shows) and the distance to the edge of the layer that is seen."""
    material, depth = torch.zeros(x.shape, dtype=torch.int64), torch.zeros_like(x)
    for layer in Layer:
        chosen = [i for i, p in enumerate(parts) if p.bones.get(layer) or layer in p.blobs]
        if not chosen:
            continue
        index = torch.tensor(chosen)
        px, py = x[index], y[index]
        distance = shapes.blobs(px, py, [parts[i].blobs.get(layer) for i in chosen])
        distance = shapes.bones(px, py, [parts[i].bones.get(layer, ()) for i in chosen], distance)
        below, deep = material[index], depth[index]
        if layer in _OUTLINED:
            below = torch.where(distance < OUTLINE, SHADOW, below)
        material[index] = torch.where(distance < 0, int(layer), below)
        depth[index] = torch.where(distance < 0, distance, deep)
    return material, depth


def _pattern(creatures: Sequence[Creature], material: Tensor, x: Tensor, y: Tensor, steady: bool) -> None:
    """Paints the second colour into the body and shell of `material`, in place."""
    for i, creature in enumerate(creatures):
        if creature.pattern == "plain":
            continue
        build, px, py = creature.build, x[i], y[i]
        if creature.pattern in ("stripes", "spots"):
            where = (_steady if steady else _drifting)(creature.pattern, build, px, py)
        else:
            bx, by, width, height, _ = build.body
            if build.shell[2]:
                bx, by, width, height = (*build.shell[:2], build.shell[2], build.shell[2])
                where = ((px - bx) / width).square() + ((py - by) / height).square() < 0.4
            elif build.head_apart:
                by -= 0.14 * height
                where = ((px - bx) / (0.74 * width)).square() + ((py - by) / (0.8 * height)).square() < 1
            else:
                where = py < by - 0.24 * height
        if not build.head_apart:
            hx, hy, *_ = build.head
            where &= ((px - hx) / 0.36).square() + ((py - hy) / 0.34).square() > 1
        coloured = (material[i] == Layer.BODY) | (material[i] == Layer.SHELL)
        material[i][coloured & where] = SECOND


def _drifting(pattern: str, build: Build, x: Tensor, y: Tensor) -> Tensor:
    """Where stripes or spots are that begin anywhere, as at 32x32, which the shipped model was trained on.

    Averaged over where they begin, stripes and spots are the same picture; so while a denoiser cannot see yet where
    they lie, the word for them tells it nothing, and it learns to do without the word.
    """
    u, v = _turned(x, y, build.pattern_angle)
    if pattern == "stripes":
        return torch.frac(u / (0.44 * build.pattern_period) + build.pattern_phase + 64) < 0.46
    period = 0.42 * build.pattern_period
    row = torch.floor(v / period + build.pattern_phase)
    across = torch.frac(u / period + 0.5 * torch.remainder(row, 2) + 64) - 0.5
    along = torch.frac(v / period + build.pattern_phase + 64) - 0.5
    return across.square() + along.square() < 0.15


def _steady(pattern: str, build: Build, x: Tensor, y: Tensor) -> Tensor:
    """Where stripes or spots are that lie around the middle of the shell or body, with a small part left to chance.

    Either side of the middle there is a stripe, or a spot in the middle row: so there are two at least to be seen.
    """
    middle_x, middle_y = build.shell[:2] if build.shell[2] else build.body[:2]
    u, v = _turned(x - middle_x, y - middle_y, build.pattern_angle)
    shift, scale = 0.2 * (build.pattern_phase - 0.5), 0.5 + 0.5 * build.pattern_period
    if pattern == "stripes":
        return (torch.frac(u / (0.42 * scale) + shift + 64) - 0.5).abs() < 0.24
    period = 0.38 * scale
    rows = v / (0.88 * period) + shift + 0.5
    row = torch.floor(rows)
    across = torch.frac(u / period + 0.5 * torch.remainder(row, 2) + 64) - 0.5
    return across.square() + (0.88 * (rows - row - 0.5)).square() < 0.115


def _turned(x: Tensor, y: Tensor, angle: float) -> tuple[Tensor, Tensor]:
    cos, sin = math.cos(angle), math.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _palettes(creatures: Sequence[Creature]) -> Tensor:
    """Each creature's colour of each material, [B, 3, materials]."""
    body = torch.tensor([c.rgb for c in creatures])
    palette = body[:, :, None].repeat(1, 1, _MATERIALS)
    palette[:, :, Layer.BACK] = body * 0.88
    palette[:, :, Layer.WING] = body * 0.8
    palette[:, :, Layer.EAR] = body * 0.86
    palette[:, :, Layer.MUZZLE] = body * 0.6 + 0.4
    palette[:, :, Layer.HORN] = torch.tensor(_HORN_RGB)
    palette[:, :, Layer.BEAK] = torch.tensor(_BEAK_RGB)
    palette[:, :, Layer.EYE] = 1.0
    palette[:, :, Layer.PUPIL] = 0.04
    palette[:, :, SECOND] = torch.tensor([c.second_rgb for c in creatures])
    palette[:, :, SHADOW] = body * 0.28
    return palette
