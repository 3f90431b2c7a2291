from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from ldm.data.creatures.tokenizer import write_tokenizer
from ldm.files import check_features
from ldm.models import features
from ldm.models.features import load_features
from ldm.models.two_towers import TwoTowers
from ldm.util import UserError
from tests.golden_record import GOLDEN

IMAGES = [Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue", "white", "black")]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CPU = torch.device("cpu")


def processor(size: int = 16):
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A CLIP of transformers, with words and images."""
    folder = tmp_path_factory.mktemp("clip")
    text = SMALL | {"intermediate_size": 16, "vocab_size": 49408, "max_position_embeddings": 20}
    vision = SMALL | {"intermediate_size": 16, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    processor().save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).write_bytes((GOLDEN / "clip_tiny" / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(Dinov2Config(**SMALL, image_size=14, patch_size=7)).save_pretrained(folder)
    processor(14).save_pretrained(folder)
    return folder


def check_unit(found: torch.Tensor, count: int) -> None:
    assert len(found) == count and found.dtype == torch.float32
    assert torch.allclose(found.norm(dim=1), torch.ones(count))


def test_clip_has_images_and_text_in_one_space(clip, monkeypatch) -> None:
    own = load_features(clip, CPU)
    images, texts = own.image(IMAGES), own.text(["a cat", "a photo of on the moon " * 9])
    check_unit(images, 5)
    check_unit(texts, 2)
    assert images.shape[1] == texts.shape[1] == 8
    model = own.model
    assert torch.allclose(
        images[:1],
        features._unit(model.get_image_features(**own.processor(IMAGES[:1], return_tensors="pt"))),
        atol=1e-5,  # another batch size rounds elsewhere
    )
    monkeypatch.setattr(features, "_BATCH", 2)
    assert torch.allclose(own.image(IMAGES), images, atol=1e-6)


def test_states_of_the_text_tower_become_its_features(clip) -> None:
    own = load_features(clip, CPU)
    ids = own.tokenizer(["a cat", "a red fox"], padding=True, return_tensors="pt")
    states = own.model.text_model(**ids).pooler_output.detach().requires_grad_()
    found = own.of_states(states)
    torch.testing.assert_close(found, own.text(["a cat", "a red fox"]))
    found.sum().backward()
    assert states.grad.abs().sum() > 0


def test_dino_has_no_text(dino) -> None:
    own = load_features(dino, CPU)
    check_unit(own.image(IMAGES), 5)
    states = own.model(**own.processor(IMAGES, return_tensors="pt")).last_hidden_state
    assert torch.allclose(own.image(IMAGES), features._unit(states[:, 0]))
    assert own.text(["a cat"]) is None
    with pytest.raises(UserError, match="has no text tower; name a CLIP"):
        own.of_states(torch.zeros(1, 16))


def test_features_of_the_own_towers(tmp_path) -> None:
    write_tokenizer(tmp_path / "text")
    node = {
        "target": "ldm.models.two_towers.ResidualTower",
        "params": {"size": 16, "channels": [8], "width": 8},
    }
    TwoTowers(tmp_path / "text", node).save(tmp_path / "towers")
    own = load_features(tmp_path / "towers", CPU)
    check_unit(own.image(IMAGES), 5)
    check_unit(own.text(["a red fox"]), 1)
    check_features(tmp_path / "towers")


def test_folders_without_features_are_errors(tmp_path, clip) -> None:
    check_features(clip)
    with pytest.raises(UserError, match="no such folder"):
        check_features(tmp_path / "absent")
    with pytest.raises(UserError, match="no config.json or towers.json"):
        check_features(tmp_path)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="preprocessor_config.json"):
        check_features(tmp_path)
    processor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'bert' model; name one of clip, vit"):
        load_features(tmp_path, CPU)
