from __future__ import annotations

import pytest
from PIL import Image, ImageDraw

from ldm.evaluation.appearance import foreground, palette_overlap


def disc(color: str, background: str = "white", size: int = 32) -> Image.Image:
    picture = Image.new("RGB", (size, size), background)
    ImageDraw.Draw(picture).ellipse((8, 8, 24, 24), fill=color)
    return picture


def test_foreground_is_the_disc_whatever_the_background() -> None:
    for background in ("white", "navy", "green"):
        mask = foreground(disc("red", background))
        assert mask[16, 16] and not mask[2, 2]
        assert mask.mean() == pytest.approx(3.1416 * 8**2 / 32**2, rel=0.1)


def test_overlap_is_of_the_foregrounds_colours() -> None:
    assert palette_overlap([disc("red", "white")], [disc("red", "navy")]) > 0.95
    assert palette_overlap([disc("red")], [disc("blue")]) < 0.05
    near = palette_overlap([disc("#dd2020")], [disc("#bb2020")])
    assert 0.3 < near < 0.95
    assert palette_overlap([disc("red"), disc("blue")], [disc("red")]) == pytest.approx(0.5, abs=0.05)


def test_a_picture_of_background_alone_shares_nothing() -> None:
    assert palette_overlap([Image.new("RGB", (32, 32), "red")], [disc("red")]) < 0.05
