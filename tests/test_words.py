"""What a word may hold, where it is found, and the file name that is made from it."""

from __future__ import annotations

import os
import random
import re
import unicodedata

import pytest

from ldm import words
from ldm.util import UserError
from ldm.words import check_word, cleaned, file_stem, folded, pattern

pytestmark = pytest.mark.refused_first

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
ENGLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
PERSIAN = "می\u200cخواهم"
HINDI = "बिल्ली"
MALAYALAM = "അവന്\u200d"  # ends in a virama and a joiner

ALLOWED = [
    "*",
    "<my-cat>",
    "my cat",
    "قطة",
    PERSIAN,
    HINDI,
    MALAYALAM,
    "แมว",
    "猫",
    "חתול",
    FAMILY,
    ENGLAND,
    "\U0001f1e9\U0001f1ea",
    "❤\ufe0f",
    "1\ufe0f\u20e3",
    "\U0001f44d\U0001f3fd",
    "葛\U000e0100",  # an ideograph with a form of its own
    "∩\ufe00",
    "\u0378",  # not assigned yet, as the emoji of the next year
    "{}",
    "[name]",
    "[filewords]",
    "%s",
    "(x:1.3)",
    "[V]",
    "a\\b",
    "<lora:x:1>",
    "BREAK",
    "x" * 200,
]


@pytest.mark.parametrize("word", ALLOWED)
def test_words_of_all_languages_and_symbols_are_kept(word):
    assert check_word(word) == cleaned(word) == word


@pytest.mark.parametrize(
    ("word", "kept"),
    [("my\u00a0cat", "my cat"), ("my \u3000 cat", "my cat"), ("cafe\u0301", "café")],
)
def test_spaces_and_composition_are_made_equal(word, kept):
    assert check_word(word) == cleaned(word) == kept
    assert folded(word) == folded(kept)


@pytest.mark.parametrize(
    ("word", "reason", "nearest"),
    [
        (7, "7 is not a text", None),
        ("", "is empty", "embedding"),
        (" \u00a0 ", "is empty", "embedding"),
        ("cat ", "begins or ends in a space", "cat"),
        ("\u00a0cat", "begins or ends in a space", "cat"),
        ("x" * 201, "has 201 characters; at most 200", "x" * 200),
        ("a\nb", "control character U[+]000A", "a b"),
        ("a\x1b[31m", "control character U[+]001B", "a[31m"),
        ("a\u2028b", "control character U[+]2028", "a b"),
        ("cat\udcc3\udca9", "bytes that are not UTF-8.*PYTHONUTF8=1", "cat"),
        ("a\u202eb", "direction mark U[+]202E", "ab"),
        ("\u200fقطة", "direction mark U[+]200F", "قطة"),
        ("c\u200bat", "invisible character U[+]200B", "cat"),
        ("\ufeffcat", "invisible character U[+]FEFF", "cat"),
        ("ca\u00adt", "invisible character U[+]00AD", "cat"),
        ("c\u200dat", "invisible joiner U[+]200D", "cat"),
        ("\u200dقطة", "invisible joiner U[+]200D", "قطة"),
        ("قطة\u200c", "invisible joiner U[+]200C", "قطة"),
        ("م\u200c\u200cه", "invisible joiner U[+]200C", "م\u200cه"),
        ("cat\U000e0067", "invisible character U[+]E0067", "cat"),
        ("a\ue02eb", "private character U[+]E02E", "ab"),
        ("\u0301", "nothing that can be seen", "embedding"),
        ("a\u3164b", "invisible character U[+]3164", "ab"),
        ("\uffa0", "invisible character U[+]FFA0", "embedding"),
        ("\u2800cat", "invisible character U[+]2800", "cat"),
        ("c\u034fat", "invisible character U[+]034F", "cat"),
        ("c\ufe00at", "invisible variation selector U[+]FE00", "cat"),
        ("\U000e0100cat", "invisible variation selector U[+]E0100", "cat"),
        ("caf\ufffd", "U[+]FFFD, which stands for damaged text", "caf"),
        ("a\uffffb", "U[+]FFFF, which stands for damaged text", "ab"),
        ("embedding:cat", "names a file in a prompt", "embedding_cat"),
        ("embed\u200bding:cat", "invisible character", "embedding_cat"),
        ("a${b}", r"holds '\${', which is a reference in a YAML; choose another", "a$(b}"),
        ("???", "a missing value in a YAML", "embedding"),
    ],
)
def test_the_reason_is_named_and_a_file_gets_the_nearest_word(word, reason, nearest):
    with pytest.raises(UserError, match=reason) as caught:
        check_word(word, "placeholder")
    assert str(caught.value).startswith("placeholder ") and len(str(caught.value)) < 300
    if nearest is not None:
        assert cleaned(word) == nearest == check_word(nearest)


