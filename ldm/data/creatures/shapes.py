"""Signed distances of many pictures at once, in torch: negative inside, in the creature's units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FAR = 9.0


def blobs(x: Tensor, y: Tensor, rows: Sequence[Sequence[float] | None]) -> Tensor:
    """Distances to each picture's superellipse (x, y, half width, half height, exponent, taper); FAR where None."""
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


def bones(x: Tensor, y: Tensor, rows: Sequence[Sequence[Sequence[float]]], into: Tensor) -> Tensor:
    """The union of `into` and each picture's tapered bones (x0, y0, x1, y1, r0, r1); `into` may be overwritten."""
    for k in range(max((len(row) for row in rows), default=0)):
        chosen = [i for i, row in enumerate(rows) if len(row) > k]
        values = torch.tensor([rows[i][k] for i in chosen], device=x.device)
        x0, y0, x1, y1, r0, r1 = (column[:, None, None] for column in values.unbind(1))
        everyone = len(chosen) == len(rows)
        index = torch.tensor(chosen, device=x.device)
        px, py = (x, y) if everyone else (x[index], y[index])
        px, py = px - x0, py - y0
        bx, by = x1 - x0, y1 - y0
        length = (bx * bx + by * by).clamp(min=1e-9)
        along = (px * (bx / length)).addcmul_(py, by / length).clamp_(0, 1)
        distance = (px - along * bx).square_().add_((py - along * by).square_()).sqrt_()
        distance = distance.sub_(r0).addcmul_(along, r0 - r1)
        if everyone:
            into = torch.minimum(into, distance)
        else:
            into[index] = torch.minimum(into[index], distance)
    return into
