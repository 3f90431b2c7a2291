"""Embeddings in images, against an independent implementation of AUTOMATIC1111's description."""

from __future__ import annotations

import base64
import json
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.embeddings import image_files, read, write
from ldm.images import open_image
from tests.embeddings.samples import learned, refused, saved, vectors

pytestmark = pytest.mark.client_files


def lcg(count):
    seed, numbers = 0, []
    for _ in range(count):
        seed = (1664525 * seed + 1013904223) % 2**32
        numbers.append(seed % 255)
    return np.array(numbers)


def from_pixels(image):
    """Read the dict in the pixels, with a plain loop over columns and numbers."""
    canvas = np.array(image.convert("RGB"))
    lit = (canvas > 0).all(axis=2)
    rows, columns = np.where(lit.any(axis=1))[0], np.where(lit.any(axis=0))[0]
    canvas = canvas[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] & 0x0F
    black = [x for x in range(canvas.shape[1]) if canvas[:, x].sum() == 0]
    strips = [canvas[:, : black[0]], canvas[:, black[-1] + 1 :]]
    low, high = (s.reshape(-1) ^ (lcg(s.size).astype(np.uint8) & 0x0F) for s in strips)
    return json.loads(zlib.decompress((high << 4 | low).astype(np.uint8).tobytes()))


def png(path: Path, text: str | None = None, canvas: np.ndarray | None = None) -> Path:
    info = PngInfo()
    if text is not None:
        info.add_text("sd-ti-embedding", text)
    image = Image.new("RGB", (16, 16), "red") if canvas is None else Image.fromarray(canvas)
    image.save(path, pnginfo=info)
    return path


def test_the_pseudo_random_numbers_are_those_of_the_description():
    assert lcg(10).tolist() == [253, 242, 127, 44, 157, 27, 239, 133, 38, 79]
    numbers = image_files.whitening(100_100)
    assert numbers[:10].tolist() == lcg(10).tolist()
    assert numbers[100:].astype(np.int64).sum() == 12731374
    assert np.array_equal(numbers[:3000], lcg(3000))


@pytest.mark.parametrize(("count", "width"), [(1, 32), (3, 768), (1, 8)])
def test_our_png_carries_the_same_twice(count, width, tmp_path):
    embeddings = learned("<cat>", count, width)
    path = write(embeddings, tmp_path / "cat.png", "a1111-png", preview=Image.new("RGB", (32, 32), "black"))
    image = Image.open(path)
    image.load()
    text = json.loads(base64.b64decode(image.text["sd-ti-embedding"]))
    assert text == from_pixels(image)
    assert text["name"] == "<cat>" and list(text["string_to_param"]) == ["*"]
    numbers = np.array(text["string_to_param"]["*"]["TORCHTENSOR"])
    assert numbers.dtype == np.float64
    assert torch.equal(torch.from_numpy(numbers).float(), embeddings.concepts[0].vectors)


def test_a_png_made_from_the_description_is_read(tmp_path):
    """The image has black borders and random high bits in its strips, which readers must ignore."""
    expected = learned("cat", 2).concepts[0].vectors
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": {"TORCHTENSOR": expected.tolist()}},
        "name": "cat",
        "step": 10,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    height = 512
    data = np.frombuffer(zlib.compress(json.dumps(content).encode(), level=9), np.uint8)
    strips = []
    for half in (data & 0x0F, data >> 4):
        size = len(half)
        size += height - size % height
        size += 3 * height - size % (3 * height)
        block = np.resize(half, size).reshape(height, -1, 3)
        block = block ^ (lcg(size).astype(np.uint8).reshape(block.shape) & 0x0F)
        dots = np.random.default_rng(0).integers(1, 16, block.shape[:2]).astype(np.uint8) << 4
        strips.append(block ^ dots[..., None])
    line = np.zeros((height, 1, 3), np.uint8)
    pixels = np.random.default_rng(1).integers(0, 256, (height, 512, 3)).astype(np.uint8)
    canvas = np.concatenate([strips[0], line, pixels, line, strips[1]], axis=1)
    canvas = np.pad(canvas, ((5, 3), (7, 2), (0, 0)))
    Image.fromarray(canvas).save(tmp_path / "x.png")
    [concept] = read(tmp_path / "x.png").concepts
    assert concept.trigger == "cat" and torch.equal(concept.vectors, expected)


