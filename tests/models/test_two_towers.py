from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf

from ldm.data.creatures.tokenizer import write_tokenizer
from ldm.models.two_towers import ResidualTower, TwoTowers
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import UserError

NODE = {
    "target": "ldm.models.two_towers.ResidualTower",
    "params": {"size": 32, "channels": [8, 8, 8], "width": 16},
}
CAPTIONS = ["a red fox", "a photo of a blue bear with long ears on a beach"]


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text_encoder")
    write_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    return TwoTowers(folder, OmegaConf.create(NODE)).eval()  # as a YAML gives it


@torch.no_grad()
def test_saved_towers_give_the_same_features(towers, tmp_path):
    towers.save(tmp_path)
    again = TwoTowers.load(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.image_features(pixels), towers.image_features(pixels))
    assert torch.equal(again.text_features(CAPTIONS), towers.text_features(CAPTIONS))
    assert not again.training and torch.equal(again.logit_scale, towers.logit_scale)


@torch.no_grad()
def test_half_as_large_they_read_nearly_the_same(towers, tmp_path):
    towers.save(tmp_path / "whole")
    towers.save(tmp_path / "half", torch.float16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    pixels = torch.randn(2, 3, 32, 32)
    again = TwoTowers.load(tmp_path / "half").image_features(pixels)
    torch.testing.assert_close(again, towers.image_features(pixels), atol=5e-3, rtol=0)


@torch.no_grad()
def test_the_text_tower_serves_frozen_clip_embedder(towers, tmp_path):
    towers.save(tmp_path)
    embedder = FrozenCLIPEmbedder(version=str(tmp_path / "text_encoder"), max_length=32)
    ids = towers.tokenizer(CAPTIONS, padding="max_length", max_length=32, return_tensors="pt").input_ids
    expected = towers.text_tower(input_ids=ids).last_hidden_state
    assert torch.allclose(embedder(CAPTIONS), expected, atol=1e-5)


@torch.no_grad()
def test_features_are_of_unit_length_whatever_the_picture_size(towers):
    for size in (32, 64):
        features = towers.image_features(torch.randn(3, 3, size, size))
        assert features.shape == (3, 128) and torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-5)


@torch.no_grad()
def test_features_of_a_caption_do_not_depend_on_its_neighbours(towers):
    assert torch.allclose(towers.text_features(CAPTIONS[:1])[0], towers.text_features(CAPTIONS)[0], atol=1e-6)


def test_a_size_that_cannot_be_halved_is_an_error():
    with pytest.raises(UserError, match="size 36"):
        ResidualTower(36)


def test_missing_and_misfit_files_are_one_clear_line(towers, tmp_path):
    with pytest.raises(UserError, match="towers.json"):
        TwoTowers.load(tmp_path)
    with pytest.raises(UserError, match="lacks config.json"):
        TwoTowers(tmp_path, NODE)
    towers.save(tmp_path)
    wider = {"image_tower": {**NODE, "params": {**NODE["params"], "width": 24}}}
    (tmp_path / "towers.json").write_text(json.dumps(wider))
    with pytest.raises(UserError, match="do not fit") as caught:
        TwoTowers.load(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "model.safetensors").write_bytes(b"<html>")
    with pytest.raises(UserError, match="damaged"):
        TwoTowers.load(tmp_path)
