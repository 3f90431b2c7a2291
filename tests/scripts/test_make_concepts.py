"""scripts/make_concepts.py, and the sample concepts that it made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ldm.data.creatures.captions import background_phrase
from ldm.data.creatures.renderer import render
from ldm.data.creatures.world import HELD_OUT_STYLES, SPLITS, STYLES, creature, scene
from ldm.images import open_image
from scripts import make_concepts

SHIPPED = Path(__file__).parents[2] / "data/concepts"
TRUTHS = {path.parent.name: json.loads(path.read_text()) for path in sorted(SHIPPED.glob("*/concept.json"))}


def test_there_are_eight_creatures_and_two_styles():
    kinds = [truth["kind"] for truth in TRUTHS.values()]
    assert kinds.count("object") >= 8 and kinds.count("style") == 2
    assert {truth["style"] for truth in TRUTHS.values() if truth["kind"] == "style"} == set(HELD_OUT_STYLES)
    assert not set(HELD_OUT_STYLES) & set(STYLES)


@pytest.mark.parametrize("name", TRUTHS)
def test_each_concept_is_held_out_and_has_five_backgrounds(name):
    truth, held_out = TRUTHS[name], SPLITS["concepts"]
    assert len(truth["pictures"]) == 5
    assert len({image["scene"]["background"] for image in truth["pictures"]}) == 5
    for image in truth["pictures"]:
        seed = image.get("creature_seed", truth.get("creature", {}).get("seed"))
        for number in (seed, image["scene"]["seed"]):
            assert held_out.start <= number < held_out.stop


@pytest.mark.parametrize("name", TRUTHS)
def test_the_images_match_concept_json(name):
    truth = TRUTHS[name]
    for image in truth["pictures"]:
        pixels = np.asarray(open_image(SHIPPED / name / image["file"]))
        assert pixels.shape == (truth["size"], truth["size"], 3)
        subject = creature(image.get("creature_seed", truth.get("creature", {}).get("seed")))
        surroundings = image["scene"]
        where = scene(
            surroundings["seed"],
            subject.color,
            background=surroundings["background"],
            style=surroundings["style"],
        )
        again = render([subject], [where], truth["size"])[0].permute(1, 2, 0).numpy()
        assert np.abs(pixels.astype(int) - again).mean() < 0.5
        if truth["kind"] == "object":
            assert subject.color in truth["words"] and subject.kind in truth["words"]


def test_the_script_writes_the_shipped_files(tmp_path, capsys):
    assert make_concepts.main(["--out", str(tmp_path), "--size", str(TRUTHS["momo"]["size"])]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(TRUTHS)
    for name in ("momo/concept.json", "momo/03.txt", "dusk/01.txt"):
        assert (tmp_path / name).read_text() == (SHIPPED / name).read_text()
    assert "12 concepts" in capsys.readouterr().out


def test_an_unwritable_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert make_concepts.main(["--out", str(tmp_path / "file")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", TRUTHS)
def test_captions_describe_everything_except_the_concept(name):
    truth = TRUTHS[name]
    captions = [path.read_text().strip() for path in sorted((SHIPPED / name).glob("*.txt"))]
    for caption, image in zip(captions, truth["pictures"], strict=True):
        where = background_phrase(image["scene"]["background"])
        if truth["kind"] == "object":
            assert caption == f"a photo of [name] {where}"
        else:
            shown = creature(image["creature_seed"])
            assert caption.endswith(f"{where} in the style of [name]")
            assert shown.color in caption and shown.kind in caption
            assert not any(style in caption.removeprefix("a photo") for style in (truth["style"], *STYLES))