def test_the_strips_are_never_black():
    """Readers crop black borders, so the strips must not be black even where all shades are 0."""
    canvas = image_files.hide_bytes(b"x" * 5000, np.zeros((64, 8, 3), np.uint8), np.zeros(1))
    width = (canvas.shape[1] - 10) // 2
    assert canvas[:, :width].min() > 15 and canvas[:, -width:].min() > 15
    assert image_files.find_hidden_bytes(np.pad(canvas, ((9, 9), (9, 9), (0, 0))))[:5000] == b"x" * 5000


def test_the_preview_is_in_the_image(tmp_path):
    preview = Image.new("RGB", (300, 300), (10, 200, 30))
    path = write(learned("cat", 1, 32), tmp_path / "cat.png", "a1111-png", preview=preview)
    canvas = np.array(open_image(path))
    assert (canvas[100, 100:200] == (10, 200, 30)).all()


def test_without_a_preview_the_image_is_a_heat_map(tmp_path):
    image = open_image(write(learned("cat", 1, 768), tmp_path / "cat.png", "a1111-png"))
    assert image.width > 256 and image.height >= 256 and len(image.getcolors(10**6)) > 20


def test_a_webp_carries_the_embedding_in_its_pixels(every_file):
    with Image.open(every_file["webp"]) as image:
        assert getattr(image, "text", None) is None
    [concept] = read(every_file["webp"]).concepts
    assert concept.trigger == "<cat>" and torch.equal(concept.vectors, vectors(width=32))


def test_a_png_without_its_text_chunk_is_read_from_the_pixels(tmp_path, every_file):
    image = Image.open(every_file["our a1111-png"])
    image.load()
    image.info.clear()
    image.save(tmp_path / "stripped.png")
    assert torch.equal(read(tmp_path / "stripped.png").concepts[0].vectors, vectors(width=32))


def test_a_zlib_bomb_in_the_pixels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.embeddings.image_files._MAX_JSON", 2**16)
    bomb = zlib.compress(b"[" + b"1," * (20 * 2**20), 9)
    path = png(
        tmp_path / "a.png",
        canvas=image_files.hide_bytes(bomb, np.full((256, 8, 3), 200, np.uint8), np.ones(1)),
    )
    tracemalloc.start()
    refused(path, "larger than any")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20


def test_an_image_of_a_billion_pixels_is_refused(tmp_path):
    data = bytearray(png(tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 40_000, 40_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    refused(saved(tmp_path / "a.png", bytes(data)), "image is damaged")
    refused(png(tmp_path / "b.png", canvas=np.zeros((5000, 5000, 3), np.uint8)), "5000 x 5000 pixels")


def test_the_size_of_an_image_is_checked_before_its_pixels_are_decoded(tmp_path, monkeypatch):
    path = png(tmp_path / "a.png", canvas=np.zeros((64, 65, 3), np.uint8))
    monkeypatch.setattr(image_files, "_MAX_PIXELS", 64 * 64)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("the pixels were decoded"))
    refused(path, "65 x 64 pixels; at most 4096 are read")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[" * 100_000, "no embedding"),
        ("[1, 2]", "not an embedding"),
        ("{}", "holds no tensors"),
        ('{"string_to_param": {"*": {"TORCHTENSOR": [[NaN, 1]]}}, "name": "x"}', "NaN or infinity"),
        ('{"string_to_param": {"*": {"TORCHTENSOR": [[1e999, 1]]}}, "name": "x"}', "NaN or infinity"),
        ('{"string_to_param": {"*": {"TORCHTENSOR": [[1, 2], [1]]}}, "name": "x"}', "not lists of numbers"),
        ('{"string_to_param": {"*": {"TORCHTENSOR": "abc"}}, "name": "x"}', "not lists of numbers"),
        ('{"string_to_param": {"*": {"TORCHTENSOR": []}}, "name": "x"}', "shape"),
        ('{"string_to_param": {"*": 5}, "name": "x"}', "not a tensor but int"),
        ('{"string_to_param": "*", "name": "x"}', "not a mapping"),
        ('{"string_to_param": {}, "name": "x"}', "holds 0"),
    ],
)
def test_bad_contents_of_an_image_are_refused(content, match, tmp_path):
    refused(png(tmp_path / "a.png", base64.b64encode(content.encode()).decode()), match)


def test_images_without_an_embedding_are_refused(tmp_path):
    refused(png(tmp_path / "a.png"), "carries no embedding")
    refused(png(tmp_path / "b.png", "%%% not base64"), "no embedding, or a damaged one")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "c.webp")
    refused(tmp_path / "c.webp", "carries no embedding")
