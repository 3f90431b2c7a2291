from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf

from ldm.data.creatures.dataset import ATTRIBUTES, Creatures
from ldm.data.creatures.tokenizer import write_tokenizer
from ldm.models.two_towers import ContrastiveCLIP, ResidualTower, TwoTowers
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
    before = torch.get_rng_state()
    again = TwoTowers.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.image_features(pixels), towers.image_features(pixels))
    assert torch.equal(again.text_features(CAPTIONS), towers.text_features(CAPTIONS))
    assert not again.training and torch.equal(again.logit_scale, towers.logit_scale)


@torch.no_grad()
def test_towers_saved_in_half_precision_give_nearly_the_same_features(towers, tmp_path):
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
def test_features_are_of_unit_length_for_every_image_size(towers):
    for size in (32, 64):
        features = towers.image_features(torch.randn(3, 3, size, size))
        assert features.shape == (3, 128) and torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-5)


@torch.no_grad()
def test_features_of_a_caption_do_not_depend_on_its_neighbours(towers):
    assert torch.allclose(towers.text_features(CAPTIONS[:1])[0], towers.text_features(CAPTIONS)[0], atol=1e-6)


def test_a_size_that_cannot_be_halved_is_an_error():
    with pytest.raises(UserError, match="size 36"):
        ResidualTower(36)


def test_missing_and_mismatched_files_are_errors(towers, tmp_path):
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


SMALL_TOWER = {
    "target": "ldm.models.two_towers.ResidualTower",
    "params": {"size": 32, "channels": [16, 16, 32], "width": 32},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text_encoder")
    write_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def batch():
    data = Creatures(32, 16, split="validation", attributes=True, foils=True)
    items = [data[i] for i in range(16)]
    return {
        "image": torch.stack([item["image"] for item in items]),
        "caption": [item["caption"] for item in items],
        "foil": [item["foil"] for item in items],
        "attributes": torch.stack([item["attributes"] for item in items]),
    }


def _model(folder, **params):
    torch.manual_seed(0)
    model = ContrastiveCLIP(str(folder), SMALL_TOWER, **params)
    model.logged = {}
    model.log_dict = lambda values, **_: model.logged.update(values)
    return model


def _train(model, batch, steps):
    model.learning_rate = 3e-3
    optimizer = model.configure_optimizers()
    losses = []

    def closure():
        loss = model.training_step(batch, len(losses))
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    for k in range(steps):
        model.optimizer_step(0, k, optimizer, closure)
    return losses


def test_the_temperature_stays_in_its_bounds(folder, batch):
    model = _model(folder)
    for value, bound in ((9.0, 100.0), (-9.0, 1.0)):
        torch.nn.init.constant_(model.towers.logit_scale, value)
        _train(model, batch, 1)
        assert model.towers.logit_scale.exp().item() == pytest.approx(bound)


def test_training_matches_captions_with_images(folder, batch):
    model = _model(folder)
    losses = _train(model, batch, 60)
    assert losses[0] > 2  # of log 16 = 2.77: next to nothing known yet
    assert losses[-1] < 0.5 * losses[0]
    assert model.logged["train/recall"] > 0.7


def test_attribute_heads_learn_from_the_labels(folder, batch):
    model = _model(folder, attributes={name: len(values) for name, values in ATTRIBUTES.items()})
    _train(model, batch, 1)
    first = float(model.logged["train/attributes"])
    _train(model, batch, 40)
    assert float(model.logged["train/attributes"]) < 0.7 * first


def test_the_loss_is_symmetric_infonce(folder):
    model = _model(folder)
    features = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    loss, recall = model.contrastive_loss(features, features)
    logits = model.towers.logit_scale.exp() * features @ features.t()
    assert recall == 1 and torch.allclose(loss, torch.nn.functional.cross_entropy(logits, torch.arange(4)))


def test_a_foil_counts_unless_it_is_the_caption(folder):
    model = _model(folder)
    images, texts = torch.eye(4), torch.eye(4)
    plain, _ = model.contrastive_loss(images, texts)
    assert torch.allclose(
        model.contrastive_loss(images, texts, texts, torch.zeros(4, dtype=torch.bool))[0], plain
    )
    foiled, _ = model.contrastive_loss(images, texts, 0.99 * texts, torch.ones(4, dtype=torch.bool))
    assert foiled > plain + 0.3  # half the images' own loss of about log 2


def test_features_do_not_depend_on_the_padding(folder):
    model = _model(folder).eval()
    image = torch.zeros(1, 32, 32, 3)
    alone = model(image, ["a red fox"])[1]
    beside = model(image.expand(2, -1, -1, -1), ["a red fox", "a photo of a large blue bear on a beach"])[1]
    assert torch.allclose(alone[0], beside[0], atol=1e-6)


def test_only_matrices_have_weight_decay(folder):
    schedule = {"warm_up_steps": 10, "lr_start": 0.1, "lr_max": 1.0, "lr_min": 0.0, "max_decay_steps": 100}
    model = _model(
        folder,
        optimizer_config={"target": "torch.optim.AdamW", "params": {"weight_decay": 0.05}},
        scheduler_config={"target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler", "params": schedule},
    )
    made = model.configure_optimizers()
    matrices, others = made["optimizer"].param_groups
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    assert any(p is model.towers.logit_scale for p in others["params"])
    assert matrices["lr"] == pytest.approx(0.1 * model.learning_rate)
