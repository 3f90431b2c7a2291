"""Curves over the steps of a run as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 720, 180
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 30, 24
INK, GREY, LINE, MARK = "black", "#bbbbbb", "#1f5fa8", "#c0392b"


@dataclass(frozen=True)
class Curve:
    """Values at steps, both of one length, under a title; values that are not finite are left out."""

    title: str
    steps: Sequence[int]
    values: Sequence[float]


def draw_curves(curves: Sequence[Curve], mark: int | None = None) -> Image.Image:
    """One panel below the other over the same steps; `mark` is a step with a red line."""
    last = max((step for curve in curves for step in curve.steps), default=1) or 1
    sheet = Image.new("RGB", (WIDTH, HEIGHT * max(1, len(curves))), "white")
    draw = ImageDraw.Draw(sheet)
    for number, curve in enumerate(curves):
        _panel(draw, curve, HEIGHT * number, last, mark)
    return sheet


def _panel(draw: ImageDraw.ImageDraw, curve: Curve, y: int, last: int, mark: int | None) -> None:
    font = ImageFont.load_default(size=12)
    points = [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if math.isfinite(v)]
    low, high = min((v for _, v in points), default=0.0), max((v for _, v in points), default=1.0)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin
    top, bottom, right = y + TOP, y + HEIGHT - BOTTOM, WIDTH - RIGHT

    def place(step: int, value: float) -> tuple[float, float]:
        share = (value - low) / (high - low)
        return LEFT + (right - LEFT) * step / last, bottom - (bottom - top) * share

    draw.text((LEFT, y + 8), curve.title, fill=INK, font=font)
    draw.rectangle((LEFT, top, right, bottom), outline=GREY)
    for value in (low + margin, high - margin):
        height = place(0, value)[1]
        draw.line((LEFT - 4, height, LEFT, height), fill=INK)
        draw.text((LEFT - 8, height), f"{value:.4g}", fill=INK, font=font, anchor="rm")
    for step, anchor in ((0, "la"), (last, "ra")):
        draw.text((place(step, low)[0], bottom + 4), f"step {step}", fill=INK, font=font, anchor=anchor)
    if mark is not None:
        x = place(mark, low)[0]
        draw.line((x, top, x, bottom), fill=MARK)
    places = [place(*point) for point in points]
    if len(places) > 1:
        draw.line(places, fill=LINE, width=2)
    for x, height in places[-1:]:
        draw.ellipse((x - 3, height - 3, x + 3, height + 3), fill=LINE)
