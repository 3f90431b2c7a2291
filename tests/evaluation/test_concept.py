from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.creatures.renderer import render
from ldm.data.creatures.world import HELD_OUT_STYLES, scene
from ldm.evaluation.concepts import find_concepts, read_concept
from ldm.util import UserError
from scripts.make_concepts import creature_concept, style_concept, write_concept


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("concepts")
    write_concept(folder / "zuzu", *creature_concept(43), 32)
    write_concept(folder / "draft", *style_concept(0, HELD_OUT_STYLES[0]), 32)
    (folder / "mine").mkdir()
    Image.new("RGB", (20, 10), "red").save(folder / "mine" / "cat.jpg")
    (folder / "notes").mkdir()
    return folder


def test_a_creature_is_read_as_it_was_drawn(folder) -> None:
    concept = read_concept(folder / "zuzu")
    creatures, _ = creature_concept(43)
    assert concept.name == "zuzu" and len(concept.pictures) == 5
    assert concept.words.startswith("a ") and " on " not in concept.words
    there = scene(1, creatures[0].color)
    drawn, told = (render([one], [there], 32).float().numpy() for one in (creatures[0], concept.creature))
    assert np.abs(drawn - told).mean() < 0.5
    assert concept.init_word == creatures[0].kind


def test_a_style_and_photos_of_ones_own(folder) -> None:
    style, mine = read_concept(folder / "draft"), read_concept(folder / "mine")
    assert style.style == HELD_OUT_STYLES[0] and style.creature is None
    assert (mine.creature, mine.style, mine.words) == (None, None, None)


def test_one_folder_or_a_folder_of_them(folder, tmp_path) -> None:
    assert find_concepts(folder / "zuzu") == [folder / "zuzu"]
    assert [one.name for one in find_concepts(folder)] == ["draft", "mine", "zuzu"]
    with pytest.raises(UserError, match="does not exist"):
        find_concepts(folder / "absent")
    with pytest.raises(UserError, match="no pictures in"):
        find_concepts(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"creature": {"kind": "fox"}}', '{"creature": {"build": {"x": 1}}}']
)
def test_a_damaged_truth_is_told_in_a_line(tmp_path, text) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "concept.json").write_text(text)
    with pytest.raises(UserError, match="does not tell the truth about a concept .*remove it") as error:
        read_concept(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "concept.json").write_text(json.dumps({"name": "cat"}))
    assert read_concept(tmp_path).creature is None
