from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.creatures.captions import place
from ldm.data.creatures.renderer import render
from ldm.data.creatures.world import HELD_OUT_STYLES, SPLITS, STYLES, creature, scene
from scripts import make_concepts

SHIPPED = Path(__file__).parents[3] / "data/concepts"
TOLD = {path.parent.name: json.loads(path.read_text()) for path in sorted(SHIPPED.glob("*/concept.json"))}


def test_there_are_eight_creatures_and_two_styles():
    kinds = [told["kind"] for told in TOLD.values()]
    assert kinds.count("object") >= 8 and kinds.count("style") == 2
    assert {told["style"] for told in TOLD.values() if told["kind"] == "style"} == set(HELD_OUT_STYLES)
    assert not set(HELD_OUT_STYLES) & set(STYLES)


@pytest.mark.parametrize("name", TOLD)
def test_a_concept_is_held_out_and_shown_in_five_places(name):
    told, held_out = TOLD[name], SPLITS["concepts"]
    assert len(told["pictures"]) == 5
    assert len({picture["scene"]["background"] for picture in told["pictures"]}) == 5
    for picture in told["pictures"]:
        seed = picture.get("creature_seed", told.get("creature", {}).get("seed"))
        for number in (seed, picture["scene"]["seed"]):
            assert held_out.start <= number < held_out.stop


@pytest.mark.parametrize("name", TOLD)
def test_the_pictures_are_what_the_truth_says(name):
    told = TOLD[name]
    for picture in told["pictures"]:
        image = np.asarray(Image.open(SHIPPED / name / picture["file"]))
        assert image.shape == (told["size"], told["size"], 3)
        subject = creature(picture.get("creature_seed", told.get("creature", {}).get("seed")))
        surroundings = picture["scene"]
        where = scene(
            surroundings["seed"],
            subject.color,
            background=surroundings["background"],
            style=surroundings["style"],
        )
        again = render([subject], [where], told["size"])[0].permute(1, 2, 0).numpy()
        assert np.abs(image.astype(int) - again).mean() < 0.5
        if told["kind"] == "object":
            assert subject.color in told["words"] and subject.kind in told["words"]


def test_the_script_writes_the_shipped_files(tmp_path, capsys):
    assert make_concepts.main(["--out", str(tmp_path), "--size", str(TOLD["momo"]["size"])]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(TOLD)
    for name in ("momo/concept.json", "momo/03.txt", "dusk/01.txt"):
        assert (tmp_path / name).read_text() == (SHIPPED / name).read_text()
    assert "12 concepts" in capsys.readouterr().out


def test_an_unwritable_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert make_concepts.main(["--out", str(tmp_path / "file")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", TOLD)
def test_captions_tell_what_the_concept_is_not(name):
    told = TOLD[name]
    said = [path.read_text().strip() for path in sorted((SHIPPED / name).glob("*.txt"))]
    for caption, picture in zip(said, told["pictures"], strict=True):
        where = place(picture["scene"]["background"])
        if told["kind"] == "object":
            assert caption == f"a photo of [name] {where}"
        else:
            shown = creature(picture["creature_seed"])
            assert caption.endswith(f"{where} in the style of [name]")
            assert shown.color in caption and shown.kind in caption
            assert not any(style in caption.removeprefix("a photo") for style in (told["style"], *STYLES))
