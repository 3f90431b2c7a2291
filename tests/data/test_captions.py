from __future__ import annotations

import logging

import pytest
from PIL import Image

from ldm.data.personalized import PersonalizedBase
from ldm.util import UserError


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "set"
    path.mkdir()
    for name in ("01 red mug.png", "02.png"):
        Image.new("RGB", (8, 8)).save(path / name)
    return path


@pytest.fixture
def template_file(tmp_path):
    def write(*lines: str):
        path = tmp_path / "templates.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


def captions(folder, **params) -> list[str]:
    return PersonalizedBase(folder, **params).captions()


def test_template_file(folder, template_file):
    assert captions(folder, template_file=template_file("my {}", "art by [name]")) == ["my *", "art by *"]


def test_filewords_come_from_the_txt_or_the_name(folder, template_file):
    lines = template_file("[name], [filewords]")
    assert captions(folder, template_file=lines) == ["*, red mug", "*"]
    (folder / "02.txt").write_text("on a\nblue mat\n")
    assert captions(folder, template_file=lines) == ["*, red mug", "*, on a blue mat"]


def test_dual_lines_of_a_template_file(folder, template_file):
    mixed = {"per_image_tokens": True}
    made = captions(folder, template_file=template_file("my {}", "art by [name]"), **mixed)
    assert made[:4] == ["my *", "art by *", "my * with א", "art by * with א"]
    given = captions(folder, template_file=template_file("my {}", "{} on {}", "[image] in [name]"), **mixed)
    assert given == ["my *", "* on א", "א in *", "* on ב", "ב in *"]
    with pytest.raises(UserError, match="needs per_image_tokens"):
        captions(folder, template_file=template_file("my {}", "{} on {}"))
    with pytest.raises(UserError, match="add lines with one slot"):
        captions(folder, template_file=template_file("{} on {}"), **mixed)


def test_captions_beside_the_images(folder, caplog):
    (folder / "01 red mug.txt").write_text("a [name] mug, red")
    with caplog.at_level(logging.INFO):
        dataset = PersonalizedBase(folder, use_captions=True, coarse_class_text="clay")
    assert "1 of 2 images have no .txt" in caplog.text
    assert {dataset.draw(i).caption for i in range(0, 40, 2)} == {"a clay * mug, red"}
    assert "a photo of a clay *" in dataset.captions()

    (folder / "02.txt").write_text("on a mat")
    assert captions(folder, use_captions=True) == ["a * mug, red", "*, on a mat"]
    (folder / "02.txt").write_text("a photo of * on a mat")
    assert captions(folder, use_captions=True, coarse_class_text="clay") == [
        "a clay * mug, red",
        "a photo of * on a mat",
    ]
    assert not any("mat" in caption for caption in captions(folder))


def test_the_byte_order_mark_of_a_txt_is_not_part_of_the_caption(folder):
    (folder / "02.txt").write_text("on a mat", encoding="utf-8-sig")
    assert captions(folder, use_captions=True)[-1] == "*, on a mat"


def test_an_unreadable_caption_is_named(folder):
    (folder / "02.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"02\.txt is not a UTF-8"):
        PersonalizedBase(folder, use_captions=True)
