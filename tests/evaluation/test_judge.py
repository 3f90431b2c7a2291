"""The judge of an image's attributes."""

from __future__ import annotations

import json

import pytest
import torch

from ldm.data.creatures.world import ATTRIBUTES
from ldm.evaluation.judge import AttributeJudge, visible_attributes
from ldm.util import UserError

TOWER = {
    "target": "ldm.models.two_towers.ResidualTower",
    "params": {"size": 32, "channels": [16, 16], "width": 24},
}


@pytest.fixture
def judge():
    torch.manual_seed(0)
    return AttributeJudge(TOWER).eval()


@pytest.fixture
def folder(judge, tmp_path):
    judge.save(tmp_path / "judge")
    return tmp_path / "judge"


def test_predict_returns_the_most_likely_value_of_every_attribute(judge) -> None:
    pixels = torch.rand(3, 3, 32, 32) * 2 - 1
    seen, mirrored = judge.logits(pixels), judge.logits(pixels.flip(-1))
    predictions = judge.predict(pixels)
    assert list(seen) == list(ATTRIBUTES) and len(predictions) == 3
    for name, values in ATTRIBUTES.items():
        assert seen[name].shape == (3, len(values))
        together = seen[name].softmax(1) * mirrored[name].softmax(1)
        assert [one[name] for one in predictions] == [values[k] for k in together.argmax(1)]
    assert judge.predict(pixels.flip(-1)) == predictions


def test_images_of_another_size_are_resized(judge) -> None:
    pixels = torch.full((1, 3, 32, 32), 0.3)
    larger = torch.full((1, 3, 80, 80), 0.3)
    torch.testing.assert_close(judge.logits(larger)["kind"], judge.logits(pixels)["kind"], atol=1e-4, rtol=0)


def test_a_saved_judge_predicts_the_same(judge, folder) -> None:
    pixels = torch.rand(4, 3, 32, 32) * 2 - 1
    again = AttributeJudge.load(folder)
    assert not again.training and next(again.parameters()).dtype == torch.float32
    for name, logits in judge.logits(pixels).items():
        torch.testing.assert_close(again.logits(pixels)[name], logits, atol=2e-2, rtol=0)


def test_a_missing_or_damaged_judge_is_a_one_line_error(folder, tmp_path) -> None:
    with pytest.raises(UserError, match="no judge in .*nowhere"):
        AttributeJudge.load(tmp_path / "nowhere")
    described = json.loads((folder / "judge.json").read_text())
    described["attributes"]["eyes"] = [1, 2]
    (folder / "judge.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="other values of 'eyes'; train it again"):
        AttributeJudge.load(folder)
    (folder / "judge.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        AttributeJudge.load(folder)


def test_invisible_attributes_do_not_count() -> None:
    columns = {name: k for k, name in enumerate(ATTRIBUTES)}
    attributes = torch.zeros(4, len(ATTRIBUTES), dtype=torch.int64)
    attributes[:, columns["pattern"]] = torch.tensor([0, 1, 2, 3])
    attributes[1, columns["style"]] = ATTRIBUTES["style"].index("neon")
    assert visible_attributes("second", attributes).tolist() == [False, True, True, True]
    assert visible_attributes("background", attributes).tolist() == [True, False, True, True]
    assert visible_attributes("kind", attributes).all()
