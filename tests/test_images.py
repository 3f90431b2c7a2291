"""Reading, converting and arranging images."""

from __future__ import annotations

import logging
import os
import sys
import types

import numpy as np
import pytest
import torch
from PIL import AvifImagePlugin, Image, features

from ldm.images import (
    ImageError,
    enlarged,
    grid,
    image_grid,
    labelled,
    list_images,
    open_image,
    squares,
    text_image,
    to_pil,
    to_tensor,
)

RED = (200, 30, 40)


def saved(path, image: Image.Image, **options):
    image.save(path, **options)
    return path


def test_listing_is_sorted_and_logs_skipped_entries_in_one_line(tmp_path, caplog):
    for name in ("b.PNG", "a.jpg", "c"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")
    for name in (".DS_Store", "._a.jpg", "a.txt", "b.CAPTION", "notes.md", "README"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "more.png").mkdir()
    with caplog.at_level(logging.INFO):
        assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG", "c"]
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}: skipped entries that are not images: README, more.png/, notes.md"
    ]


def test_listing_names_the_kind_of_other_files(tmp_path, caplog):
    for name in ("a.DNG", "b.mp4", "c.svg", "d.txt"):
        (tmp_path / name).touch()
    said = (
        r"it holds a.DNG \(a camera's RAW file\), b.mp4 \(a video\), c.svg \(a vector drawing\), d.txt, and"
    )
    with pytest.raises(ImageError, match=rf"no images.*{said} subfolders are not searched; export it as PNG"):
        list_images(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "e.png")
    list_images(tmp_path)
    assert "skipped entries that are not images: a.DNG (a camera's RAW file)" in caplog.text
    assert caplog.text.endswith("export it as PNG or JPEG\n")


def test_listing_errors_name_the_folder(tmp_path):
    (tmp_path / "file.png").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.md").touch()
    for name, message in (
        ("gone", "not found"),
        ("file.png", "is a file"),
        ("empty", "no images.*it is empty"),
        ("texts", "no images.*notes.md"),
    ):
        with pytest.raises(ImageError, match=message) as caught:
            list_images(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation: int):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", stored, exif=exif)
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(upright))


def test_transparent_pixels_become_white(tmp_path):
    rgba = np.full((2, 3, 4), (*RED, 255), dtype=np.uint8)
    rgba[:, 0, 3] = 0
    rgba[:, 1, 3] = 128
    opened = np.asarray(open_image(saved(tmp_path / "rgba.png", Image.fromarray(rgba))))
    assert tuple(opened[0, 0]) == (255, 255, 255)
    assert np.allclose(opened[0, 1], (227, 142, 147), atol=1)
    assert tuple(opened[0, 2]) == RED

    grey = Image.fromarray(np.array([[[10, 0], [10, 255]]], dtype=np.uint8), "LA")
    assert np.asarray(open_image(saved(tmp_path / "la.png", grey)))[0, :, 0].tolist() == [255, 10]

    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, *RED])
    palette.putpixel((0, 0), 0)
    opened = np.asarray(open_image(saved(tmp_path / "p.png", palette, transparency=0)))
    assert opened[0].tolist() == [[255, 255, 255], list(RED)]


def test_high_bit_depths_are_scaled_not_clipped(tmp_path):
    ramp = np.array([[0, 257, 128 * 257, 65535]])
    for name, array in (
        ("a.png", ramp.astype(np.uint16)),
        ("b.tiff", ramp.astype(np.uint16)),
        ("c.tiff", ramp.astype(np.int32)),
        ("d.tiff", (ramp / 65535).astype(np.float32)),
    ):
        opened = np.asarray(open_image(saved(tmp_path / name, Image.fromarray(array))))
        assert opened[0, :, 0].tolist() == [0, 1, 128, 255], name
    dark = np.array([[0, 200]], dtype=np.uint16)
    assert np.asarray(open_image(saved(tmp_path / "e.png", Image.fromarray(dark)))).max() == 1


def test_other_modes_become_rgb(tmp_path):
    bits = Image.new("1", (8, 8))
    bits.putpixel((0, 0), 1)
    opened = open_image(saved(tmp_path / "bits.png", bits))
    assert opened.mode == "RGB" and opened.getpixel((0, 0)) == (255, 255, 255)

    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    opened = open_image(saved(tmp_path / "cmyk.jpg", cmyk, quality=100))
    assert opened.mode == "RGB" and np.allclose(opened.getpixel((3, 3)), (255, 0, 0), atol=4)

    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = saved(tmp_path / "two.gif", frames[0], save_all=True, append_images=frames[1:])
    assert open_image(path).getpixel((3, 3)) == (255, 0, 0)


