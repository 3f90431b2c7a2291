from __future__ import annotations

import pytest
from PIL import Image

from ldm.generate.images import ImageFolder, free_number, name_of, save_grid
from ldm.util import UserError

RED = Image.new("RGB", (8, 6), "red")


def test_pictures_go_on_after_those_that_are_there(tmp_path) -> None:
    for name in ("0002.jpg", "0007.png", "notes.txt", "12b.png"):
        (tmp_path / name).touch()
    folder = ImageFolder(tmp_path)
    assert [folder.save(RED).name for _ in range(2)] == ["0008.png", "0009.png"]
    assert Image.open(tmp_path / "0008.png").getpixel((0, 0)) == (255, 0, 0)
    assert ImageFolder(tmp_path / "new" / "one", "jpg", digits=5).save(RED).name == "00000.jpg"


def test_a_jpeg_keeps_its_colours(tmp_path) -> None:
    picture = RED.copy()
    picture.putpixel((3, 3), (0, 0, 255))  # one pixel, which halved colour resolution would smear
    saved = Image.open(ImageFolder(tmp_path, "jpg").save(picture))
    assert all(abs(a - b) < 12 for a, b in zip(saved.getpixel((3, 3)), (0, 0, 255), strict=True))


def test_numbers_behind_a_prefix(tmp_path) -> None:
    for name in ("a-dog-0003.png", "a-dog-big-0008.png", "a-dog.png", "0009.png"):
        (tmp_path / name).touch()
    assert free_number(tmp_path, "a-dog-") == 4 and free_number(tmp_path, "cat-") == 0


def test_a_grid_has_rows_of_columns(tmp_path) -> None:
    path = save_grid([RED] * 3, 2, tmp_path / "grid.png")
    assert Image.open(path).size == (2 * 10 + 2, 2 * 8 + 2)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a photo of *, small", "a-photo-of-*,-small"),
        ("../../etc/passwd", "_._.._etc_passwd"),
        ("a\tb\nc\0d", "a-b-c_d"),
        (".hidden", "_hidden"),
        ("", "grid"),
        ("é" * 300, "é" * 100),
    ],
)
def test_a_prompt_names_a_file(tmp_path, prompt: str, name: str) -> None:
    assert name_of(prompt) == name
    (tmp_path / f"{name}-0000.png").touch()


def test_a_folder_that_cannot_be_is_named(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make the folder '.*file/samples' \(Not a directory\)"):
        ImageFolder(tmp_path / "file" / "samples")
