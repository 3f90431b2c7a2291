from __future__ import annotations

import logging
import os

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
    assert "1 of 2 images have no .txt or .caption beside them" in caplog.text
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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe\x00", r"is not a UTF-8 text file \(line 1\)"),
        ("a\nb ö".encode("cp1252"), r"is not a UTF-8 text file \(line 2\); save it as UTF-8"),
        (b"\x00\x01", "is not a text file"),
    ],
)
@pytest.mark.refused_first
def test_an_unreadable_caption_is_named(folder, content, reason):
    (folder / "02.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"02\.txt {reason}"):
        PersonalizedBase(folder, use_captions=True)


@pytest.mark.done_or_said
@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".caption", ".Caption"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_suffixes_and_encodings_of_caption_files(folder, suffix, encoding, caplog):
    (folder / f"02{suffix}").write_text("un château [name]", encoding=encoding)
    assert captions(folder, use_captions=True)[-1] == "un château *"
    assert "skipped" not in caplog.text


@pytest.mark.done_or_said
def test_of_two_caption_files_the_txt_is_used(folder, caplog):
    (folder / "02.caption").write_text("from caption")
    (folder / "02.txt").write_text(" \n")
    with caplog.at_level(logging.INFO):
        assert captions(folder, use_captions=True)[-1] == "*, from caption"
        assert "two captions" not in caplog.text
        (folder / "02.txt").write_text("from txt")
        assert captions(folder, use_captions=True)[-1] == "*, from txt"
        assert "02.png has two captions: 02.txt is used" in caplog.text


@pytest.mark.done_or_said
def test_captions_that_were_asked_for_must_exist(folder):
    with pytest.raises(
        UserError, match=r"no image has a caption beside it; write '01 red mug.txt' or '01 red"
    ):
        PersonalizedBase(folder, use_captions=True)
    (folder / "texts").mkdir()
    (folder / "texts" / "02.txt").write_text("a mat")
    with pytest.raises(UserError, match=r"\('texts/02.txt' is empty or of no image\)"):
        PersonalizedBase(folder, use_captions=True)
    (folder / "02.png.txt").write_text("a mat")
    with pytest.raises(UserError, match=r"\('02.png.txt' is empty or of no image\)"):
        PersonalizedBase(folder, use_captions=True)
    (folder / "02.txt").write_text("")
    with pytest.raises(UserError, match="no image has a caption beside it with a text"):
        PersonalizedBase(folder, use_captions=True)


@pytest.mark.done_or_said
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: path.mkdir(), "is a folder"),
        (os.mkfifo, "is not an ordinary file"),
        (lambda path: path.symlink_to("nowhere"), "is a link that leads nowhere"),
    ],
    ids=["folder", "pipe", "link"],
)
def test_what_is_named_like_a_caption_and_holds_none_is_named(folder, caplog, make, kind):
    (folder / "01 red mug.txt").write_text("a mug")
    make(folder / "02.txt")
    with caplog.at_level(logging.INFO):
        captions(folder, use_captions=True)
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning == f"{folder / '02.txt'} {kind}: it is not read as a caption"
    (folder / "01 red mug.txt").unlink()
    with pytest.raises(UserError, match=rf"with a text \('02.txt' {kind}\)"):
        PersonalizedBase(folder, use_captions=True)


@pytest.mark.done_or_said
def test_a_caption_that_holds_itself_is_refused(folder):
    (folder / "02.txt").write_text("a [filewords] on a mat")
    with pytest.raises(UserError, match=r"the caption of .*02.png holds \[filewords\]"):
        PersonalizedBase(folder, use_captions=True)


@pytest.mark.done_or_said
def test_a_name_inside_filewords_is_filled(folder, template_file):
    (folder / "02.txt").write_text("a [name] on {} mat")
    lines = template_file("photo, [filewords]")
    assert (
        captions(folder, template_file=lines, placeholder_token="<cat>")[-1] == "photo, a <cat> on <cat> mat"
    )


@pytest.mark.done_or_said
def test_filewords_without_words_are_told(folder, template_file, caplog):
    with caplog.at_level(logging.INFO):
        captions(folder, template_file=template_file("[name], [filewords]"))
    assert "[filewords] is empty for 1 of 2 images" in caplog.text


@pytest.mark.parametrize(
    ("word", "text", "caption"),
    [
        ("cat", "a category", "cat, a category"),
        ("cat", "A Cat", "A Cat"),
        ("my cat", "on my\u00a0cat", "on my cat"),
        ("cafe\u0301", "a café", "a café"),
        ("{}", "a {} b", "a {} b"),
        ("[name]", "a cat", "[name], a cat"),
    ],
)
def test_the_placeholder_in_a_caption_is_found_as_in_a_prompt(folder, word, text, caption):
    (folder / "02.txt").write_text(text, encoding="utf-8")
    assert captions(folder, use_captions=True, placeholder_token=word)[-1] == caption


@pytest.mark.parametrize("places", [{"placeholder_token": "a\u202eb"}, {"data_root": {"c\u200bat": "."}}])
@pytest.mark.refused_first
def test_a_word_that_cannot_be_kept_is_refused_before_images_are_read(tmp_path, places):
    with pytest.raises(UserError, match="placeholder of .* holds the invisible"):
        PersonalizedBase(**({"data_root": tmp_path / "missing"} | places))
