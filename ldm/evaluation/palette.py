"""Likeness of colours, without a trained network: for drawings on plain or layered backgrounds."""

from __future__ import annotations

from collections.abc import Sequence

import kornia
import numpy as np
import torch
from PIL import Image

from ldm.evaluation.silhouette import main_shape

# Edges of the histogram's bins in CIELAB: lightness, green to red, blue to yellow.
BINS = (5, 9, 9)
LOW, HIGH = np.array([0.0, -90.0, -100.0]), np.array([100.0, 100.0, 100.0])
# How far a pixel must be from its row's border colour to count as foreground, in CIELAB (2.3 is just noticeable).
THRESHOLD = 20.0


def foreground(picture: Image.Image) -> np.ndarray:
    """Which pixels are the creature's, bool [H, W]: the largest shape that differs from the background of its rows.

    A row's background is between the colours at its left and right end, which suits plain colours and horizons.
    """
    return creature_in(lab(picture))


def creature_in(pixels: np.ndarray) -> np.ndarray:
    """`foreground` of a picture [H, W, 3] that is in CIELAB already."""
    width = pixels.shape[1]
    edge = max(1, width // 16)
    left, right = np.median(pixels[:, :edge], axis=1), np.median(pixels[:, -edge:], axis=1)
    along = np.linspace(0, 1, width)[None, :, None]
    background = left[:, None] * (1 - along) + right[:, None] * along
    return main_shape(np.linalg.norm(pixels - background, axis=2) > THRESHOLD)


def palette(pictures: Sequence[Image.Image]) -> np.ndarray:
    """Share of each colour among the foreground of all pictures, [prod(BINS)], summing to 1."""
    total = sum(histogram(lab(picture)[foreground(picture)]) for picture in pictures)
    return total / total.sum()


def histogram(colors: np.ndarray) -> np.ndarray:
    """Share of each colour, [prod(BINS)], among `colors` [N, 3] in CIELAB; close to zero without any.

    A colour is shared out between neighbouring bins, so that a slightly other hue is a slightly other palette.
    """
    bins = np.array(BINS)
    shares = np.full(BINS, 1e-9)
    place = ((colors - LOW) / (HIGH - LOW)).clip(0, 1) * (bins - 1)
    low = np.minimum(place.astype(int), bins - 2)
    high_part = place - low
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, high_part, 1 - high_part), axis=1)
        np.add.at(shares, tuple((low + corner).T), weight / max(len(colors), 1))
    return shares.ravel()


def palette_overlap(ours: Sequence[Image.Image], theirs: Sequence[Image.Image]) -> float:
    """Histogram intersection of two sets' foreground colours: 0 (nothing shared) to 1 (the same)."""
    return float(np.minimum(palette(ours), palette(theirs)).sum())


def lab(picture: Image.Image) -> np.ndarray:
    """A picture [H, W, 3] in CIELAB, where distances are those an eye sees."""
    rgb = torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32)) / 255
    return kornia.color.rgb_to_lab(rgb.permute(2, 0, 1)).permute(1, 2, 0).numpy()
