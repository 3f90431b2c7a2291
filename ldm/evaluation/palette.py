"""Likeness of colours, without a trained network: for drawings on plain or layered backgrounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

BINS = 6
# How far a pixel must be from its row's border colour to count as foreground, in [0, 1] RGB.
THRESHOLD = 0.18


def foreground(picture: Image.Image) -> np.ndarray:
    """Which pixels differ from the background of their row, bool [H, W].

    A row's background is between the colours at its left and right end, which suits plain colours and horizons.
    """
    pixels = _pixels(picture)
    width = pixels.shape[1]
    edge = max(1, width // 16)
    left, right = np.median(pixels[:, :edge], axis=1), np.median(pixels[:, -edge:], axis=1)
    along = np.linspace(0, 1, width)[None, :, None]
    background = left[:, None] * (1 - along) + right[:, None] * along
    return np.linalg.norm(pixels - background, axis=2) > THRESHOLD


def palette(pictures: Sequence[Image.Image]) -> np.ndarray:
    """Share of each colour among the foreground of all pictures, [BINS^3], summing to 1.

    A pixel is shared out between neighbouring bins, so that a slightly other hue is a slightly other palette.
    """
    histogram = np.full((BINS,) * 3, 1e-9)
    for picture in pictures:
        mask = foreground(picture)
        place = _pixels(picture)[mask] * (BINS - 1)
        low = np.minimum(place.astype(int), BINS - 2)
        high_part = place - low
        for corner in np.ndindex(2, 2, 2):
            weight = np.prod(np.where(corner, high_part, 1 - high_part), axis=1)
            np.add.at(histogram, tuple((low + corner).T), weight / max(len(place), 1))
    return (histogram / histogram.sum()).ravel()


def palette_overlap(ours: Sequence[Image.Image], theirs: Sequence[Image.Image]) -> float:
    """Histogram intersection of two sets' foreground colours: 0 (nothing shared) to 1 (the same)."""
    return float(np.minimum(palette(ours), palette(theirs)).sum())


def _pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
