from __future__ import annotations

import itertools

import pytest

from ldm.data.creatures.world import (
    BACKGROUNDS,
    BODY_COLORS,
    KINDS,
    PLAIN_BACKGROUNDS,
    SPECIES,
    SPLITS,
    STYLES,
    clash,
    creature,
    individual,
    individual_of,
    scene,
)


def test_a_seed_is_always_the_same_creature_and_scene():
    assert creature(12345) == creature(12345)
    assert creature(12345) != creature(12346)
    assert scene(7, "red") == scene(7, "red")
    first = creature(0)
    assert (first.kind, first.color) == ("fox", "pink")  # the draw is the same on every machine


def test_splits_do_not_share_a_seed():
    for one, other in itertools.combinations(SPLITS.values(), 2):
        assert one.stop <= other.start or other.stop <= one.start
    train = SPLITS["train"]
    assert train[0] == train.start and len(train) == train.stop - train.start
    with pytest.raises(IndexError):
        train[len(train)]


def test_all_values_occur_and_no_creature_is_hidden_by_its_background():
    creatures = [creature(seed) for seed in range(3000)]
    scenes = [scene(c.seed, c.color) for c in creatures]
    assert {c.kind for c in creatures} == set(KINDS)
    assert {c.color for c in creatures} == set(BODY_COLORS)
    assert {s.background for s in scenes} == set(BACKGROUNDS) and {s.style for s in scenes} == set(STYLES)
    assert 0.3 < sum(c.kind not in SPECIES for c in creatures) / 3000 < 0.4
    for c, s in zip(creatures, scenes, strict=True):
        assert not clash(c.color, s.background) and not clash(c.color, c.second)
    assert len(PLAIN_BACKGROUNDS) >= 9


def test_fixed_attributes_are_kept():
    c = creature(3, kind="snail", color="red", eyes=1)
    assert (c.kind, c.color, c.eyes) == ("snail", "red", 1) and not clash("red", c.second)
    assert scene(3, "red", background="beach", style="neon").background == "beach"


def test_seeds_of_individuals_are_in_no_other_split() -> None:
    taken = SPLITS["individuals"]
    for name, seeds in SPLITS.items():
        assert name == "individuals" or seeds.stop <= taken.start or seeds.start >= taken.stop
    assert individual(7) == creature(taken[7]) != individual(8)


def test_the_share_of_images_with_an_individual() -> None:
    shown = [individual_of(seed, 0.4) for seed in range(4000)]
    known = [who for who in shown if who is not None]
    assert 0.37 < len(known) / len(shown) < 0.43
    assert len(set(known)) > 450 and {individual_of(seed, 0.0) for seed in range(50)} == {None}
