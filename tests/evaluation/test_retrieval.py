from __future__ import annotations

import numpy as np
import pytest

from ldm.data.creatures.world import creature
from ldm.evaluation.appearance import AppearanceFeatures
from ldm.evaluation.concepts import SEEDS, redrawn
from ldm.evaluation.identity import Gallery, Subject


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    return Gallery.drawn(32, count=12)


def test_a_creature_drawn_anew_is_found_and_another_is_not(gallery) -> None:
    subject = Subject(creature(SEEDS[1]), 32, None)
    assert gallery.ranks(AppearanceFeatures.of(subject.again[:3]), None, subject).tolist() == [1, 1, 1]
    rival = redrawn([gallery.creatures[4]] * 2, 32, take=8)
    assert (gallery.ranks(AppearanceFeatures.of(rival), None, subject) > 1).all()


def test_the_true_one_is_one_of_the_number_and_no_rival_of_itself(gallery) -> None:
    foreign, own = Subject(creature(SEEDS[1]), 32, None), Subject(gallery.creatures[2], 32, None)
    blank = AppearanceFeatures(*(np.zeros_like(values) for values in vars(gallery.looks[0]).values()))
    for subject in (foreign, own):
        assert gallery.ranks(blank, None, subject).tolist() == [12] * len(blank)
    assert gallery.ranks(gallery.looks[2], None, own).tolist() == [1] * 4


def test_attributes_count_beside_the_looks(gallery) -> None:
    subject, rival = Subject(creature(SEEDS[1]), 32, None), gallery.creatures[4]
    seen = AppearanceFeatures.of(redrawn([rival] * 2, 32, take=8))
    readings = [vars(subject.creature)] * 2
    assert (gallery.ranks(seen, readings, subject) < gallery.ranks(seen, None, subject)).all()