def test_damaged_files_are_one_line_that_names_them(tmp_path, monkeypatch):
    whole = saved(tmp_path / "whole.jpg", Image.effect_noise((64, 64), 50))
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:900])
    page = tmp_path / "page.png"
    page.write_text("<html>")
    png = bytearray(saved(tmp_path / "whole.png", Image.effect_noise((64, 64), 50)).read_bytes())
    png[60:90] = bytes(30)
    broken = tmp_path / "broken.png"
    broken.write_bytes(png)
    (tmp_path / "nothing.png").touch()
    for path in (cut, page, broken, tmp_path / "nothing.png", tmp_path / "gone.png"):
        with pytest.raises(ImageError) as caught:
            open_image(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"whole\.jpg: Image size .* exceeds limit"):
        open_image(whole)


FTYP = b"\x00\x00\x00\x18ftyp"


@pytest.mark.one_reader
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.heic", FTYP + b"heic\0\0\0\0mif1heic", "HEIC needs a plugin of Pillow: pip install pillow-heif"),
        ("a.jpg", FTYP + b"mif1\0\0\0\0mif1heic", "HEIC needs a plugin"),  # as some phones name them
        ("a.avif", FTYP + b"avif\0\0\0\0mif1avif", "AVIF needs a plugin.* pillow-avif-plugin, or export"),
        ("a.jxl", b"\xff\x0a\xfa\x1f", "JPEG XL needs a plugin of Pillow: pip install pillow-jxl-plugin"),
        ("a.jxl", b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL needs"),
        ("a.png", FTYP + b"isom\0\0\0\0isom", "it is a video; export"),
        ("a.mpg", b"\0\0\x01\xb3\x01\x00\x10", "it is a video"),
        ("a.png", b"\x1aE\xdf\xa3\0", "it is a video"),
        ("a.png", b"RIFF\0\0\0\0AVI LIST", "it is a video"),
        ("a.cr3", FTYP + b"crx \0\0\0\0crx ", "it is a camera's RAW file; export it as PNG or JPEG"),
        ("a.DNG", b"II*\0", "it is a camera's RAW file"),
        ("a.tif", b"MM\0*\0\0\0\x08\0\0\0\0", "it is a TIFF of a kind that Pillow cannot read.*; export it"),
        ("a.png", b"%PDF-1.7\n", "it is a PDF; export"),
        ("a.png", b"<?xml version='1.0'?><svg></svg>", "it is a vector drawing"),
        ("a.png", b"", "it is empty"),
        ("a.png", b"<!DOCTYPE html>", "it is a web page; download the file itself"),
        ("a.png", b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
        ("a.png", b"\x01\x02", "not an image in a format that Pillow knows"),
    ],
)
def test_what_is_no_readable_image_is_named_for_what_it_is(tmp_path, monkeypatch, name, content, reason):
    for module in ("pillow_heif", "pillow_avif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it was not installed
    if name == "a.avif":
        monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
        monkeypatch.setattr(features, "check", lambda name: False)
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason) as caught:
        open_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.one_reader
def test_an_installed_plugin_is_used(tmp_path, monkeypatch):
    def register() -> None:
        Image.register_open(
            "TOY", lambda file, name: Image.new("RGB", (3, 2), RED), lambda head: b"heic" in head
        )
        Image.ID.insert(0, "TOY")

    plugin = types.ModuleType("pillow_heif")
    plugin.register_heif_opener = register
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    path = tmp_path / "a.heic"
    path.write_bytes(FTYP + b"heic\0\0\0\0mif1heic")
    assert open_image(path).getpixel((0, 0)) == RED
    plugin.register_heif_opener = lambda: None  # it does not know this one
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "TOY"])
    with pytest.raises(ImageError, match="it is HEIC, but damaged or of an unknown kind; export it as PNG"):
        open_image(path)


@pytest.mark.one_reader
def test_a_photo_of_a_phone_without_a_suffix_is_an_image(tmp_path):
    path = tmp_path / "IMG_0001"  # as some programs copy them
    path.write_bytes(FTYP + b"heic\0\0\0\0mif1heic")
    assert list_images(tmp_path) == [path]


