"""Shapes of creatures, without a trained network: cut out, brought to one place and size, and laid over each other."""

from __future__ import annotations

import numpy as np

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
