from __future__ import annotations

import math

import numpy as np

from ldm.training.callbacks.summary_images import HEIGHT, LEFT, RIGHT, WIDTH, Curve, draw_curves

BLUE, RED = (31, 95, 168), (192, 57, 43)


def places(picture, colour) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(axis=-1))
    return rows, columns


def test_a_line_falls_from_left_to_right() -> None:
    picture = draw_curves([Curve("loss", [0, 50, 100], [3.0, 2.0, 1.0])], mark=50)
    assert picture.size == (WIDTH, HEIGHT)
    rows, columns = places(picture, BLUE)
    assert rows[columns == columns.min()].mean() < rows[columns == columns.max()].mean()
    assert columns.min() <= LEFT + 2 and columns.max() >= WIDTH - RIGHT - 2
    _, marked = places(picture, RED)
    assert abs(marked.mean() - (LEFT + WIDTH - RIGHT) / 2) < 2


def test_panels_and_values_that_are_hard_to_draw() -> None:
    curves = [
        Curve("flat", [0, 10], [1.0, 1.0]),
        Curve("gap", [0, 5, 10], [1.0, math.nan, math.inf]),
        Curve("zero", [5], [0.0]),
        Curve("empty", [], []),
    ]
    picture = draw_curves(curves)
    assert picture.size == (WIDTH, 4 * HEIGHT)
    rows, _ = places(picture, BLUE)
    assert {int(row) // HEIGHT for row in rows} == {0, 1, 2}
