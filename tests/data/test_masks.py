"""Masks of training images: which files they are, how they are read, and the weights that come of them."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.personalized import PersonalizedBase
from ldm.images import ImageError, list_images, mask_files, masked_stem, open_mask
from ldm.util import UserError


def picture(path, size=(16, 16), **options):
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(
        path, **options
    )
    return path


def mask(path, box=(0, 0, 8, 16), size=(16, 16)):
    image = Image.new("L", size)
    image.paste(255, box)
    image.save(path)
    return path


def dataset(folder, **params):
    return PersonalizedBase(folder, **{"size": 16, "flip_p": 0.0, "mask_weight": 0.25, **params})


@pytest.mark.parametrize("name", ["a-masklabel.png", "a_mask.png", "a_mask.jpg", "a_MASK.PNG"])
def test_a_mask_is_never_an_image_and_weights_its_image(tmp_path, caplog, name):
    picture(tmp_path / "a.jpg")
    mask(tmp_path / name)
    with caplog.at_level(logging.INFO):
        assert list_images(tmp_path) == [tmp_path / "a.jpg"]
    assert not caplog.records
    weight = dataset(tmp_path)[0]["loss_weight"]
    assert weight.shape == (16, 16) and weight.dtype == torch.float32
    torch.testing.assert_close(weight[:, :6], torch.ones(16, 6), rtol=0, atol=0.02)
    torch.testing.assert_close(weight[:, 10:], torch.full((16, 6), 0.25), rtol=0, atol=0.02)


def test_names_of_masks(tmp_path):
    assert masked_stem(tmp_path / "my.cat_mask.png") == "my.cat"
    for name in ("mask.png", "_mask.png", "unmasked.png", "cat_mask_2.png", "cat-mask.png"):
        assert masked_stem(tmp_path / name) is None, name
    image = picture(tmp_path / "a.png")
    mask(tmp_path / "a_mask.png")
    assert mask_files([image]) == {image: tmp_path / "a_mask.png"}
    mask(tmp_path / "a-masklabel.png")
    assert mask_files([image]) == {image: tmp_path / "a-masklabel.png"}


def test_a_mask_without_its_image_is_one_line(tmp_path, caplog):
    mask(tmp_path / "b_mask.png")
    with pytest.raises(
        ImageError, match=r"b_mask.png \(a mask by its name, without its image\).*; rename what"
    ):
        list_images(tmp_path)
    picture(tmp_path / "a.png")
    assert list_images(tmp_path) == [tmp_path / "a.png"]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "b_mask.png (a mask by its name" in record.message


def test_masks_are_mirrored_and_cropped_with_their_image(tmp_path):
    picture(tmp_path / "a.png", (40, 20))
    mask(tmp_path / "a_mask.png", (10, 0, 15, 20), (40, 20))
    data = dataset(tmp_path, size=20, flip_p=0.5)
    expected = torch.full((20, 20), 0.25)
    expected[:, :5] = 1  # the central square begins at column 10
    assert torch.equal(data.loss_weight(0), expected)
    assert torch.equal(data.loss_weight(0, flipped=True), expected.flip(1))
    assert {sample["loss_weight"][0, 0].item() for sample in data} == {1.0, 0.25}
    stretched = dataset(tmp_path, size=20, center_crop=False).loss_weight(0)
    assert stretched[0, 5:7].tolist() == [1, 1] and stretched[0, 8:].unique().tolist() == [0.25]


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_crops_without_any_of_the_mask_are_left_out(tmp_path, memory):
    picture(tmp_path / "a.png", (40, 20))
    mask(tmp_path / "a_mask.png", (0, 0, 4, 4), (40, 20))
    data = dataset(tmp_path, size=16, crops=3, zooms=[1, 2])
    data._images._memory = data._images._room = memory
    data._images._in_memory.clear()
    assert data.variants() == [(0, False, 0), (0, False, 1)], "the left square, and its upper left quarter"
    assert all(data.loss_weight(*variant).max() > 0.9 for variant in data.variants())


def test_the_alpha_channel_is_a_mask_if_there_is_no_file(tmp_path):
    pixels = np.full((16, 16, 4), 255, dtype=np.uint8)
    pixels[:, 8:, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    weight = dataset(tmp_path)[0]["loss_weight"]
    assert weight[0].tolist() == [1.0] * 8 + [0.25] * 8
    mask(tmp_path / "a_mask.png", (0, 0, 16, 16))
    assert (dataset(tmp_path)[0]["loss_weight"] == 1).all()


def test_images_without_a_mask_count_as_a_whole(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    mask(tmp_path / "a_mask.png")
    data = dataset(tmp_path)
    assert data[0]["loss_weight"].min() == 0.25 and data[1]["loss_weight"].min() == 1


def test_a_mask_is_upright_as_its_image_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "a.jpg", (40, 20), exif=exif)
    mask(tmp_path / "a_mask.png", (0, 0, 20, 20), (20, 40))
    assert dataset(tmp_path, size=20)[0]["loss_weight"].mean() < 1


def test_a_mask_that_is_painted_on_transparency(tmp_path):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (0, 0, 2, 4))
    image.save(tmp_path / "m.png")
    assert np.asarray(open_mask(tmp_path / "m.png"))[0].tolist() == [255, 255, 0, 0]


def test_without_mask_weight_masks_are_named_once_and_nothing_changes(tmp_path, caplog):
    picture(tmp_path / "a.png")
    plain = dataset(tmp_path, mask_weight=None)[0]
    mask(tmp_path / "a_mask.png")
    caplog.set_level(logging.INFO)
    sample = dataset(tmp_path, mask_weight=None)[0]
    assert set(sample) == set(plain) and torch.equal(sample["image"], plain["image"])
    (record,) = caplog.records
    assert record.message.startswith("1 of 1 images have a mask, which is not used; mask_weight: 0.1")
    caplog.clear()
    dataset(tmp_path, mask_weight=None, set="val")
    assert not caplog.records


@pytest.mark.parametrize(
    ("box", "size", "params", "message"),
    [
        ((0, 0, 8, 8), (16, 8), {}, "a_mask.png is 16x8 pixels, but its image is 40x20; make them equal"),
        ((0, 0, 0, 0), (40, 20), {}, "a_mask.png is black everywhere: paint white"),
        ((0, 0, 4, 4), (40, 20), {}, "no square crop of image .*center_crop: false"),
        ((0, 0, 4, 4), (40, 20), {"mask_weight": 2}, "mask_weight is .*; it must be"),
        ((0, 0, 4, 4), (40, 20), {"mask_weight": True}, "mask_weight is .*; it must be"),
        ((0, 0, 4, 4), (40, 20), {"mask_weight": "0.1"}, "mask_weight is .*; it must be"),
        ((0, 0, 4, 4), (40, 20), {"mask_weight": float("nan")}, "mask_weight is .*; it must be"),
        (None, None, {}, "mask_weight is 0.25, but no image has a mask; put 'a-masklabel.png' beside"),
    ],
)
@pytest.mark.refused_first
def test_masks_that_do_not_fit_are_user_errors(tmp_path, box, size, params, message):
    picture(tmp_path / "a.png", (40, 20))
    if box is not None:
        mask(tmp_path / "a_mask.png", box, size)
    with pytest.raises(UserError, match=message):
        dataset(tmp_path, **params)
