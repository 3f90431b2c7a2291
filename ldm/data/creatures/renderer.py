"""Rendering of creatures: hundreds of images per second on one core, by signed distances and supersampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.creatures.anatomy import Layer, Parts, parts_of
from ldm.data.creatures.builds import Build
from ldm.data.creatures.scenery import apply_style, paint_background
from ldm.data.creatures.world import Creature, Scene

FAR = 9.0  # a distance outside of every image


def blob_distances(x: Tensor, y: Tensor, rows: Sequence[Sequence[float] | None]) -> Tensor:
    """Return signed distances [B, S, S] to each image's superellipse; FAR for images whose row is None.

    A row is (x, y, half width, half height, exponent, taper). The distance is approximated by level and slope.
    """
    out = torch.full_like(x, FAR)
    index = torch.tensor([i for i, row in enumerate(rows) if row is not None])
    if len(index) == 0:
        return out
    values = torch.tensor([row for row in rows if row is not None], device=x.device)
    cx, cy, width, height, exponent, taper = (column[:, None, None] for column in values.unbind(1))
    v = (y[index] - cy) / height
    narrowed = width * (1 + taper * v.clamp(-1, 1))
    u = ((x[index] - cx) / narrowed).abs().clamp_(min=1e-4)
    v = v.abs_().clamp_(min=1e-4)
    u_rest, v_rest = u.pow(exponent - 1), v.pow(exponent - 1)
    level = (u_rest * u + v_rest * v).clamp_(min=1e-6)
    radius = level.pow(1 / exponent)
    slope = torch.sqrt((u_rest / width) ** 2 + (v_rest / height) ** 2) * radius / level
    out[index] = (radius - 1) / slope.clamp_(min=1e-3)
    return out


def bone_distances(x: Tensor, y: Tensor, rows: Sequence[Sequence[Sequence[float]]], into: Tensor) -> Tensor:
    """Return signed distances [B, S, S] to the union of `into` and each image's tapered bones.

    A bone is (x0, y0, x1, y1, r0, r1). `into` may be overwritten.
    """
    for k in range(max((len(row) for row in rows), default=0)):
        chosen = [i for i, row in enumerate(rows) if len(row) > k]
        values = torch.tensor([rows[i][k] for i in chosen], device=x.device)
        x0, y0, x1, y1, r0, r1 = (column[:, None, None] for column in values.unbind(1))
        everywhere = len(chosen) == len(rows)
        index = torch.tensor(chosen, device=x.device)
        px, py = (x, y) if everywhere else (x[index], y[index])
        px, py = px - x0, py - y0
        bx, by = x1 - x0, y1 - y0
        length = (bx * bx + by * by).clamp(min=1e-9)
        along = (px * (bx / length)).addcmul_(py, by / length).clamp_(0, 1)
        distance = (px - along * bx).square_().add_((py - along * by).square_()).sqrt_()
        distance = distance.sub_(r0).addcmul_(along, r0 - r1)
        if everywhere:
            into = torch.minimum(into, distance)
        else:
            into[index] = torch.minimum(into[index], distance)
    return into


SUPERSAMPLE = 2
CHUNK = 32  # images rendered at once: small enough for a core's cache
OUTLINE = 0.042
# Materials besides the layers.
SECOND = 12
SHADOW = 13
_MATERIALS = 14
CENTRED_FROM = 64  # image size from which stripes and spots are centred on the body
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
    """The input of a style: colours [B, 3, S, S] in [0, 1], and bool [B, S, S] silhouettes and outlines."""

    rgb: Tensor
    silhouette: Tensor
    outline: Tensor


def world_version(size: int) -> int:
    """The version of the world for images of this size: cache files of other versions are ignored.

    Increase it when a seed gives another image than before.
    """
    return 3 if size >= CENTRED_FROM else 1


def render(creatures: Sequence[Creature], scenes: Sequence[Scene], size: int) -> Tensor:
    """Render images, uint8 [B, 3, size, size]."""
    return render_with_masks(creatures, scenes, size)[0]


@torch.no_grad()
def render_with_masks(
    creatures: Sequence[Creature], scenes: Sequence[Scene], size: int
) -> tuple[Tensor, Tensor]:
    """Render images, uint8 [B, 3, size, size], and the share of each pixel that the creature covers [B, size, size]."""
    if len(creatures) != len(scenes):
        raise ValueError(f"{len(creatures)} creatures but {len(scenes)} scenes")
    images, masks = [], []
    for start in range(0, len(creatures), CHUNK):
        chunk = slice(start, start + CHUNK)
        canvas = _paint(creatures[chunk], scenes[chunk], size * SUPERSAMPLE)
        rgb = F.avg_pool2d(canvas.rgb, SUPERSAMPLE)
        images.append((rgb.clamp(0, 1) * 255 + 0.5).to(torch.uint8))
        masks.append(F.avg_pool2d(canvas.silhouette.float()[:, None], SUPERSAMPLE)[:, 0])
    return torch.cat(images), torch.cat(masks)


def _paint(creatures: Sequence[Creature], scenes: Sequence[Scene], size: int) -> Canvas:
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    x, y = (
        axis[None, None, :].expand(len(scenes), size, size),
        -axis[None, :, None].expand(len(scenes), size, size),
    )
    background = paint_background(scenes, x, y)
    px, py = _pose(scenes, x, y)
    material, depth = _layers([parts_of(c, s) for c, s in zip(creatures, scenes, strict=True)], px, py)
    _pattern(creatures, material, px, py, centred=size >= CENTRED_FROM * SUPERSAMPLE)
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
    """Transform image coordinates to each creature's coordinates."""
    values = torch.tensor([(s.x, s.y, s.scale, math.cos(s.tilt), math.sin(s.tilt), s.facing) for s in scenes])
    dx, dy, scale, cos, sin, facing = (column[:, None, None] for column in values.unbind(1))
    u, v = (x - dx) / scale, (y - dy) / scale
    return ((u * cos + v * sin) * facing).contiguous(), (v * cos - u * sin).contiguous()


