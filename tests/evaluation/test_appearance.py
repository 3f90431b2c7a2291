from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ldm.data.creatures.world import creature
from ldm.evaluation import appearance
from ldm.evaluation.appearance import (
    AppearanceFeatures,
    foreground,
    largest_component,
    outline,
    outline_iou,
    palette_overlap,
)
from ldm.evaluation.concepts import EVALUATION_SEEDS, draw_creatures


def disc(color: str, background: str = "white", size: int = 32) -> Image.Image:
    image = Image.new("RGB", (size, size), background)
    ImageDraw.Draw(image).ellipse((8, 8, 24, 24), fill=color)
    return image


def test_foreground_is_the_disc_whatever_the_background() -> None:
    for background in ("white", "navy", "green"):
        mask = foreground(disc("red", background))
        assert mask[16, 16] and not mask[2, 2]
        assert mask.mean() == pytest.approx(3.1416 * 8**2 / 32**2, rel=0.1)


def test_palette_overlap_compares_the_foregrounds() -> None:
    assert palette_overlap([disc("red", "white")], [disc("red", "navy")]) > 0.95
    assert palette_overlap([disc("red")], [disc("blue")]) < 0.05
    near = palette_overlap([disc("#dd2020")], [disc("#bb2020")])
    assert 0.3 < near < 0.95
    assert palette_overlap([disc("red"), disc("blue")], [disc("red")]) == pytest.approx(0.5, abs=0.05)


def test_an_image_of_background_alone_shares_nothing() -> None:
    assert palette_overlap([Image.new("RGB", (32, 32), "red")], [disc("red")]) < 0.05


def ell(side: int = 40, left: int = 5, top: int = 5, unit: int = 6) -> np.ndarray:
    """An L: what is mirrored or turned is not the same."""
    mask = np.zeros((side, side), dtype=bool)
    mask[top : top + 4 * unit, left : left + unit] = True
    mask[top + 3 * unit : top + 4 * unit, left : left + 3 * unit] = True
    return mask


def test_specks_are_removed_and_holes_are_filled() -> None:
    mask = ell()
    dirty = mask.copy()
    dirty[10, 7] = False
    dirty[2, 35] = dirty[30:33, 33] = True
    assert np.array_equal(largest_component(dirty), mask)
    assert not largest_component(np.zeros((4, 4), dtype=bool)).any()


def test_a_shape_at_the_frame_leaves_the_background_outside() -> None:
    bridge = np.zeros((12, 12), dtype=bool)
    bridge[2, :] = bridge[2:, 3] = bridge[2:, 8] = True
    assert np.array_equal(largest_component(bridge), bridge)


def test_outlines_ignore_position_size_and_mirroring() -> None:
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
    found = outline_iou(np.stack(outlines[:1]), np.stack(outlines))[0]
    assert found[:4] == pytest.approx(1.0, abs=0.06)
    assert (found[4:] < 0.75).all()


def test_empty_and_full_masks_overlap_with_nothing() -> None:
    blank = np.stack([outline(np.zeros((8, 8), dtype=bool)), outline(np.ones((8, 8), dtype=bool))])
    assert not outline_iou(blank, blank).any()


def flat(lightness: float, background: float = 95.0, side: int = 32) -> Image.Image:
    """A gray square of a lightness in CIELAB on a gray ground."""
    image = Image.new("RGB", (side, side), (_gray(background),) * 3)
    image.paste((_gray(lightness),) * 3, (side // 4, side // 4, 3 * side // 4, 3 * side // 4))
    return image


def _gray(lightness: float) -> int:
    luminance = ((lightness + 16) / 116) ** 3
    return round(255 * (1.055 * luminance ** (1 / 2.4) - 0.055))


def test_color_distance_is_that_of_cielab() -> None:
    light, dark = AppearanceFeatures.from_images([flat(60)]), AppearanceFeatures.from_images([flat(30)])
    assert light.color_distance(light) == pytest.approx(0)
    assert light.color_distance(dark) == pytest.approx(30, rel=0.03)
    assert AppearanceFeatures.from_images([flat(60, background=10)]).color_distance(light) == pytest.approx(0)


def test_the_whole_image_counts_its_background() -> None:
    near, far = (
        AppearanceFeatures.from_images([flat(60, background=ground)], whole=True) for ground in (95, 10)
    )
    assert near.color_distance(far) == pytest.approx(0.75 * 85, rel=0.05)


def test_the_same_creature_is_more_alike_than_others_in_every_measure() -> None:
    several = [creature(EVALUATION_SEEDS[k]) for k in range(8)]
    once, again = (AppearanceFeatures.from_images(draw_creatures(several, 32, take=take)) for take in (0, 1))
    for compared in (once.palette_overlap(again), once.shape_overlap(again), -once.color_distance(again)):
        same = np.diag(compared).mean()
        assert same > np.quantile(compared[~np.eye(8, dtype=bool)], 0.85)
    assert len(once) == 8 and np.array_equal(once[2:4].palettes, once.palettes[2:4])


def test_a_large_image_has_the_features_of_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    small = draw_creatures([creature(EVALUATION_SEEDS[0])], 32, take=0)[0]
    large = small.resize((640, 640), Image.Resampling.NEAREST)
    seen = []
    monkeypatch.setattr(
        appearance,
        "largest_component",
        lambda mask, real=appearance.largest_component: seen.append(mask) or real(mask),
    )
    ours, theirs = AppearanceFeatures.from_images([small]), AppearanceFeatures.from_images([large])
    assert max(seen[-1].shape) == 64
    assert ours.palette_overlap(theirs) > 0.9 and ours.shape_overlap(theirs) > 0.9


def test_an_image_without_a_creature_is_compared_by_its_colours() -> None:
    empty = AppearanceFeatures.from_images([Image.new("RGB", (32, 32), "red")])
    assert not empty.outlines.any()
    assert empty.color_distance(AppearanceFeatures.from_images([flat(50)])) > 20
