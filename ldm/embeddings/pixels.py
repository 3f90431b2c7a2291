"""The code that hides bytes in the low halves of the pixels beside a picture, as AUTOMATIC1111 shares embeddings."""

from __future__ import annotations

import numpy as np

_CELL = 8  # side of the squares of the visible pattern on the strips


def noise(count: int) -> np.ndarray:
    """[count] uint8: the linear congruential numbers that whiten the payload (Numerical Recipes' constants)."""
    powers = np.ones(count, np.uint32)
    powers[1:] = np.cumprod(np.full(max(count - 1, 0), 1664525, np.uint32), dtype=np.uint32)
    seeds = np.cumsum(powers, dtype=np.uint32) * np.uint32(1013904223)
    return (seeds % 255).astype(np.uint8)


def hide(payload: bytes, picture: np.ndarray, shades: np.ndarray) -> np.ndarray:
    """[H, W', 3] uint8: the picture [H, W, 3] between two strips that hold the payload.

    The left strip holds the low halves of the bytes, the right one the high halves, both in the low halves of
    their pixels. `shades` in [0, 1] colour the strips and mean nothing.
    """
    height = picture.shape[0]
    data = np.frombuffer(payload, np.uint8)
    # Padded by repetition to whole columns; the compressed stream inside knows its own end.
    size = -(-(len(data) + 1) // (3 * height)) * 3 * height
    data = np.resize(data, size).reshape(height, -1, 3)
    whitened = noise(size).reshape(data.shape) & 15
    pattern = _pattern(data.shape[:2], shades)[..., None] << 4
    left = (data & 15 ^ whitened) | pattern
    right = (data >> 4 ^ whitened) | pattern[:, ::-1]
    line = np.zeros((height, 1, 3), np.uint8)
    return np.concatenate([left, line, picture, line, right], axis=1)


def reveal(canvas: np.ndarray) -> bytes | None:
    """The bytes hidden in [H, W, 3] uint8, padding included; None if there is no sign of any."""
    lit = (canvas > 0).all(axis=2)
    rows, columns = np.flatnonzero(lit.any(axis=1)), np.flatnonzero(lit.any(axis=0))
    if not len(rows):
        return None
    halves = canvas[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 15
    lines = np.flatnonzero(halves.sum(axis=(0, 2)) == 0)
    if len(lines) < 2:
        return None
    low, high = halves[:, : lines[0]], halves[:, lines[-1] + 1 :]
    if low.shape != high.shape or not low.size:
        return None
    whitened = noise(low.size).reshape(low.shape) & 15
    return ((high ^ whitened) << 4 | (low ^ whitened)).tobytes()


def _pattern(shape: tuple[int, int], shades: np.ndarray) -> np.ndarray:
    """[H, W] uint8 in 2..15: never black, because readers cut black borders off."""
    rows, columns = (-(-length // _CELL) for length in shape)
    cells = np.resize(shades, rows * columns).reshape(rows, columns)
    cells = 2 + np.rint(np.clip(cells, 0, 1) * 13).astype(np.uint8)
    return cells.repeat(_CELL, axis=0).repeat(_CELL, axis=1)[: shape[0], : shape[1]]
