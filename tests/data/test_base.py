from __future__ import annotations

import torch
from PIL import Image

from ldm.data import base
from ldm.data.base import Pictures


def test_pictures_are_read_once_while_they_fit(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.new("RGB", (10, 10), (i, i, i)).save(path)
    reads = []

    def counted(path):
        reads.append(path)
        return Image.open(path).convert("RGB")

    monkeypatch.setattr(base, "open_image", counted)
    pictures = Pictures(paths, size=8, memory=2 * 8 * 8 * 3)
    assert reads == paths
    for _ in range(2):
        for i in range(3):
            assert torch.equal(pictures[i], torch.full((8, 8, 3), i, dtype=torch.uint8))
    assert reads[3:] == [paths[2], paths[2]]


def test_without_a_size_pictures_keep_theirs(tmp_path):
    Image.new("RGB", (10, 21)).save(tmp_path / "a.png")
    assert Pictures([tmp_path / "a.png"], size=None)[0].shape == (10, 10, 3)
    assert Pictures([tmp_path / "a.png"], size=None, center_crop=False)[0].shape == (21, 10, 3)
