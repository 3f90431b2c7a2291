"""What pictures look like without any trained network: colours and shape of the creature, compared in bulk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ldm.evaluation.palette import creature_in, histogram, lab
from ldm.evaluation.silhouette import outline, overlaps

# Shape and colour shares need no more pixels than this on the longer side, and large pictures would take seconds.
LARGEST = 64
_DIRECTIONS, _QUANTILES = 24, 33


@dataclass(frozen=True)
class Looks:
    """Of N pictures: palettes [N, P], outlines [N, S, S] bool, and spreads of colour [N, D].

    Comparisons give one value for each of ours and each of theirs, [N, M].
    """

    palettes: np.ndarray
    outlines: np.ndarray
    spreads: np.ndarray

    @classmethod
    def of(cls, pictures: Sequence[Image.Image], whole: bool = False) -> Looks:
        """Looks of the creatures on `pictures`; `whole` takes the background's colours too, as a style does."""
        found = [_look(_small(picture), whole) for picture in pictures]
        return cls(*(np.stack(values) for values in zip(*found, strict=True)))

    def __len__(self) -> int:
        return len(self.palettes)

    def __getitem__(self, chosen: slice) -> Looks:
        return Looks(self.palettes[chosen], self.outlines[chosen], self.spreads[chosen])

    def palette_overlap(self, theirs: Looks) -> np.ndarray:
        """Intersection of the palettes: 0 (no colour shared) to 1 (the same colours in the same amounts)."""
        return np.stack([np.minimum(ours[None], theirs.palettes).sum(1) for ours in self.palettes])

    def shape_overlap(self, theirs: Looks) -> np.ndarray:
        """Intersection over union of the aligned silhouettes, either way round: 0 to 1."""
        return overlaps(self.outlines, theirs.outlines)

    def color_distance(self, theirs: Looks) -> np.ndarray:
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
