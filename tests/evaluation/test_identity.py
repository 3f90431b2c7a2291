from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ldm.data.creatures.world import HELD_OUT_STYLES, SPECIES, creature
from ldm.evaluation import identity
from ldm.evaluation.appearance import AppearanceFeatures
from ldm.evaluation.concepts import EVALUATION_SEEDS, draw_creatures, other_creatures
from ldm.evaluation.identity import (
    ITSELF,
    CreatureReference,
    Gallery,
    StyleReference,
    attribute_agreement,
    creature_attributes,
    predict_attributes,
    style_test_creatures,
)
from tests.evaluation.stand_ins import FixedJudge

ONE = creature(EVALUATION_SEEDS[1])


@pytest.fixture(scope="module")
def subject() -> CreatureReference:
    return CreatureReference(ONE, 32, None)


def test_the_scale_runs_from_other_creatures_to_the_same_one(subject) -> None:
    assert subject.calibrated(subject.raw(subject.again)).mean() == pytest.approx(1)
    assert subject.calibrated(subject.others).mean() == pytest.approx(0)
    third_time = draw_creatures([ONE] * 8, 32, take=9)
    assert subject.calibrated(subject.raw(third_time)).mean() == pytest.approx(1, abs=0.1)


def test_the_threshold_separates_the_creature_from_others(subject) -> None:
    calibration = subject.calibration()
    assert calibration["itself_taken"] == 1.0 and calibration["others_taken"] < 0.1
    assert calibration["floor"] < calibration["ceiling"]


@pytest.mark.parametrize("sight", [{"style": "sketch"}, {"style": "blueprint"}, {"background": "forest"}])
def test_another_style_or_scene_has_a_scale_of_its_own(sight) -> None:
    there = CreatureReference(ONE, 32, None, **sight)
    photos = draw_creatures([ONE] * 8, 32, take=9)
    assert there.calibration()["itself_taken"] >= 0.75
    if "style" in sight:
        assert (there.calibrated(there.raw(photos)) > ITSELF).mean() < 0.5


def test_agreement_counts_what_belongs_to_the_creature() -> None:
    judge = FixedJudge(ONE.seed, background="gray", style="neon")
    images = draw_creatures([ONE] * 3, 32, take=0)
    assert attribute_agreement(predict_attributes(judge, images), ONE).tolist() == [1, 1, 1]
    judge.seen["eyes"] = ONE.eyes % 3 + 1
    wanted = len(creature_attributes(ONE))
    assert attribute_agreement(predict_attributes(judge, images), ONE) == pytest.approx([1 - 1 / wanted] * 3)
    assert "second" in creature_attributes(dataclasses.replace(ONE, pattern="spots"))
    assert "second" not in creature_attributes(dataclasses.replace(ONE, pattern="plain"))


def test_a_judge_that_sees_the_creature_everywhere_raises_raw_likeness(subject) -> None:
    images = draw_creatures(other_creatures(3), 32, take=0)
    with_judge = CreatureReference(ONE, 32, FixedJudge(ONE.seed))
    without = subject.raw(images)
    assert with_judge.raw(images) == pytest.approx((2 * without + 1) / 3)


def test_images_are_classified_in_batches(monkeypatch) -> None:
    monkeypatch.setattr(identity, "_BATCH", 2)
    judge = FixedJudge(ONE.seed)
    assert len(predict_attributes(judge, draw_creatures([ONE] * 3, 32, take=0))) == 3
    assert judge.batches == [2, 1]
    assert predict_attributes(None, []) is None


def test_renderings_are_deterministic_and_differ_by_take() -> None:
    first, same, other = (np.asarray(draw_creatures([ONE], 32, take=take)[0]) for take in (0, 0, 1))
    assert np.array_equal(first, same) and not np.array_equal(first, other)
    others = other_creatures(5)
    assert len(set(others)) == 5
    assert others[2] not in other_creatures(5, unlike=others[2])
    assert others[0].color not in {one.color for one in other_creatures(5, background=others[0].color)}


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    return Gallery.render(32, count=12)


def test_a_new_rendering_is_retrieved_and_another_creature_is_not(gallery) -> None:
    subject = CreatureReference(creature(EVALUATION_SEEDS[1]), 32, None)
    assert gallery.ranks(AppearanceFeatures.from_images(subject.again[:3]), None, subject).tolist() == [
        1,
        1,
        1,
    ]
    rival = draw_creatures([gallery.creatures[4]] * 2, 32, take=8)
    assert (gallery.ranks(AppearanceFeatures.from_images(rival), None, subject) > 1).all()


def test_the_true_creature_is_counted_once(gallery) -> None:
    foreign, own = (
        CreatureReference(creature(EVALUATION_SEEDS[1]), 32, None),
        CreatureReference(gallery.creatures[2], 32, None),
    )
    blank = AppearanceFeatures(*(np.zeros_like(values) for values in vars(gallery.features[0]).values()))
    for subject in (foreign, own):
        assert gallery.ranks(blank, None, subject).tolist() == [12] * len(blank)
    assert gallery.ranks(gallery.features[2], None, own).tolist() == [1] * 4


def test_attributes_count_besides_appearance(gallery) -> None:
    subject, rival = CreatureReference(creature(EVALUATION_SEEDS[1]), 32, None), gallery.creatures[4]
    seen = AppearanceFeatures.from_images(draw_creatures([rival] * 2, 32, take=8))
    predictions = [vars(subject.creature)] * 2
    assert (gallery.ranks(seen, predictions, subject) < gallery.ranks(seen, None, subject)).all()


def test_four_species_of_four_colours() -> None:
    shown = style_test_creatures()
    assert len({one.kind for one in shown}) == len({one.color for one in shown}) == 4
    assert {one.kind for one in shown} <= set(SPECIES)


@pytest.mark.parametrize("style", HELD_OUT_STYLES)
def test_the_style_is_distinguished_from_photos_and_from_other_styles(style) -> None:
    one = style_test_creatures()[0]
    subject = StyleReference(one, style, 32, None)
    assert subject.prompt.endswith(f"{one.color} {one.kind} in the style of {{}}")
    in_style = subject.figures(draw_creatures([one] * 4, 32, take=9, style=style))
    assert in_style["style"] == pytest.approx(1, abs=0.1) and in_style["in_style"] == 1
    assert "kind" not in in_style
    for other in ("photo", "painting"):
        found = subject.figures(draw_creatures([one] * 24, 32, take=9, style=other))
        assert found["style"] < 0.2
        assert found["in_style"] < 0.1  # not none: the ground of some is as blue as a blueprint
