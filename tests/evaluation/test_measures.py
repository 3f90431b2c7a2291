from __future__ import annotations

import dataclasses

import pytest

from ldm.data.creatures.world import creature
from ldm.evaluation.concepts import SEEDS, others, redrawn
from ldm.evaluation.edits import edits_of
from ldm.evaluation.identity import Gallery, Subject
from ldm.evaluation.measures import edit_figures, identity_figures, mean_figures, protocol_figures
from tests.evaluation.stand_ins import MeanColor, SayingJudge

ONE = creature(SEEDS[1])


def test_a_creature_drawn_again_and_another() -> None:
    subject, gallery = Subject(ONE, 32, SayingJudge(ONE.seed)), Gallery.drawn(32, count=5)
    again = identity_figures(redrawn([ONE] * 4, 32, take=6), subject, gallery)
    other = identity_figures(
        redrawn(others(4), 32, take=6), dataclasses.replace(subject, judge=None), gallery
    )
    assert again["attributes"] == 1 and set(again["attribute"].values()) == {1.0}
    assert (
        again["identity"] == pytest.approx(1, abs=0.15)
        and again["itself"] == again["retrieved"] == again["rank"] == 1
    )
    assert again["among"] == 5
    assert (
        other["identity"] < 0.4
        and other["itself"] <= 0.25
        and other["retrieved"] < 1
        and "attributes" not in other
    )
    assert other["color_distance"] > 2 * again["color_distance"]


def test_an_edit_is_obeyed_and_the_creature_itself_or_not() -> None:
    edit = edits_of(ONE)[0]
    there = Subject(ONE, 32, None, background=edit.background)
    done = edit_figures(edit, redrawn([ONE] * 4, 32, take=6, background=edit.value), there)
    lost = edit_figures(
        edit, redrawn(others(8, background=edit.value), 32, take=6, background=edit.value), there
    )
    ignored = edit_figures(edit, redrawn([ONE] * 4, 32, take=6, background=edits_of(ONE)[1].value), there)
    assert (done["obeyed"], done["itself"], done["both"], done["group"]) == (1, 1, 1, "plain")
    assert lost["obeyed"] == 1 and lost["both"] == lost["itself"] < 0.3
    assert ignored["obeyed"] == ignored["both"] == 0 and ignored["itself"] > 0.7
    style = edits_of(ONE)[-1]
    blind = edit_figures(style, redrawn([ONE], 32, take=6), Subject(ONE, 32, None, style=style.style))
    assert blind["obeyed"] is None and blind["both"] is None


def test_the_protocol_asks_every_extractor() -> None:
    words, blind = MeanColor("clip"), MeanColor("dino", words=False)
    pictures = redrawn([ONE] * 3, 32, take=0)
    inputs = [features.image(pictures) for features in (words, blind)]
    found = protocol_figures([words, blind], pictures, inputs, "a photo of")
    assert found["clip"]["clip_i"]["averaged"] == pytest.approx(1)
    assert set(found["clip"]) == {"clip_i", "clip_t"} and set(found["dino"]) == {"clip_i"}
    assert words.told == ["a photo of"]


def test_means_go_into_nested_figures_and_over_those_that_have_one() -> None:
    several = [{"a": 1.0, "b": {"c": 2, "d": "x"}, "e": None}, {"a": 3.0, "b": {"c": 4, "d": "x"}, "f": 5}]
    assert mean_figures(several) == {"a": 2.0, "b": {"c": 3.0, "d": "x"}, "e": None, "f": 5.0}
    assert mean_figures([{"d": "x"}, {"d": "y"}]) == {"d": None}
