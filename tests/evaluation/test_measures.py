from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ldm.data.creatures.world import creature
from ldm.evaluation.concepts import EVALUATION_SEEDS, draw_creatures, other_creatures
from ldm.evaluation.edits import edits_of
from ldm.evaluation.identity import CreatureReference, Gallery
from ldm.evaluation.measures import (
    SAMPLES,
    SCALE,
    STEPS,
    edit_figures,
    identity_figures,
    mean_figures,
    protocol_figures,
    similarity,
    without_placeholders,
)
from tests.evaluation.stand_ins import FixedJudge, MeanColor

ONE = creature(EVALUATION_SEEDS[1])


def test_figures_of_the_same_creature_and_of_another() -> None:
    subject, gallery = CreatureReference(ONE, 32, FixedJudge(ONE.seed)), Gallery.render(32, count=5)
    again = identity_figures(draw_creatures([ONE] * 4, 32, take=6), subject, gallery)
    other = identity_figures(
        draw_creatures(other_creatures(4), 32, take=6), dataclasses.replace(subject, judge=None), gallery
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


def test_edit_figures_of_obeyed_lost_and_ignored_edits() -> None:
    edit = edits_of(ONE)[0]
    there = CreatureReference(ONE, 32, None, background=edit.background)
    done = edit_figures(edit, draw_creatures([ONE] * 4, 32, take=6, background=edit.value), there)
    lost = edit_figures(
        edit,
        draw_creatures(other_creatures(8, background=edit.value), 32, take=6, background=edit.value),
        there,
    )
    ignored = edit_figures(
        edit, draw_creatures([ONE] * 4, 32, take=6, background=edits_of(ONE)[1].value), there
    )
    assert (done["obeyed"], done["itself"], done["both"], done["group"]) == (1, 1, 1, "plain")
    assert lost["obeyed"] == 1 and lost["both"] == lost["itself"] < 0.3
    assert ignored["obeyed"] == ignored["both"] == 0 and ignored["itself"] > 0.7
    style = edits_of(ONE)[-1]
    blind = edit_figures(
        style, draw_creatures([ONE], 32, take=6), CreatureReference(ONE, 32, None, style=style.style)
    )
    assert blind["obeyed"] is None and blind["both"] is None


def test_the_protocol_uses_every_extractor() -> None:
    words, blind = MeanColor("clip"), MeanColor("dino", words=False)
    images = draw_creatures([ONE] * 3, 32, take=0)
    inputs = [features.image(images) for features in (words, blind)]
    found = protocol_figures([words, blind], images, inputs, "a photo of")
    assert found["clip"]["clip_i"]["averaged"] == pytest.approx(1)
    assert set(found["clip"]) == {"clip_i", "clip_t"} and set(found["dino"]) == {"clip_i"}
    assert words.prompts == ["a photo of"]


def test_mean_figures_are_recursive_and_skip_missing_values() -> None:
    several = [{"a": 1.0, "b": {"c": 2, "d": "x"}, "e": None}, {"a": 3.0, "b": {"c": 4, "d": "x"}, "f": 5}]
    assert mean_figures(several) == {"a": 2.0, "b": {"c": 3.0, "d": "x"}, "e": None, "f": 5.0}
    assert mean_figures([{"d": "x"}, {"d": "y"}]) == {"d": None}


def test_both_definitions_of_similarity() -> None:
    ours = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    theirs = torch.tensor([[1.0, 0.0]])
    assert similarity(ours, theirs) == pytest.approx({"pairwise": 0.5, "averaged": 0.5**0.5})
    same = F.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = [float(a @ b) for a in same for b in same]
    assert similarity(same, same) == pytest.approx({"pairwise": sum(pairs) / 49, "averaged": 1.0}, abs=1e-6)


@pytest.mark.parametrize(
    "prompt, names, text",
    [
        ("A photo of * on the moon", ["*"], "A photo of on the moon"),
        ("a photo of <Cat>, small", ["<cat>"], "a photo of , small"),
        ("cat in a category", ["cat"], "in a category"),
        ("a cat toy beside a cat", ["cat", "cat toy"], "a beside a"),
        ("a <cat> and a <cat-2>", ["<cat>", "<cat-2>"], "a and a"),
    ],
)
def test_the_text_is_the_prompt_without_placeholders(prompt, names, text) -> None:
    assert without_placeholders(prompt, names) == text


def test_the_settings_of_the_paper() -> None:
    assert (SAMPLES, STEPS, SCALE) == (64, 50, 5.0)
