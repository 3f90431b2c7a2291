"""Prompts that name attributes, and how the pictures of them are counted."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from ldm.data.creatures.world import COLORS, SPECIES, STYLES
from scripts.obedience import TOLD, counted, interval, orders


def _truth(order):
    return {name: getattr(order.names, name) for name in TOLD if name != "corners"}


def _plain(color):
    return Image.fromarray(np.full((32, 32, 3), COLORS.get(color, (1, 2, 3)), np.uint8))


def test_the_same_seed_orders_the_same_and_every_value_comes() -> None:
    asked = orders(400, seed=1)
    assert asked == orders(400, seed=1) != orders(400, seed=2)
    assert {order.names.kind for order in asked} == set(SPECIES)
    assert {order.names.style for order in asked} == set(STYLES)
    assert 140 < sum("style" in order.told for order in asked) < 180
    for name in ("pattern", "eyes", "ears"):
        assert 90 < sum(name in order.told for order in asked) < 150


def test_a_prompt_names_what_it_is_told_and_nothing_else() -> None:
    for order in orders(300, seed=3):
        assert order.names.kind in order.prompt and order.names.color in order.prompt
        assert bool(re.search(r"\beyes?\b", order.prompt)) == ("eyes" in order.told)
        assert ("ears" in order.prompt or "horns" in order.prompt) == ("ears" in order.told)
        patterned = "pattern" in order.told
        assert bool(re.search(r"plain|stripes|spots|belly", order.prompt)) == patterned
        assert (order.names.style in order.prompt) if "style" in order.told else "photo" in order.prompt


def test_all_right_is_counted_so() -> None:
    asked = orders(200, seed=4)
    found = counted(asked, [_plain(o.names.background) for o in asked], [_truth(o) for o in asked])
    assert all(right == of > 0 for right, of in found.values())
    assert found["kind"][1] == 200
    assert found["color"][1] == found["background"][1] == 120  # in photos alone


@pytest.mark.parametrize("name", [name for name in TOLD if name != "corners"])
def test_what_is_wrong_is_counted_wrong_and_alone(name) -> None:
    asked = orders(200, seed=5)
    readings = [_truth(order) | {name: "nonsense"} for order in asked]
    found = counted(asked, [_plain(o.names.background) for o in asked], readings)
    assert found[name][0] == 0 < found[name][1]
    assert all(right == of for other, (right, of) in found.items() if other != name)


def test_corners_need_no_judge() -> None:
    asked = orders(100, seed=6)
    found = counted(asked, [_plain("nowhere")] * 100, [_truth(order) for order in asked])
    assert found["corners"][0] < 0.3 * found["corners"][1]


def test_the_interval_is_wilsons() -> None:
    low, high = interval(90, 100)
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-3)
    assert interval(0, 0) == (0.0, 1.0)
    assert interval(50, 50)[1] == pytest.approx(1.0)
