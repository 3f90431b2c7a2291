"""Prompts that name attributes, and how their images are counted."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from ldm.data.creatures.world import COLORS, SPECIES, STYLES
from scripts.obedience import TITLES, confidence_interval, count_obeyed, draw_prompts


def _truth(case):
    return {name: getattr(case.description, name) for name in TITLES if name != "corners"}


def _plain(color):
    return Image.fromarray(np.full((32, 32, 3), COLORS.get(color, (1, 2, 3)), np.uint8))


def test_a_seed_gives_the_same_prompts_and_every_value_occurs() -> None:
    prompts = draw_prompts(400, seed=1)
    assert prompts == draw_prompts(400, seed=1) != draw_prompts(400, seed=2)
    assert {case.description.kind for case in prompts} == set(SPECIES)
    assert {case.description.style for case in prompts} == set(STYLES)
    assert 140 < sum("style" in case.attributes for case in prompts) < 180
    for name in ("pattern", "eyes", "ears"):
        assert 90 < sum(name in case.attributes for case in prompts) < 150


def test_a_prompt_names_its_attributes_and_no_others() -> None:
    for case in draw_prompts(300, seed=3):
        assert case.description.kind in case.prompt and case.description.color in case.prompt
        assert bool(re.search(r"\beyes?\b", case.prompt)) == ("eyes" in case.attributes)
        assert ("ears" in case.prompt or "horns" in case.prompt) == ("ears" in case.attributes)
        patterned = "pattern" in case.attributes
        assert bool(re.search(r"plain|stripes|spots|belly", case.prompt)) == patterned
        assert (
            (case.description.style in case.prompt) if "style" in case.attributes else "photo" in case.prompt
        )


def test_true_images_obey_every_prompt() -> None:
    prompts = draw_prompts(200, seed=4)
    found = count_obeyed(
        prompts, [_plain(o.description.background) for o in prompts], [_truth(o) for o in prompts]
    )
    assert all(right == of > 0 for right, of in found.values())
    assert found["kind"][1] == 200
    assert found["color"][1] == found["background"][1] == 120  # in photos only


@pytest.mark.parametrize("name", [name for name in TITLES if name != "corners"])
def test_a_wrong_attribute_is_counted_and_no_other(name) -> None:
    prompts = draw_prompts(200, seed=5)
    predictions = [_truth(case) | {name: "nonsense"} for case in prompts]
    found = count_obeyed(prompts, [_plain(o.description.background) for o in prompts], predictions)
    assert found[name][0] == 0 < found[name][1]
    assert all(right == of for other, (right, of) in found.items() if other != name)


def test_corners_need_no_judge() -> None:
    prompts = draw_prompts(100, seed=6)
    found = count_obeyed(prompts, [_plain("nowhere")] * 100, [_truth(case) for case in prompts])
    assert found["corners"][0] < 0.3 * found["corners"][1]


def test_the_confidence_interval_is_wilsons() -> None:
    low, high = confidence_interval(90, 100)
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-3)
    assert confidence_interval(0, 0) == (0.0, 1.0)
    assert confidence_interval(50, 50)[1] == pytest.approx(1.0)
