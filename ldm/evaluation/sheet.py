"""A sheet of pictures in labelled rows."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ldm.images import image_grid, labelled


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], scale: int = 3) -> Image.Image:
    """One picture with a row of pictures, `scale` times as large, above each label; at least one row."""
    return stacked([labelled(image_grid(list(row), len(row), scale=scale), label) for label, row in rows])


def stacked(strips: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other, on white."""
    whole = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        whole.paste(strip, (0, top))
        top += strip.height
    return whole