def test_what_is_left_of_any_text_is_a_word():
    rng = random.Random(0)
    parts = [
        *"ab *${:?\n\u00a0\u200d\u200c\u202e\ufe0f\u0301\U0001f3f4\U000e0067\ud800\ue02e",
        "embedding:",
        "مب",
        HINDI,
    ]
    for _ in range(3000):
        text = "".join(rng.choice(parts) for _ in range(rng.randint(0, 12)))
        word = cleaned(text)
        assert check_word(word) == word == cleaned(word), ascii(text)


def found(word: str, text: str) -> list[str]:
    return re.findall(pattern(word), unicodedata.normalize("NFC", text), re.IGNORECASE)


@pytest.mark.parametrize("word", ALLOWED)
@pytest.mark.parametrize("text", ["{}", "a photo of {}, red", '"{}"', "({})", "{} {}"])
def test_an_allowed_word_is_found_where_it_is_typed(word, text):
    assert found(word, text.replace("{}", word)) == [word] * text.count("{}")


@pytest.mark.parametrize(
    ("word", "text", "expected"),
    [
        ("cat", "cats scat cat's Cat", ["cat", "Cat"]),
        ("My Café", "MY \u00a0cafe\u0301", ["MY \u00a0café"]),
        ("बिल", HINDI, []),  # only a mark follows, which is a part of the word
        ("م", PERSIAN, []),
        ("خواهم", PERSIAN, []),
        ("y", "x\u0302y", []),
        ("\U0001f468", FAMILY, []),
        ("\U0001f467", FAMILY, []),
        ("\U0001f44d", "\U0001f44d\U0001f3fd \U0001f44d", ["\U0001f44d"]),
        ("❤", "❤\ufe0f ❤", ["❤\ufe0f", "❤"]),
        ("❤\ufe0f", "❤ cat", ["❤"]),
        ("❤", "❤\ufe0f\u200d\U0001f525", []),
        ("*", "2*3 *\ufe0f\u20e3", ["*"]),
        ("cat", "❤\ufe0fcat", ["cat"]),
        ("x", "x\u0302", []),  # x with a circumflex has no composed form
    ],
)
def test_a_word_is_not_found_inside_a_longer_one(word, text, expected):
    assert found(word, text) == expected


def test_equal_words_have_equal_folded_forms():
    assert folded("Cat") == folded("cat") != folded("Cat", ignores_case=False)
    assert folded("❤\ufe0f") == folded("❤")


@pytest.mark.parametrize(
    ("word", "stem"),
    [
        ("<my-cat>", "my-cat"),
        ("*", "embedding"),
        ("../../etc/passwd", "etc_passwd"),
        ("con", "con_"),
        ("COM1.txt", "COM1_txt_"),
        ("com\u00b2", "com\u00b2_"),
        (HINDI, HINDI),
        (PERSIAN, PERSIAN),
        ("cafe\u0301", "café"),
        (FAMILY, "embedding"),
        (f"{FAMILY} cat", "cat"),
        ("a\x00b\n", "a_b"),
        ("(x:1.3)", "x_1.3"),
        ("猫" * 200, "猫" * 66),
        ("a\ud800b", "ab"),
    ],
)
def test_file_names(word, stem):
    assert file_stem(word) == stem


def test_file_names_hold_what_the_file_system_can_name(monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii"))
    assert file_stem("קat") == "at"
    assert file_stem("ק") == "embedding"


def test_the_marks_are_those_of_all_characters() -> None:
    every = {chr(code) for code in range(0x300, 0x1F000) if unicodedata.category(chr(code)) in ("Mn", "Mc")}
    found = re.compile(f"[{words._marks()}]")
    assert {c for c in every if found.match(c)} == every - set(words._EMOJI_FORM)
