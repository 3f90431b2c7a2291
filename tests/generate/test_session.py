"""A model that is loaded once and generates with other words each time."""

from __future__ import annotations

from pathlib import Path

import pytest

import ldm
from ldm.generate import InitImage, Session, Settings
from ldm.util import UserError
from tests.golden_record import Golden
from tests.modules.methods.conftest import words

QUICK = {"steps": 1, "scale": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, and the file of a word of NeTI with eight hidden units."""
    folder = tmp_path_factory.mktemp("session")
    Golden("clip_one_vector").write_model(folder)
    words(Golden("clip_one_vector").model(), "neti", "<a>").save(folder / "a.safetensors")
    return folder


@pytest.fixture(scope="module")
def session(folder) -> Session:
    return Session(folder / "model.ckpt")


def test_dials_are_for_one_call_and_in_its_settings(session, folder) -> None:
    plain, changed, again = (
        ldm.generate("a <a>", words=folder / "a.safetensors", model=session, dials=dials, **QUICK)[0]
        for dials in (None, {"truncation": 1}, {})
    )
    assert plain.tobytes() == again.tobytes() != changed.tobytes()
    assert Settings.from_text(changed.info["parameters"]).labels["Dials"] == "truncation=1"
    assert "Dials" not in again.info["parameters"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "cat.png"}, r"init is 'cat.png'; give an ldm.generate.InitImage, such as InitImage.read\("),
        ({"x_T": "noise"}, r"x_T is 'noise'; give a tensor \[N, C, h, w\]"),
        ({"sizes": {"crop": 3}}, "sizes is 3; it must be a list"),
        ({"numbers": 5}, "numbers is 5; it must be a list or null"),
        ({"numbers": ["a"]}, "numbers is 'a'; it must be a whole number"),
        ({"numbers": [5], "count": 2}, "numbers has 1 entries for 2 images; give one for each"),
        ({"sampler": ["ddim"]}, "unknown sampler"),
        ({"dials": {"size": 3}}, "no dial 'size' of NeTI; known are: bypass, truncation"),
        ({"dials": ["truncation"]}, "dials is .'truncation'.; give a dictionary"),
        ({"concept_strength": 2, "class_words": 3}, "class_words is 3; give a word, or a dictionary"),
        ({"concept_strength": 2, "class_words": [3]}, "class word .*3"),
        ({"concept_strength": 2, "class_words": ["<b>=cat"]}, "'<b>=cat' names no loaded word; loaded: <a>"),
        ({"dial": {}}, "generate has no setting 'dial'; it has .*dials"),
    ],
)
def test_a_wrong_setting_is_one_line(session, folder, settings, message) -> None:
    with pytest.raises(UserError, match=message):
        session.generate("a <a>", words=folder / "a.safetensors", **settings, **QUICK)


def test_the_class_of_init_is_part_of_the_package() -> None:
    assert "InitImage" in ldm.generate.__all__ and ldm.generate.InitImage is InitImage
