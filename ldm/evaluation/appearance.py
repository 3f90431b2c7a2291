"""The colours and shape of the creature in an image, measured without a trained network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import kornia
import numpy as np
import torch
from PIL import Image

# Bins of the colour histogram along the axes of CIELAB (lightness, green to red, blue to yellow), and their range.
BINS = (5, 9, 9)
LOW, HIGH = np.array([0.0, -90.0, -100.0]), np.array([100.0, 100.0, 100.0])
# CIELAB distance from the background of its row beyond which a pixel is foreground (2.3 is just noticeable).
FOREGROUND_DISTANCE = 20.0
# Side of an outline, in pixels, and half of it in units of the square root of the shape's area.
OUTLINE_SIDE, OUTLINE_REACH = 48, 1.5
# Larger images are reduced to this many pixels on the longer side: the measures need no more, and it saves seconds.
MAX_SIDE = 64
# The colour distribution is described by so many quantiles along so many directions.
_DIRECTIONS, _QUANTILES = 24, 33


@dataclass(frozen=True)
class AppearanceFeatures:
    """Features of N images: palettes [N, P], outlines bool [N, S, S], and colour quantiles [N, D].

    Comparisons with features of M images return one value per pair, [N, M].
    """

    palettes: np.ndarray
    outlines: np.ndarray
    quantiles: np.ndarray

    @classmethod
    def from_images(cls, images: Sequence[Image.Image], whole: bool = False) -> AppearanceFeatures:
        """Compute the features of the creatures in `images`; `whole` includes the colours of the background."""
        features = [_features_of(_shrink(image), whole) for image in images]
        return cls(*(np.stack(values) for values in zip(*features, strict=True)))

    def __len__(self) -> int:
        return len(self.palettes)

    def __getitem__(self, index: slice) -> AppearanceFeatures:
        return AppearanceFeatures(self.palettes[index], self.outlines[index], self.quantiles[index])

    def palette_overlap(self, theirs: AppearanceFeatures) -> np.ndarray:
        """Histogram intersection of the palettes: 0 (no common colour) to 1 (the same colours and amounts)."""
        return np.stack([np.minimum(ours[None], theirs.palettes).sum(1) for ours in self.palettes])

    def shape_overlap(self, theirs: AppearanceFeatures) -> np.ndarray:
        """Intersection over union of the aligned outlines, mirrored where that fits better: 0 to 1."""
        return outline_iou(self.outlines, theirs.outlines)

    def color_distance(self, theirs: AppearanceFeatures) -> np.ndarray:
        """Sliced Wasserstein distance of the colours in CIELAB (Delta E 1976; 2.3 is just noticeable).

        It is the mean distance by which pixel colours must change. If every colour differs by the same vector, it
        is the length of that vector.
        """
        return np.stack([np.abs(ours[None] - theirs.quantiles).mean(1) for ours in self.quantiles])


def palette_overlap(ours: Sequence[Image.Image], theirs: Sequence[Image.Image]) -> float:
    """Histogram intersection of the foreground colours of two sets: 0 (no common colour) to 1 (the same)."""
    return float(np.minimum(palette(ours), palette(theirs)).sum())


def palette(images: Sequence[Image.Image]) -> np.ndarray:
    """Return the colour histogram of the foreground of all images, [prod(BINS)], with sum 1."""
    total = np.sum([histogram(to_cielab(image)[foreground(image)]) for image in images], axis=0)
    return total / total.sum()


def foreground(image: Image.Image) -> np.ndarray:
    """Return the mask of the creature, bool [H, W]: the largest shape that differs from the background of its rows.

    The background of a row is interpolated between its left and right border: right for plain colours and horizons.
    """
    return _foreground_of_cielab(to_cielab(image))


def _foreground_of_cielab(pixels: np.ndarray) -> np.ndarray:
    """`foreground` of an image [H, W, 3] in CIELAB."""
    width = pixels.shape[1]
    border = max(1, width // 16)
    left, right = np.median(pixels[:, :border], axis=1), np.median(pixels[:, -border:], axis=1)
    position = np.linspace(0, 1, width)[None, :, None]
    background = left[:, None] * (1 - position) + right[:, None] * position
    return largest_component(np.linalg.norm(pixels - background, axis=2) > FOREGROUND_DISTANCE)


def to_cielab(image: Image.Image) -> np.ndarray:
    """Convert an image to CIELAB, [H, W, 3], where distances correspond to visible differences."""
    rgb = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)) / 255
    return kornia.color.rgb_to_lab(rgb.permute(2, 0, 1)).permute(1, 2, 0).numpy()


def histogram(colors: np.ndarray) -> np.ndarray:
    """Return the histogram, [prod(BINS)], of `colors` [N, 3] in CIELAB; nearly 0 everywhere if N is 0.

    Each colour is divided between the neighbouring bins, so that similar colours have similar histograms.
    """
    bins = np.array(BINS)
    shares = np.full(BINS, 1e-9)
    position = ((colors - LOW) / (HIGH - LOW)).clip(0, 1) * (bins - 1)
    low = np.minimum(position.astype(int), bins - 2)
    high_part = position - low
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, high_part, 1 - high_part), axis=1)
        np.add.at(shares, tuple((low + corner).T), weight / max(len(colors), 1))
    return shares.ravel()


def largest_component(mask: np.ndarray) -> np.ndarray:
    """Return the largest connected part of a mask bool [H, W], with its holes filled; an empty mask stays empty.

    This removes specks of the background, and keeps eyes and patterns that have the background's colour.
    """
    if not mask.any():
        return mask
    labels = np.arange(1, mask.size + 1).reshape(mask.shape) * mask
    components = _propagate_labels(labels, mask)
    shape = components == np.argmax(np.bincount(components[mask].ravel()))
    # The background is what can be reached from outside of the image; everything else belongs to the creature.
    free = np.pad(~shape, 1, constant_values=True)
    outside = np.zeros(free.shape, dtype=np.int64)
    outside[0, 0] = 1
    return ~_propagate_labels(outside, free).astype(bool)[1:-1, 1:-1]


def _propagate_labels(labels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Extend each label of [H, W] to all pixels of `mask` connected to it by sides; the highest label wins."""
    while True:
        padded = np.pad(labels, 1)
        neighbours = [
            padded[1:-1, 1:-1],
            padded[:-2, 1:-1],
            padded[2:, 1:-1],
            padded[1:-1, :-2],
            padded[1:-1, 2:],
        ]
        extended = np.maximum.reduce(neighbours) * mask
        if np.array_equal(extended, labels):
            return labels
        labels = extended