@pytest.mark.one_reader
@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
def test_avif_is_read(tmp_path):
    path = saved(tmp_path / "a.avif", Image.new("RGB", (16, 16), RED), quality=100)
    assert list_images(tmp_path) == [path]
    assert np.allclose(open_image(path).getpixel((3, 3)), RED, atol=4)
    path.write_bytes(FTYP + b"avif\0\0\0\0mif1avif")
    with pytest.raises(ImageError, match="it is AVIF, but damaged"):
        open_image(path)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation_is_used_and_told_once(tmp_path, caplog, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    path = saved(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert np.allclose(open_image(path).getpixel((3, 3)), (255, 0, 0), atol=4)
    assert [record.message for record in caplog.records] == [f"{path} has 3 frames: the first one is used"]


def test_a_large_photo_is_read_without_a_warning(tmp_path, monkeypatch, recwarn):
    path = saved(tmp_path / "large.png", Image.new("RGB", (40, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert open_image(path).size == (40, 40)
    assert not recwarn.list


def test_reading_leaves_no_file_open(tmp_path):
    path = saved(tmp_path / "a.png", Image.new("RGB", (8, 8)))
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    kept = [open_image(path) for _ in range(20)]
    after = len(os.listdir("/proc/self/fd")) if before else 0
    assert len(kept) == 20 and after <= before


def test_tensors_and_images_are_inverse():
    image = Image.fromarray(np.arange(256 * 3, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3))
    tensor = to_tensor(image)
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(np.asarray(to_pil(tensor)), np.asarray(image))
    assert np.array_equal(np.asarray(to_pil(tensor.double())), np.asarray(image))
    assert to_pil(torch.tensor([2.0, -2.0, 0.0]).reshape(3, 1, 1)).getpixel((0, 0)) == (255, 0, 128)


def test_grid():
    images = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    sheet = image_grid(images, columns=2, padding=3, scale=2)
    assert sheet.size == (2 * (8 + 3) + 3, 2 * (8 + 3) + 3)
    assert sheet.getpixel((3, 3)) == (255, 0, 0) and sheet.getpixel((10, 10)) == (255, 0, 0)
    assert sheet.getpixel((14, 3)) == (0, 255, 0)
    assert sheet.getpixel((3, 14)) == (0, 0, 255)
    assert sheet.getpixel((20, 20)) == sheet.getpixel((11, 3)) == (255, 255, 255)
    assert image_grid(images[:1], columns=4, padding=0).size == (4, 4)
    with pytest.raises(ImageError, match="at least one"):
        image_grid([], columns=2)


def test_a_labelled_grid_of_images_and_files(tmp_path):
    small, large = Image.new("RGB", (50, 50), "red"), Image.new("RGB", (2000, 1000), "blue")
    sheet = grid([small, saved(tmp_path / "large.png", large)], labels=["small", "large"])
    # 50 pixels are enlarged three times, 2000 are reduced to 512.
    assert sheet.width == 2 * (512 + 4) + 4 and sheet.height > 256 + 8
    assert (np.asarray(sheet) == (255, 0, 0)).all(axis=2).sum() == 150 * 150
    assert (np.asarray(sheet) == (0, 0, 255)).all(axis=2).sum() == 512 * 256
    assert grid([large], largest=None).size == (2008, 1008)
    assert grid([small] * 4, columns=2, smallest=1, padding=0).size == (100, 100)
    with pytest.raises(ImageError, match="2 images and 1 labels"):
        grid([small, small], labels=["one"])
    with pytest.raises(ImageError, match="at least one"):
        grid([])


def test_enlarged_repeats_pixels():
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    assert np.asarray(enlarged(image, 3))[2, :, 2].tolist() == [0, 0, 0, 255, 255, 255]


def test_a_label_is_below_the_image():
    image = Image.new("RGB", (64, 64), "red")
    short, long = labelled(image, "a cat"), labelled(image, "a photo of a very small cat on a red mat")
    assert short.width == long.width == 64
    assert 64 < short.height < long.height
    for sheet in (short, long):
        assert np.array_equal(np.asarray(sheet)[:64], np.asarray(image))
        assert np.asarray(sheet)[64:].min() < 128


def test_text_is_broken_inside_a_long_word_and_may_be_in_any_script():
    ink = np.asarray(text_image("pneumonoultramicroscopic", 40, 60)) < 128
    assert ink[20:60].any() and not ink[:, -1].any()
    text_image("a photo of * with א", 100, 20)


def test_squares_of_an_image() -> None:
    assert squares(30, 20, 1, [1]) == [(5, 0, 20)]
    assert squares(30, 20, 3, [1]) == [(0, 0, 20), (5, 0, 20), (10, 0, 20)]
    assert squares(20, 30, 2, [1]) == [(0, 0, 20), (0, 10, 20)]
    assert squares(20, 20, 3, [1]) == [(0, 0, 20)]
    assert squares(20, 20, 2, [1, 2]) == [(0, 0, 20), (0, 0, 10), (10, 0, 10), (0, 10, 10), (10, 10, 10)]
    assert squares(24, 20, 1, [1, 1.25]) == [(2, 0, 20), (4, 2, 16)]
