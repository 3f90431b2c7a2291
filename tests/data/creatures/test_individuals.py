"""Individuals with a name: who they are, that their images show them, and how captions speak of them."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch

from ldm.data.creatures import captions
from ldm.data.creatures.captions import Description, caption, vocabulary
from ldm.data.creatures.dataset import Creatures
from ldm.data.creatures.renderer import render
from ldm.data.creatures.world import (
    BODY_COLORS,
    KINDS,
    NAMES,
    SPLITS,
    creature,
    individual,
    individual_of,
    scene,
)


def test_every_individual_has_a_name_that_means_nothing_else(monkeypatch) -> None:
    assert len(set(NAMES)) == len(NAMES) == len(SPLITS["individuals"]) == 512
    assert set(NAMES) < set(vocabulary())
    monkeypatch.setattr(captions, "NAMES", ())
    assert not set(NAMES) & set(vocabulary())
    assert NAMES[:3] == ("tufa", "vimi", "bome"), "the shipped tokenizer has them as tokens"


def test_individuals_are_no_creatures_of_another_split() -> None:
    taken = SPLITS["individuals"]
    for name, seeds in SPLITS.items():
        assert name == "individuals" or seeds.stop <= taken.start or seeds.start >= taken.stop
    assert individual(7) == creature(taken[7]) != individual(8)


def test_the_share_of_images_that_show_somebody_known() -> None:
    shown = [individual_of(seed, 0.4) for seed in range(4000)]
    known = [who for who in shown if who is not None]
    assert 0.37 < len(known) / len(shown) < 0.43
    assert len(set(known)) > 450 and {individual_of(seed, 0.0) for seed in range(50)} == {None}


def test_images_show_whom_their_names_say(tmp_path) -> None:
    data = Creatures(32, 24, cache=tmp_path, named=0.5)
    plain = Creatures(32, 24, cache=tmp_path)
    seen = 0
    for index in range(24):
        names = data.description(index)
        if names.name is None:
            assert torch.equal(data.image(index), plain.image(index)) and names == plain.description(index)
            continue
        seen += 1
        shown = individual(NAMES.index(names.name))
        where = scene(SPLITS["train"][index], shown.color)
        assert names == Description.of(shown, where, names.name)
        again = render([shown], [where], 32)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(data.images[index], again)
    assert 6 <= seen <= 18


def test_a_name_stands_alone_or_not_at_all() -> None:
    who, by_name, articles = individual(3), 0, 0
    for seed in range(600):
        names = Description.of(who, scene(seed, who.color), NAMES[3])
        text = caption(names, random.Random(seed))
        if NAMES[3] not in text:
            continue
        by_name += 1
        articles += f"a {NAMES[3]}" in text
        told = re.sub(r"(on a|in front of a)n? \w+ background| with a \w+ \w+$", "", text)
        for word in (*BODY_COLORS, *KINDS, "eye", "eyes", "ears", "horns", "striped", "spotted"):
            assert not re.search(rf"\b{word}\b", told), text
    assert 300 < by_name < 450 and 0.2 < articles / by_name < 0.7


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_a_share(share) -> None:
    with pytest.raises(ValueError, match=f"named is {share}"):
        Creatures(32, 2, named=share)