def _layers(parts: Sequence[Parts], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return materials [B, S, S] (0 is background), and the distance to the edge of the visible layer."""
    material, depth = torch.zeros(x.shape, dtype=torch.int64), torch.zeros_like(x)
    for layer in Layer:
        chosen = [i for i, p in enumerate(parts) if p.bones.get(layer) or layer in p.blobs]
        if not chosen:
            continue
        index = torch.tensor(chosen)
        px, py = x[index], y[index]
        distance = blob_distances(px, py, [parts[i].blobs.get(layer) for i in chosen])
        distance = bone_distances(px, py, [parts[i].bones.get(layer, ()) for i in chosen], distance)
        below, deep = material[index], depth[index]
        if layer in _OUTLINED:
            below = torch.where(distance < OUTLINE, SHADOW, below)
        material[index] = torch.where(distance < 0, int(layer), below)
        depth[index] = torch.where(distance < 0, distance, deep)
    return material, depth


def _pattern(creatures: Sequence[Creature], material: Tensor, x: Tensor, y: Tensor, *, centred: bool) -> None:
    """Set the pattern in the body and shell of `material` to the second colour, in place."""
    for i, creature in enumerate(creatures):
        if creature.pattern == "plain":
            continue
        build, px, py = creature.build, x[i], y[i]
        if creature.pattern in ("stripes", "spots"):
            where = (_centred_pattern if centred else _free_pattern)(creature.pattern, build, px, py)
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


def _free_pattern(pattern: str, build: Build, x: Tensor, y: Tensor) -> Tensor:
    """The mask of stripes or spots with a random phase, as the 32x32 model was trained on.

    Averaged over the phase, stripes and spots are nearly the same image. While noise hides the phase, the word for the
    pattern therefore tells a denoiser very little; the 32x32 model ignores it.
    """
    u, v = _rotated(x, y, build.pattern_angle)
    if pattern == "stripes":
        return torch.frac(u / (0.44 * build.pattern_period) + build.pattern_phase + 64) < 0.46
    period = 0.42 * build.pattern_period
    row = torch.floor(v / period + build.pattern_phase)
    across = torch.frac(u / period + 0.5 * torch.remainder(row, 2) + 64) - 0.5
    along = torch.frac(v / period + build.pattern_phase + 64) - 0.5
    return across.square() + along.square() < 0.15


def _centred_pattern(pattern: str, build: Build, x: Tensor, y: Tensor) -> Tensor:
    """The mask of stripes or spots around the middle of the shell or body, with a small random phase.

    On each side of the middle there is one stripe, or one spot of the middle row, so at least two are visible. Stripes
    cover 62 percent and spots 24 percent, so the average colour of the body depends on the word, also where noise hides
    the pattern itself. With 48 and 41 percent a denoiser had learned next to nothing of the word after 2,800 steps.
    """
    middle_x, middle_y = build.shell[:2] if build.shell[2] else build.body[:2]
    u, v = _rotated(x - middle_x, y - middle_y, build.pattern_angle)
    shift, scale = 0.2 * (build.pattern_phase - 0.5), 0.5 + 0.5 * build.pattern_period
    if pattern == "stripes":
        return (torch.frac(u / (0.44 * scale) + shift + 64) - 0.5).abs() < 0.31
    period = 0.4 * scale
    rows = v / (0.88 * period) + shift + 0.5
    row = torch.floor(rows)
    across = torch.frac(u / period + 0.5 * torch.remainder(row, 2) + 64) - 0.5
    return across.square() + (0.88 * (rows - row - 0.5)).square() < 0.066


def _rotated(x: Tensor, y: Tensor, angle: float) -> tuple[Tensor, Tensor]:
    cos, sin = math.cos(angle), math.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _palettes(creatures: Sequence[Creature]) -> Tensor:
    """Return each creature's colour for each material, [B, 3, materials]."""
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
