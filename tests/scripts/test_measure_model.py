"""scripts/measure_model.py on the shipped model, with few images."""

from __future__ import annotations

import json

import pytest

from ldm.evaluation.judge import AttributeJudge
from ldm.images import open_image
from scripts import measure_model

TOWER = {
    "target": "ldm.models.two_towers.ResidualTower",
    "params": {"size": 32, "channels": [16, 16], "width": 24},
}


@pytest.fixture
def judge(tmp_path):
    AttributeJudge(TOWER).save(tmp_path / "judge")
    return tmp_path / "judge"


def _measure(what, tmp_path, *more):
    words = [what, "--outdir", str(tmp_path / "out"), *map(str, more)]
    assert measure_model.main(words) == 0
    return json.loads((tmp_path / "out" / f"{what}.json").read_text()), tmp_path / "out"


def test_the_first_stage_is_measured(tmp_path, capsys) -> None:
    found, out = _measure("first-stage", tmp_path, "--count", 8)
    assert 15 < found["psnr_db"] < 60 and found["pictures"] == 8
    table = (out / "first-stage.md").read_text()
    assert table in capsys.readouterr().out
    assert f"| PSNR | {round(found['psnr_db'], 2):g} |" in table


def test_the_judge_is_measured(judge, tmp_path) -> None:
    found, _ = _measure("judge", tmp_path, "--judge", judge, "--count", 64)
    assert found["right"]["species"][1] == 64
    assert found["right"]["species, in photos"][1] < 64
    assert found["right"]["second colour"][1] < 64


def test_prompts_are_measured_and_shown(judge, tmp_path) -> None:
    found, out = _measure(
        "prompts", tmp_path, "--judge", judge, "--count", 10, "--steps", 2, "--batch_size", 5
    )
    assert found["obeyed"]["species"][1] == 10 and found["obeyed"]["background"][1] == 6
    assert open_image(out / "prompts.png").width > 300
    assert "| species |" in (out / "prompts.md").read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["prompts", "--judge", "nowhere"], "no judge in 'nowhere'"),
        (["first-stage", "--model", "nowhere"], "'nowhere/model.safetensors' does not exist"),
        (["prompts", "--count", "0"], "'0' is not a positive whole number"),
    ],
)
def test_mistakes_are_one_line(words, line, capsys) -> None:
    assert measure_model.main(words) != 0
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
