from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ldm.data.creatures.world import creature
from ldm.evaluation import appearance
from ldm.evaluation.appearance import AppearanceFeatures
from ldm.evaluation.concepts import SEEDS, redrawn


def flat(lightness: float, background: float = 95.0, side: int = 32) -> Image.Image:
    """A gray square of a lightness in CIELAB on a gray ground."""
    picture = Image.new("RGB", (side, side), (_gray(background),) * 3)
    picture.paste((_gray(lightness),) * 3, (side // 4, side // 4, 3 * side // 4, 3 * side // 4))
    return picture


def _gray(lightness: float) -> int:
    luminance = ((lightness + 16) / 116) ** 3
    return round(255 * (1.055 * luminance ** (1 / 2.4) - 0.055))


def test_color_distance_is_that_of_cielab() -> None:
    light, dark = AppearanceFeatures.of([flat(60)]), AppearanceFeatures.of([flat(30)])
    assert light.color_distance(light) == pytest.approx(0)
    assert light.color_distance(dark) == pytest.approx(30, rel=0.03)
    assert AppearanceFeatures.of([flat(60, background=10)]).color_distance(light) == pytest.approx(0)


def test_the_whole_picture_counts_its_background() -> None:
    near, far = (AppearanceFeatures.of([flat(60, background=ground)], whole=True) for ground in (95, 10))
    assert near.color_distance(far) == pytest.approx(0.75 * 85, rel=0.05)


def test_the_same_creature_is_more_alike_than_others_in_every_measure() -> None:
    several = [creature(SEEDS[k]) for k in range(8)]
    once, again = (AppearanceFeatures.of(redrawn(several, 32, take=take)) for take in (0, 1))
    for compared in (once.palette_overlap(again), once.shape_overlap(again), -once.color_distance(again)):
        same = np.diag(compared).mean()
        assert same > np.quantile(compared[~np.eye(8, dtype=bool)], 0.85)
    assert len(once) == 8 and np.array_equal(once[2:4].palettes, once.palettes[2:4])


def test_a_large_picture_looks_as_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    small = redrawn([creature(SEEDS[0])], 32, take=0)[0]
    large = small.resize((640, 640), Image.Resampling.NEAREST)
    seen = []
    monkeypatch.setattr(
        appearance, "main_shape", lambda mask, real=appearance.main_shape: seen.append(mask) or real(mask)
    )
    ours, theirs = AppearanceFeatures.of([small]), AppearanceFeatures.of([large])
    assert max(seen[-1].shape) == 64
    assert ours.palette_overlap(theirs) > 0.9 and ours.shape_overlap(theirs) > 0.9


def test_a_picture_without_a_creature_is_compared_by_its_colours() -> None:
    empty = AppearanceFeatures.of([Image.new("RGB", (32, 32), "red")])
    assert not empty.outlines.any()
    assert empty.color_distance(AppearanceFeatures.of([flat(50)])) > 20
