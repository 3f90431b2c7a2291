from __future__ import annotations

import hashlib

import pytest

from ldm import prompts
from ldm.util import UserError


@pytest.mark.parametrize(
    ("name", "count", "checksum"),
    [
        ("OBJECT_TEMPLATES", 81, "9492b607526eaaae"),
        ("OBJECT_DUAL_TEMPLATES", 27, "b464a5e799ee76fc"),
        ("STYLE_TEMPLATES", 19, "e7ec2b1750c5ab55"),
        ("STYLE_DUAL_TEMPLATES", 17, "34cb854112a21765"),
        ("PER_IMAGE_TOKENS", 22, "25f6baf7dbab8e3c"),
    ],
)
def test_lists_are_the_published_ones(name: str, count: int, checksum: str):
    lines = getattr(prompts, name)
    assert len(lines) == count
    # Taken over the published lists, joined by newlines.
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == checksum


def test_object_lines_keep_their_repeats_and_order():
    lines = prompts.OBJECT_TEMPLATES
    assert lines[0] == "a photo of a {}"
    assert lines[27] == "an illustration of a {}"
    assert lines[54] == "a depiction of a {}"
    assert lines.count("a rendering of a {}") == 3
    assert lines[53] == "an illustration of a small {}"


@pytest.mark.parametrize(
    ("template", "words", "caption"),
    [
        ("a photo of a {}", {}, "a photo of a <cat>"),
        ("a photo of a {} with {}", {"per_image": "א"}, "a photo of a <cat> with א"),
        ("a photo of a {} with [name]", {"per_image": "א"}, "a photo of a <cat> with <cat>"),
        ("[name], [name]", {}, "<cat>, <cat>"),
        ("[image] in {}", {"per_image": "א"}, "א in <cat>"),
        ("a photo of [name], [filewords]", {"filewords": "on a mat"}, "a photo of <cat>, on a mat"),
        ("a photo of [name], [filewords]", {}, "a photo of <cat>"),
        ("[filewords], by [name]", {}, "by <cat>"),
        ("{}: {a} [b] {0}", {}, "<cat>: {a} [b] {0}"),
        ("{}, [filewords]", {"filewords": "with {} and [name]"}, "<cat>, with <cat> and <cat>"),
        ("[name], [filewords]", {"filewords": "[filewords] [image]"}, "<cat>, [filewords] [image]"),
        ("a cat,", {}, "a cat,"),
    ],
)
def test_fill(template: str, words: dict, caption: str):
    assert prompts.fill(template, "<cat>", **words) == caption


def test_fill_refuses_a_second_slot_without_a_word_for_it():
    with pytest.raises(UserError, match="second slot"):
        prompts.fill("a {} with {}", "*")


def test_load_templates(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffa photo of {}\r\n\r\n  art by [name]  \n".encode())
    assert prompts.load_templates(path) == ["a photo of {}", "art by [name]"]


@pytest.mark.parametrize("word", ["{}", "[name]", "[filewords]", "%s", "\\1", "\\g<0>"])
def test_a_placeholder_that_is_a_slot_itself_is_filled_in_once(word: str):
    filled = prompts.fill("{} of [name], [filewords]", word, filewords="a [name]")
    assert filled == f"{word} of {word}, a {word}"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "not found"), (b" \n\n", "is empty"), (b"\xff\xfe\x00", "not a UTF-8")]
)
def test_load_templates_names_a_bad_file(tmp_path, content: bytes | None, message: str):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        prompts.load_templates(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
