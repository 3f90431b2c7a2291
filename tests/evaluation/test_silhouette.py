from __future__ import annotations

import numpy as np
import pytest

from ldm.evaluation.appearance import main_shape, outline, overlaps


def ell(side: int = 40, left: int = 5, top: int = 5, unit: int = 6) -> np.ndarray:
    """An L: what is mirrored or turned is not the same."""
    mask = np.zeros((side, side), dtype=bool)
    mask[top : top + 4 * unit, left : left + unit] = True
    mask[top + 3 * unit : top + 4 * unit, left : left + 3 * unit] = True
    return mask


def test_specks_go_and_holes_are_filled() -> None:
    mask = ell()
    dirty = mask.copy()
    dirty[10, 7] = False
    dirty[2, 35] = dirty[30:33, 33] = True
    assert np.array_equal(main_shape(dirty), mask)
    assert not main_shape(np.zeros((4, 4), dtype=bool)).any()


def test_a_shape_at_the_frame_leaves_the_background_outside() -> None:
    bridge = np.zeros((12, 12), dtype=bool)
    bridge[2, :] = bridge[2:, 3] = bridge[2:, 8] = True
    assert np.array_equal(main_shape(bridge), bridge)


def test_place_size_and_mirroring_do_not_matter_and_shape_does() -> None:
    outlines = [
        outline(mask)
        for mask in (
            ell(),
            ell(left=14, top=12),
            ell(side=80, unit=12),
            ell()[:, ::-1],
            ell().T,
            ell() | ell().T,
        )
    ]
    found = overlaps(np.stack(outlines[:1]), np.stack(outlines))[0]
    assert found[:4] == pytest.approx(1.0, abs=0.06)
    assert (found[4:] < 0.75).all()


def test_nothing_and_everything_are_like_nothing() -> None:
    blank = np.stack([outline(np.zeros((8, 8), dtype=bool)), outline(np.ones((8, 8), dtype=bool))])
    assert not overlaps(blank, blank).any()
