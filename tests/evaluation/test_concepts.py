from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.creatures.renderer import render
from ldm.data.creatures.world import HELD_OUT_STYLES, scene
from ldm.evaluation.concepts import find_concepts, find_embedding, read_concept
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


def test_a_creature_is_read_as_it_was_written(folder) -> None:
    concept = read_concept(folder / "zuzu")
    creatures, _ = creature_concept(43)
    assert concept.name == "zuzu" and len(concept.images) == 5
    assert concept.words.startswith("a ") and " on " not in concept.words
    there = scene(1, creatures[0].color)
    original, described = (
        render([one], [there], 32).float().numpy() for one in (creatures[0], concept.creature)
    )
    assert np.abs(original - described).mean() < 0.5
    assert concept.init_word == creatures[0].kind


def test_a_style_and_a_folder_without_concept_json(folder) -> None:
    style, mine = read_concept(folder / "draft"), read_concept(folder / "mine")
    assert style.style == HELD_OUT_STYLES[0] and style.creature is None
    assert (mine.creature, mine.style, mine.words) == (None, None, None)


def test_a_concept_folder_or_a_folder_of_concepts(folder, tmp_path) -> None:
    assert find_concepts(folder / "zuzu") == [folder / "zuzu"]
    assert [one.name for one in find_concepts(folder)] == ["draft", "mine", "zuzu"]
    with pytest.raises(UserError, match="does not exist"):
        find_concepts(folder / "absent")
    with pytest.raises(UserError, match="no images in"):
        find_concepts(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"creature": {"kind": "fox"}}', '{"creature": {"build": {"x": 1}}}']
)
def test_an_invalid_concept_json_is_a_one_line_error(tmp_path, text) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "concept.json").write_text(text)
    with pytest.raises(UserError, match="is no valid description of a concept .*remove it") as error:
        read_concept(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "concept.json").write_text(json.dumps({"name": "cat"}))
    assert read_concept(tmp_path).creature is None


def touch(path: Path, age: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_the_newest_match_of_a_concepts_name(tmp_path) -> None:
    touch(tmp_path / "bobo_1/checkpoints/embeddings.pt", age=9)
    newest = touch(tmp_path / "bobo_2/checkpoints/embeddings.pt")
    touch(tmp_path / "kiko_3/checkpoints/embeddings.pt")
    assert find_embedding(f"{tmp_path}/{{name}}*/checkpoints/embeddings.pt", "bobo", True) == newest
    assert find_embedding(str(tmp_path), "bobo", True) == newest
    own = touch(tmp_path / "bobo.safetensors", age=99)
    assert find_embedding(f"{tmp_path}/", "bobo", True) == own


def test_one_file_is_for_one_concept_only(tmp_path) -> None:
    file = touch(tmp_path / "own.pt")
    assert find_embedding(str(file), "bobo", False) == file
    with pytest.raises(UserError, match="one file for several concepts; write {name}"):
        find_embedding(str(file), "bobo", True)


def test_wildcards_in_a_name_are_literal(tmp_path) -> None:
    touch(tmp_path / "ab.pt")
    with pytest.raises(UserError, match="no embedding for the concept '\\[a\\]\\*'"):
        find_embedding(f"{tmp_path}/{{name}}.pt", "[a]*", False)
    with pytest.raises(UserError, match="does not exist"):
        find_embedding(str(tmp_path / "absent.pt"), "bobo", False)
