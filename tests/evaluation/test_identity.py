from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ldm.data.creatures.world import creature
from ldm.evaluation import identity
from ldm.evaluation.concepts import SEEDS, others, redrawn
from ldm.evaluation.identity import ITSELF, Subject, agreement, judge_readings, traits
from tests.evaluation.stand_ins import SayingJudge

ONE = creature(SEEDS[1])


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(ONE, 32, None)


def test_the_scale_runs_from_other_creatures_to_the_same_one(subject) -> None:
    assert subject.calibrated(subject.raw(subject.again)).mean() == pytest.approx(1)
    assert subject.calibrated(subject.strangers).mean() == pytest.approx(0)
    third_time = redrawn([ONE] * 8, 32, take=9)
    assert subject.calibrated(subject.raw(third_time)).mean() == pytest.approx(1, abs=0.1)


def test_the_threshold_tells_the_creature_from_others(subject) -> None:
    told = subject.calibration()
    assert told["itself_taken"] == 1.0 and told["others_taken"] < 0.1
    assert told["floor"] < told["ceiling"]


@pytest.mark.parametrize("sight", [{"style": "sketch"}, {"style": "blueprint"}, {"background": "forest"}])
def test_in_another_style_or_scene_the_scale_is_drawn_there(sight) -> None:
    there = Subject(ONE, 32, None, **sight)
    photos = redrawn([ONE] * 8, 32, take=9)
    assert there.calibration()["itself_taken"] >= 0.75
    if "style" in sight:
        assert (there.calibrated(there.raw(photos)) > ITSELF).mean() < 0.5


def test_agreement_counts_what_belongs_to_the_creature() -> None:
    judge = SayingJudge(ONE.seed, background="gray", style="neon")
    pictures = redrawn([ONE] * 3, 32, take=0)
    assert agreement(judge_readings(judge, pictures), ONE).tolist() == [1, 1, 1]
    judge.seen["eyes"] = ONE.eyes % 3 + 1
    wanted = len(traits(ONE))
    assert agreement(judge_readings(judge, pictures), ONE) == pytest.approx([1 - 1 / wanted] * 3)
    assert "second" in traits(dataclasses.replace(ONE, pattern="spots"))
    assert "second" not in traits(dataclasses.replace(ONE, pattern="plain"))


def test_a_judge_that_sees_the_creature_everywhere_raises_raw_likeness(subject) -> None:
    pictures = redrawn(others(3), 32, take=0)
    with_judge = Subject(ONE, 32, SayingJudge(ONE.seed))
    without = subject.raw(pictures)
    assert with_judge.raw(pictures) == pytest.approx((2 * without + 1) / 3)


def test_pictures_are_read_in_batches(monkeypatch) -> None:
    monkeypatch.setattr(identity, "_BATCH", 2)
    judge = SayingJudge(ONE.seed)
    assert len(judge_readings(judge, redrawn([ONE] * 3, 32, take=0))) == 3
    assert judge.batches == [2, 1]
    assert judge_readings(None, []) is None


def test_drawings_are_the_same_each_time_and_others_each_take() -> None:
    first, same, other = (np.asarray(redrawn([ONE], 32, take=take)[0]) for take in (0, 0, 1))
    assert np.array_equal(first, same) and not np.array_equal(first, other)
    strangers = others(5)
    assert len(set(strangers)) == 5
    assert strangers[2] not in others(5, unlike=strangers[2])
    assert strangers[0].color not in {one.color for one in others(5, background=strangers[0].color)}
