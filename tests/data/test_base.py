from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import personalized
from ldm.data.personalized import ImageSet, squares
from ldm.util import UserError


def test_pictures_are_read_once_while_they_fit(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.new("RGB", (10, 10), (i, i, i)).save(path)
    reads = []

    def counted(path):
        reads.append(path)
        return Image.open(path).convert("RGB")

    monkeypatch.setattr(personalized, "open_image", counted)
    pictures = ImageSet(paths, size=8, memory=2 * 8 * 8 * 3)
    assert reads == paths
    for _ in range(2):
        for i in range(3):
            assert torch.equal(pictures[i, 0], torch.full((8, 8, 3), i, dtype=torch.uint8))
    assert reads[3:] == [paths[2], paths[2]]


def test_without_a_size_pictures_keep_theirs(tmp_path):
    Image.new("RGB", (10, 21)).save(tmp_path / "a.png")
    assert ImageSet([tmp_path / "a.png"], size=None)[0, 0].shape == (10, 10, 3)
    assert ImageSet([tmp_path / "a.png"], size=None, center_crop=False)[0, 0].shape == (21, 10, 3)


def test_squares_of_a_picture():
    assert squares(30, 20, 1, [1]) == [(5, 0, 20)]
    assert squares(30, 20, 3, [1]) == [(0, 0, 20), (5, 0, 20), (10, 0, 20)]
    assert squares(20, 30, 2, [1]) == [(0, 0, 20), (0, 10, 20)]
    assert squares(20, 20, 3, [1]) == [(0, 0, 20)]
    assert squares(20, 20, 2, [1, 2]) == [(0, 0, 20), (0, 0, 10), (10, 0, 10), (0, 10, 10), (10, 10, 10)]
    assert squares(24, 20, 1, [1, 1.25]) == [(2, 0, 20), (4, 2, 16)]


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_pictures_are_cut_as_the_squares_say(tmp_path, memory):
    pixels = np.random.RandomState(0).randint(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:, :20]).save(tmp_path / "b.png")
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    pictures = ImageSet(paths, size=20, crops=2, zooms=[1, 2], memory=memory)
    assert [pictures.views(i) for i in range(2)] == [6, 5]
    assert np.array_equal(pictures[0, 1], pixels[:, 10:])
    zoomed = Image.fromarray(pixels[10:, 20:]).resize((20, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(pictures[0, 5], np.asarray(zoomed))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"crops": 0}, "crops is 0"),
        ({"crops": 1.5}, "crops is 1.5"),
        ({"zooms": []}, "zooms is"),
        ({"zooms": [0.5]}, "numbers from 1 on"),
        ({"zooms": "2"}, "zooms is '2'"),
        ({"zooms": [1, 2], "size": None}, "without a size"),
        ({"crops": 2, "center_crop": False}, "center_crop: false stretches"),
        ({"zooms": [1, 1.5]}, "10x21 pixels: 8 on a side are the least at zoom 1.5"),
    ],
)
def test_squares_that_cannot_be(tmp_path, params, said):
    Image.new("RGB", (10, 21)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=said):
        ImageSet([tmp_path / "a.png"], **{"size": 8, **params})
