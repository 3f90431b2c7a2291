from __future__ import annotations

import pytest

from ldm.data.creatures.world import creature
from ldm.evaluation.drawings import SEEDS, others, redrawn
from ldm.evaluation.identity import Subject
from ldm.evaluation.looks import Looks
from ldm.evaluation.retrieval import Gallery


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    return Gallery.drawn(32, count=12)


def test_a_creature_drawn_anew_is_found_and_another_is_not(gallery) -> None:
    subject = Subject(creature(SEEDS[1]), 32, None)
    assert gallery.ranks(Looks.of(subject.again[:3]), None, subject).tolist() == [1, 1, 1]
    rival = redrawn([gallery.creatures[4]] * 2, 32, take=8)
    assert (gallery.ranks(Looks.of(rival), None, subject) > 1).all()


def test_the_true_one_is_one_of_the_number(gallery) -> None:
    foreign = Subject(creature(SEEDS[1]), 32, None)
    own = Subject(others(3)[2], 32, None)
    blank = Looks.of(redrawn(others(3), 32, take=5))
    for subject in (foreign, own):
        assert gallery.ranks(blank, None, subject).max() <= 12
    # itself is no rival of its own: what is surely it comes first
    assert gallery.ranks(Looks.of(own.pictures[:4]), None, own).tolist() == [1, 1, 1, 1]


def test_attributes_count_beside_the_looks(gallery) -> None:
    subject, rival = Subject(creature(SEEDS[1]), 32, None), gallery.creatures[4]
    seen = Looks.of(redrawn([rival] * 2, 32, take=8))
    readings = [vars(subject.creature)] * 2
    assert (gallery.ranks(seen, readings, subject) < gallery.ranks(seen, None, subject)).all()
