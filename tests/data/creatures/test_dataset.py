from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.data.creatures import dataset
from ldm.data.creatures.captions import Description
from ldm.data.creatures.dataset import ATTRIBUTES, Creatures
from ldm.data.creatures.renderer import render
from ldm.data.creatures.world import (
    NAMES,
    SPLITS,
    individual,
    scene,
)
from ldm.util import UserError


def test_an_item_is_an_image_and_a_caption():
    data = Creatures(32, 5, attributes=True)
    item = data[4]
    assert len(data) == 5 and item["image"].shape == (32, 32, 3) and item["image"].dtype == torch.float32
    assert -1 <= item["image"].min() < item["image"].max() <= 1
    assert isinstance(item["caption"], str)
    assert list(ATTRIBUTES["kind"])[item["attributes"][0]] == data.description(4).kind
    assert len(list(data)) == 5
    with pytest.raises(IndexError):
        data[-1]


def test_training_captions_vary_by_epoch_and_validation_captions_do_not():
    train = Creatures(32, 2)
    captions = [train[2 * epoch + 1]["caption"] for epoch in range(20)]
    assert len(set(captions)) > 5
    assert [train[2 * epoch + 1]["caption"] for epoch in range(20)] == captions
    assert torch.equal(train[39]["image"], train[1]["image"])
    validation = Creatures(32, 2, split="validation")
    assert len({validation[2 * epoch]["caption"] for epoch in range(20)}) == 1
    assert not torch.equal(train[0]["image"], validation[0]["image"])


def test_the_cache_is_rendered_once_and_serves_smaller_counts(tmp_path, monkeypatch):
    first = Creatures(32, 6, cache=tmp_path)
    monkeypatch.setattr(dataset, "_render_into", None)  # a second rendering would fail
    again = Creatures(32, 4, cache=tmp_path)
    assert np.array_equal(again[3]["image"], first[3]["image"]) and again.description(3) == first.description(
        3
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "train-32-v1-6.labels.npy",
        "train-32-v1-6.npy",
    ]


def test_an_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "_render_into", stop)
    with pytest.raises(KeyboardInterrupt):
        Creatures(32, 6, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"split": "test"}, {"size": 33}, {"count": 0}])
def test_a_wrong_parameter_is_a_one_line_error(wrong):
    with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
        Creatures(**{"size": 32, "count": 2, **wrong})


def test_can_be_cached_as_latents(tmp_path) -> None:
    """What ldm.training's latent cache asks of a dataset: images by variant, and draws that name them."""
    data = Creatures(32, 6, "train", cache=tmp_path)
    images = {variant: data.image(*variant) for variant in data.variants()}
    for index in (0, 5, 7):
        drawn, item = data.draw(index), data[index]
        assert torch.equal(images[drawn.variant], item["image"]) and drawn.caption == item["caption"]
    assert torch.equal(data.image(1, flipped=True), data.image(1).flip(1))


def test_images_show_the_individual_of_their_name(tmp_path) -> None:
    data = Creatures(32, 24, cache=tmp_path, named=0.5)
    plain = Creatures(32, 24, cache=tmp_path)
    seen = 0
    for index in range(24):
        names = data.description(index)
        if names.name is None:
            assert torch.equal(data.image(index), plain.image(index)) and names == plain.description(index)
            continue
        seen += 1
        shown = individual(NAMES.index(names.name))
        where = scene(SPLITS["train"][index], shown.color)
        assert names == Description.of(shown, where, names.name)
        again = render([shown], [where], 32)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(data.images[index], again)
    assert 6 <= seen <= 18


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_the_share_of_names_lies_between_0_and_1(share) -> None:
    with pytest.raises(ValueError, match=f"named is {share}"):
        Creatures(32, 2, named=share)
