from __future__ import annotations

import pytest
from PIL import Image

from ldm.data.creatures.captions import vocabulary
from ldm.data.creatures.world import COLORS, PLAIN_BACKGROUNDS, STYLES, clash, creature
from ldm.evaluation.concepts import EVALUATION_SEEDS, draw_creatures, other_creatures
from ldm.evaluation.edits import Edit, edits_of, has_background, obeyed


def test_each_creature_gets_four_colours_two_scenes_and_every_style() -> None:
    several = [creature(EVALUATION_SEEDS[k]) for k in range(12)]
    for one in several:
        edits = edits_of(one)
        assert [edit.group for edit in edits] == ["plain"] * 4 + ["scene"] * 2 + ["style"] * (len(STYLES) - 1)
        assert len({edit.prompt for edit in edits}) == len(edits)
        assert not any(edit.background and clash(one.color, edit.background) for edit in edits)
        assert {edit.value for edit in edits if edit.group == "style"} == set(STYLES) - {"photo"}
    asked = {edit.value for one in several for edit in edits_of(one)}
    assert asked >= set(PLAIN_BACKGROUNDS)


def test_backgrounds_of_the_images_are_asked_for_only_where_there_are_too_few_others() -> None:
    one = creature(EVALUATION_SEEDS[3])
    usual = [edit.background for edit in edits_of(one) if edit.background]
    others = [edit.background for edit in edits_of(one, usual[:2]) if edit.background]
    assert not {*usual[:2]} & {*others} and len(others) == len(usual)
    assert len(edits_of(one, [*PLAIN_BACKGROUNDS])) == len(edits_of(one))


def test_prompts_hold_only_words_that_captions_have() -> None:
    for edit in (edit for k in range(8) for edit in edits_of(creature(EVALUATION_SEEDS[k]))):
        assert set(edit.prompt.replace("{}", "").split()) <= set(vocabulary()), edit.prompt


@pytest.mark.parametrize("color", PLAIN_BACKGROUNDS)
def test_the_corners_of_true_images_show_their_background(color) -> None:
    images = draw_creatures(other_creatures(6, background=color), 32, take=0, background=color)
    assert all(has_background(image, color) for image in images)
    assert not any(
        has_background(image, other) for image in images for other in PLAIN_BACKGROUNDS if other != color
    )


def test_one_corner_may_be_covered_and_two_may_not() -> None:
    image = Image.new("RGB", (64, 64), COLORS["blue"])
    image.paste(COLORS["red"], (0, 0, 16, 16))
    assert has_background(image, "blue")
    image.paste(COLORS["red"], (48, 48, 64, 64))
    assert not has_background(image, "blue")


def test_a_plain_background_needs_corners_and_judge_and_a_style_the_judge() -> None:
    blue, edit = (
        Image.new("RGB", (32, 32), COLORS["blue"]),
        Edit("{} on a blue background", "background", "blue"),
    )
    yes, no = {"background": "blue", "style": "photo"}, {"background": "red", "style": "sketch"}
    assert obeyed(edit, [blue, blue], [yes, no]).tolist() == [True, False]
    assert obeyed(edit, [Image.new("RGB", (32, 32), COLORS["red"])], [yes]).tolist() == [False]
    assert obeyed(edit, [blue], None).tolist() == [True]
    sketch = Edit("a sketch of {}", "style", "sketch")
    assert obeyed(sketch, [blue, blue], [yes, no]).tolist() == [False, True]
    assert obeyed(sketch, [blue], None) is None
    assert sketch.background is None and sketch.style == "sketch" and edit.style == "photo"