def outline(mask: np.ndarray) -> np.ndarray:
    """Return the shape of a mask, bool [OUTLINE_SIDE, OUTLINE_SIDE], centred and scaled to a fixed area.

    A mask that is empty or covers the whole image shows no creature; its outline is empty.
    """
    if not mask.any() or mask.all():
        return np.zeros((OUTLINE_SIDE, OUTLINE_SIDE), dtype=bool)
    y, x = np.nonzero(mask)
    positions = (np.arange(OUTLINE_SIDE) + 0.5) / OUTLINE_SIDE * 2 - 1
    offsets = positions * OUTLINE_REACH * np.sqrt(mask.sum())
    rows, columns = np.rint(y.mean() + offsets).astype(int), np.rint(x.mean() + offsets).astype(int)
    inside = ((rows >= 0) & (rows < mask.shape[0]))[:, None] & ((columns >= 0) & (columns < mask.shape[1]))
    return mask[np.ix_(rows.clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1))] & inside


def outline_iou(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return the intersection over union [N, M] of outlines [N, S, S] and [M, S, S].

    For each pair the second outline is also mirrored, and the higher value counts. Empty outlines give 0.
    """
    left = ours.reshape(len(ours), -1).astype(np.float32)
    best = np.zeros((len(ours), len(theirs)), dtype=np.float32)
    for oriented in (theirs, theirs[:, :, ::-1]):
        right = oriented.reshape(len(oriented), -1).astype(np.float32)
        intersection = left @ right.T
        union = left.sum(1)[:, None] + right.sum(1)[None] - intersection
        best = np.maximum(best, intersection / np.maximum(union, 1))
    return best


def _features_of(image: Image.Image, whole: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Palette, outline and colour quantiles of one image."""
    pixels = to_cielab(image)
    mask = _foreground_of_cielab(pixels)
    # Without a creature the image is all background, and only its colours can be compared.
    colors = pixels.reshape(-1, 3) if whole or not mask.any() else pixels[mask]
    shares = histogram(colors)
    quantiles = np.quantile(colors @ _directions().T, np.linspace(0, 1, _QUANTILES), axis=0)
    # The sum of two neighbouring quantiles is twice their mean. The factor 2 makes the mean over all directions a
    # distance in space, because the projection of a vector on a random direction has on average half its length.
    return shares / shares.sum(), outline(mask), (quantiles[1:] + quantiles[:-1]).T.ravel()


def _directions() -> np.ndarray:
    """Return unit vectors distributed evenly over a sphere, [_DIRECTIONS, 3] (a Fibonacci lattice)."""
    k = np.arange(_DIRECTIONS) + 0.5
    height, angle = 1 - 2 * k / _DIRECTIONS, np.pi * (1 + 5**0.5) * k
    ring = np.sqrt(1 - height**2)
    return np.stack([ring * np.cos(angle), ring * np.sin(angle), height], axis=1)


def _shrink(image: Image.Image) -> Image.Image:
    """Reduce an image to at most MAX_SIDE pixels on the longer side."""
    longer = max(image.size)
    if longer <= MAX_SIDE:
        return image
    width, height = (max(1, round(side * MAX_SIDE / longer)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX)
