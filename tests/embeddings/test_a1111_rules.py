"""AUTOMATIC1111's own rules, written down from their description: its unpickler, its loader, its picture codec."""

from __future__ import annotations

import base64
import collections
import json
import pickle
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.embeddings import image_files, read, write
from tests.embeddings.samples import learned

ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch", "FloatStorage"): torch.FloatStorage,
    ("torch", "LongStorage"): torch.LongStorage,
}


class StrictUnpickler(pickle.Unpickler):
    def persistent_load(self, saved_id):
        assert saved_id[0] == "storage"
        return torch.storage.TypedStorage(_internal=True)

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is forbidden")
        return ALLOWED[module, name]


def passes_its_check(path) -> bool:
    """Zip files may hold three names only; the older layout is five pickles of few classes."""
    try:
        with zipfile.ZipFile(path) as archive:
            allowed = ("data.pkl", "version", "byteorder", ".data/serialization_id")
            return all(
                name.split("/", 1)[-1] in allowed or name.split("/", 1)[-1].startswith("data/")
                for name in archive.namelist()
            )
    except zipfile.BadZipFile:
        with open(path, "rb") as file:
            unpickler = StrictUnpickler(file)
            for _ in range(5):
                unpickler.load()
            return True


def lcg(count):
    seed, numbers = 0, []
    for _ in range(count):
        seed = (1664525 * seed + 1013904223) % 2**32
        numbers.append(seed % 255)
    return np.array(numbers)


def from_pixels(image):
    """The dict in the pixels, one column and one number at a time."""
    canvas = np.array(image.convert("RGB"))
    lit = (canvas > 0).all(axis=2)
    rows, columns = np.where(lit.any(axis=1))[0], np.where(lit.any(axis=0))[0]
    canvas = canvas[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] & 0x0F
    black = [x for x in range(canvas.shape[1]) if canvas[:, x].sum() == 0]
    strips = [canvas[:, : black[0]], canvas[:, black[-1] + 1 :]]
    low, high = (s.reshape(-1) ^ (lcg(s.size).astype(np.uint8) & 0x0F) for s in strips)
    return json.loads(zlib.decompress((high << 4 | low).astype(np.uint8).tobytes()))


def test_the_generator_of_the_test_vectors():
    assert lcg(10).tolist() == [253, 242, 127, 44, 157, 27, 239, 133, 38, 79]
    numbers = image_files.noise(100_100)
    assert numbers[:10].tolist() == lcg(10).tolist()
    assert numbers[100:].astype(np.int64).sum() == 12731374
    assert np.array_equal(numbers[:3000], lcg(3000))


def test_a_usual_file_of_this_torch_is_refused(tmp_path):
    """The reason for the older layout; without it the check above would let anything through."""
    torch.save({"a": torch.zeros(2)}, tmp_path / "new.pt")
    assert not passes_its_check(tmp_path / "new.pt")
    torch.save(
        {"a": torch.nn.Parameter(torch.zeros(2))}, tmp_path / "a.pt", _use_new_zipfile_serialization=False
    )
    with pytest.raises(pickle.UnpicklingError, match="forbidden"):
        passes_its_check(tmp_path / "a.pt")


@pytest.mark.parametrize("count", [1, 3])
def test_our_pt_passes_and_loads_by_its_rules(count, tmp_path):
    embeddings = learned("cat", count)
    path = write(embeddings, tmp_path / "cat.pt", "a1111")
    assert passes_its_check(path)
    content = torch.load(path, weights_only=True)
    assert len(content["string_to_param"]) == 1
    vectors = content["string_to_param"]["*"]
    assert vectors.dtype == torch.float32 and vectors.shape == (count, 768)
    assert torch.equal(vectors, embeddings.concepts[0].vectors)
    assert (content["name"], content["step"], content["string_to_token"]) == ("cat", 500, {"*": 265})
    assert (content["sd_checkpoint"], content["sd_checkpoint_name"]) == ("cc6cb27103", "sd-v1-5")


@pytest.mark.parametrize("format", ["safetensors", "diffusers", "onetrainer"])
def test_our_safetensors_load_by_its_rules(format, tmp_path):
    from safetensors.torch import load_file

    content = load_file(write(learned(count=1), tmp_path / "cat.safetensors", format))
    assert len(content) == 1
    [vectors] = content.values()
    vectors = vectors.unsqueeze(0) if vectors.ndim == 1 else vectors
    assert vectors.shape == (1, 768)


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


def test_a_png_of_its_own_making(tmp_path):
    """A canvas made by the description, black borders and a cosmetic pattern included, is read."""
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
    picture = np.random.default_rng(1).integers(0, 256, (height, 512, 3)).astype(np.uint8)
    canvas = np.concatenate([strips[0], line, picture, line, strips[1]], axis=1)
    canvas = np.pad(canvas, ((5, 3), (7, 2), (0, 0)))
    Image.fromarray(canvas).save(tmp_path / "x.png")
    [concept] = read(tmp_path / "x.png").concepts
    assert concept.trigger == "cat" and torch.equal(concept.vectors, expected)


def test_the_strips_are_never_black():
    """Readers cut black borders off, whatever the vectors that colour the strips."""
    canvas = image_files.hide(b"x" * 5000, np.zeros((64, 8, 3), np.uint8), np.zeros(1))
    width = (canvas.shape[1] - 10) // 2
    assert canvas[:, :width].min() > 15 and canvas[:, -width:].min() > 15
    assert image_files.reveal(np.pad(canvas, ((9, 9), (9, 9), (0, 0))))[:5000] == b"x" * 5000


def test_the_preview_is_in_the_picture(tmp_path):
    preview = Image.new("RGB", (300, 300), (10, 200, 30))
    path = write(learned("cat", 1, 32), tmp_path / "cat.png", "a1111-png", preview=preview)
    canvas = np.array(Image.open(path))
    assert (canvas[100, 100:200] == (10, 200, 30)).all()


def test_without_a_preview_there_is_a_picture_of_the_numbers(tmp_path):
    image = Image.open(write(learned("cat", 1, 768), tmp_path / "cat.png", "a1111-png"))
    assert image.width > 256 and image.height >= 256 and len(image.getcolors(10**6)) > 20
