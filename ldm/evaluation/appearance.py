"""What images look like without any trained network: colours and shape of the creature, compared in bulk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import kornia
import numpy as np
import torch
from PIL import Image

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


SIDE = 48
# Half the side of an outline's square, in units of the square root of the shape's area: long necks fit in.
REACH = 1.5


def main_shape(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask bool [H, W], its holes filled: a creature without specks of scenery.

    Holes are eyes or a pattern in the background's colour. An empty mask stays empty.
    """
    if not mask.any():
        return mask
    labels = np.arange(1, mask.size + 1).reshape(mask.shape) * mask
    grown = _grown(labels, mask)
    shape = grown == np.argmax(np.bincount(grown[mask].ravel()))
    # What the frame's outside reaches is background, everything else belongs to the creature.
    room = np.pad(~shape, 1, constant_values=True)
    outside = np.zeros(room.shape, dtype=np.int64)
    outside[0, 0] = 1
    return ~_grown(outside, room).astype(bool)[1:-1, 1:-1]


def outline(mask: np.ndarray) -> np.ndarray:
    """A mask's shape [SIDE, SIDE] bool, its centroid in the middle and its area always the same.

    An empty mask, or one that fills the whole picture, gives an empty shape: there is no creature to see.
    """
    if not mask.any() or mask.all():
        return np.zeros((SIDE, SIDE), dtype=bool)
    y, x = np.nonzero(mask)
    offsets = ((np.arange(SIDE) + 0.5) / SIDE * 2 - 1) * REACH * np.sqrt(mask.sum())
    rows, columns = np.rint(y.mean() + offsets).astype(int), np.rint(x.mean() + offsets).astype(int)
    inside = ((rows >= 0) & (rows < mask.shape[0]))[:, None] & ((columns >= 0) & (columns < mask.shape[1]))
    return mask[np.ix_(rows.clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1))] & inside


def overlaps(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Intersection over union [N, M] of outlines [N, SIDE, SIDE] and [M, SIDE, SIDE], mirrored where that fits better.

    Empty outlines are like nothing: 0.
    """
    left = ours.reshape(len(ours), -1).astype(np.float32)
    best = np.zeros((len(ours), len(theirs)), dtype=np.float32)
    for turned in (theirs, theirs[:, :, ::-1]):
        right = turned.reshape(len(turned), -1).astype(np.float32)
        shared = left @ right.T
        union = left.sum(1)[:, None] + right.sum(1)[None] - shared
        best = np.maximum(best, shared / np.maximum(union, 1))
    return best


def _grown(labels: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Each label [H, W] spread over the pixels of `within` that it reaches by sides; the higher label wins."""
    while True:
        around = np.pad(labels, 1)
        spread = np.maximum.reduce(
            [around[1:-1, 1:-1], around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]]
        )
        spread = spread * within
        if np.array_equal(spread, labels):
            return labels
        labels = spread


# Shape and colour shares need no more pixels than this on the longer side, and large pictures would take seconds.
LARGEST = 64
_DIRECTIONS, _QUANTILES = 24, 33


@dataclass(frozen=True)
class AppearanceFeatures:
    """Of N pictures: palettes [N, P], outlines [N, S, S] bool, and spreads of colour [N, D].

    Comparisons give one value for each of ours and each of theirs, [N, M].
    """

    palettes: np.ndarray
    outlines: np.ndarray
    spreads: np.ndarray

    @classmethod
    def of(cls, pictures: Sequence[Image.Image], whole: bool = False) -> AppearanceFeatures:
        """Looks of the creatures on `pictures`; `whole` takes the background's colours too, as a style does."""
        found = [_look(_small(picture), whole) for picture in pictures]
        return cls(*(np.stack(values) for values in zip(*found, strict=True)))

    def __len__(self) -> int:
        return len(self.palettes)

    def __getitem__(self, chosen: slice) -> AppearanceFeatures:
        return AppearanceFeatures(self.palettes[chosen], self.outlines[chosen], self.spreads[chosen])

    def palette_overlap(self, theirs: AppearanceFeatures) -> np.ndarray:
        """Intersection of the palettes: 0 (no colour shared) to 1 (the same colours in the same amounts)."""
        return np.stack([np.minimum(ours[None], theirs.palettes).sum(1) for ours in self.palettes])

    def shape_overlap(self, theirs: AppearanceFeatures) -> np.ndarray:
        """Intersection over union of the aligned silhouettes, either way round: 0 to 1."""
        return overlaps(self.outlines, theirs.outlines)

    def color_distance(self, theirs: AppearanceFeatures) -> np.ndarray:
        """How far the creature's colours are from theirs in CIELAB (Delta E 1976; 2.3 is just noticeable).

        A sliced Wasserstein distance between the colours of all its pixels: the amount by which each pixel's colour
        must move, averaged. A creature whose every colour is off by the same vector is off by its length.
        """
        return np.stack([np.abs(ours[None] - theirs.spreads).mean(1) for ours in self.spreads])


def _look(picture: Image.Image, whole: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    colors = lab(picture)
    mask = creature_in(colors)
    # Without a creature the picture is all background, and its colours are what there is to compare.
    seen = colors.reshape(-1, 3) if whole or not mask.any() else colors[mask]
    shares = histogram(seen)
    along = np.quantile(seen @ _directions().T, np.linspace(0, 1, _QUANTILES), axis=0)
    # The middle between two quantiles, doubled: along a direction lies on average half of a distance in space.
    return shares / shares.sum(), outline(mask), (along[1:] + along[:-1]).T.ravel()


def _directions() -> np.ndarray:
    """Unit vectors spread evenly over a sphere, [_DIRECTIONS, 3], always the same."""
    k = np.arange(_DIRECTIONS) + 0.5
    height, turn = 1 - 2 * k / _DIRECTIONS, np.pi * (1 + 5**0.5) * k
    ring = np.sqrt(1 - height**2)
    return np.stack([ring * np.cos(turn), ring * np.sin(turn), height], axis=1)


def _small(picture: Image.Image) -> Image.Image:
    longer = max(picture.size)
    if longer <= LARGEST:
        return picture
    size = tuple(max(1, round(side * LARGEST / longer)) for side in picture.size)
    return picture.resize(size, Image.Resampling.BOX)
