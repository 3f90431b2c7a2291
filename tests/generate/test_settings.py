"""The settings in image files, as AUTOMATIC1111 writes and reads them."""

from __future__ import annotations

import re

import pytest
from PIL import Image, PngImagePlugin

from ldm.generate.images import Settings, save_image
from ldm.util import UserError

SETTINGS = Settings(
    prompt="a photo of <cat>, (small:1.2)\nby night",
    negative_prompt="blurry, text",
    steps=20,
    sampler="dpm_solver",
    scale=7.5,
    seed=965400086,
    width=512,
    height=768,
    number=3,
    labels={
        "Model hash": "45dee52b12",
        "Model": "sd-v1-4",
        "TI hashes": "<cat>: 0123456789ab, dog: ba9876543210",
    },
)
TEXT = """a photo of <cat>, (small:1.2)
by night
Negative prompt: blurry, text
Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 965400086, Size: 512x768, Image number: 3, \
Model hash: 45dee52b12, Model: sd-v1-4, TI hashes: "<cat>: 0123456789ab, dog: ba9876543210\""""


def test_the_text_and_back():
    assert SETTINGS.as_text() == TEXT
    assert Settings.from_text(TEXT) == SETTINGS
    plain = Settings(steps=5, sampler="ddim", eta=0.5, prompt_syntax="comfyui")
    assert Settings.from_text(plain.as_text()) == plain


def test_the_rules_of_automatic1111_read_the_text():
    """Its parser, by its documented form: the last line has at least three "Key: value" with quoted commas."""
    *lines, last = SETTINGS.as_text().split("\n")
    fields = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert len(fields) >= 3 and fields["Size"] == "512x768" and fields["Sampler"] == "DPM++ 2M"
    assert fields["TI hashes"].startswith('"<cat>: 0123')
    assert lines[-1].startswith("Negative prompt:")


def test_a_text_of_automatic1111():
    text = (
        "girl, <lora:x:1>\nNegative prompt: ugly, (((deformed)))\nmore\nSteps: 20, Sampler: Euler a, CFG scale: 7, "
        'Seed: 1, Size: 512x512, Model hash: 45dee52b, Hires prompt: "a, \\"b\\"", Version: v1.10.1'
    )
    found = Settings.from_text(text)
    assert (found.prompt, found.negative_prompt) == ("girl, <lora:x:1>", "ugly, (((deformed)))\nmore")
    assert (found.sampler, found.steps, found.scale) == ("Euler a", 20, 7.0)
    assert found.labels["Hires prompt"] == 'a, "b"' and found.labels["Version"] == "v1.10.1"


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_files(tmp_path, suffix):
    image = Image.new("RGB", (8, 8))
    image.info["parameters"] = SETTINGS.as_text()
    assert Settings.from_image(save_image(image, tmp_path / f"a.{suffix}")) == SETTINGS
    japanese = Settings(prompt="猫 of <cat>", steps=1)
    image.info["parameters"] = japanese.as_text()
    assert Settings.from_image(save_image(image, tmp_path / f"b.{suffix}")).prompt == "猫 of <cat>"


def test_files_without_settings(tmp_path):
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png")
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.jpg")
    (tmp_path / "b.png").write_text("no image")
    for name, match in (
        ("a.png", "has no settings"),
        ("a.jpg", "has no settings"),
        ("b.png", "not an image"),
    ):
        with pytest.raises(UserError, match=match):
            Settings.from_image(tmp_path / name)
    with pytest.raises(UserError, match="not an image"):
        Settings.from_image(tmp_path / "gone.png")
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "Steps: x, Seed: nan, CFG scale: inf, Size: 1, Image number: -")
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png", pnginfo=info)
    assert Settings.from_image(tmp_path / "c.png") == Settings()


@pytest.mark.parametrize("text", ["", "Steps", "a\n" * 1000, ":,:,:", "a" * 10**6, 'Steps: "' + "\\" * 5000])
def test_odd_texts(text):
    try:
        Settings.from_text(text)
    except UserError as error:
        assert "no settings" in str(error)
