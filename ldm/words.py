"""What a placeholder may hold, how it is found in a text, and the file name that is made from it.

A word is asked for once, before anything is loaded: what `check_word` returns works in prompts, captions, templates,
embedding files and file names.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ldm.prompts import PER_IMAGE_TOKENS
from ldm.util import UserError, shown

MAX_LENGTH = 200
MOST_VECTORS = 1000  # of a word, where the model is not known
# The end of a word that is the negative of another one, as in the files of DreamArtist.
NEGATIVE = "-neg"

_ZWNJ, _ZWJ = "\u200c", "\u200d"
# The last letter of Armenian: scripts before it (Latin, Greek, Cyrillic) have no use for joiners.
_LAST_WITHOUT_JOINERS = "\u058f"
_VIRAMA = 9  # the combining class of the signs after which a joiner may end a word
# Choose between the text and the emoji form of a character; keyboards add and drop them.
_EMOJI_FORM = "\ufe0e\ufe0f"
_BLACK_FLAG = "\U0001f3f4"  # followed by tag characters it is the flag of a region
_KEYCAP = "\u20e3"
_SKIN_TONES = "\U0001f3fb-\U0001f3ff"
# Format characters that can be seen, because they enclose the numbers that follow (Arabic, Syriac, Kaithi).
_VISIBLE_FORMATS = "\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
# Letters, marks and symbols that nobody sees: joiners, fillers of Hangul, vowels of Khmer, the empty Braille.
_BLANKS = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
# They stand for what a program could not read, or for no character at all.
_DAMAGE = "\ufffc\ufffd\ufdd0-\ufdef\ufffe\uffff"
# Choose a form of the character before them, but for the two of emoji: Mongolian, mathematical, of ideographs.
_FORMS = "\u180b-\u180d\u180f\ufe00-\ufe0d\U000e0100-\U000e01ef"
_DIRECTIONS = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_TAGS = "\U000e0020-\U000e007f"

_IS_BLANK = re.compile(f"[{_BLANKS}]")
_IS_DAMAGE = re.compile(f"[{_DAMAGE}]")
_IS_FORM = re.compile(f"[{_FORMS}]")
_IS_TAG = re.compile(f"[{_TAGS}]")
_IS_DIRECTION = re.compile(f"[{_DIRECTIONS}]")
_IS_VISIBLE_FORMAT = re.compile(f"[{_VISIBLE_FORMATS}]")
# What a prompt or a YAML would take for something else -> the name of that, and what a file's word gets instead.
_MISREAD = (
    (re.compile("embedding:", re.IGNORECASE), "'embedding:', which names a file in a prompt", "embedding_"),
    (re.compile(r"\$\{"), "'${', which is a reference in a YAML", "$("),
    (re.compile(r"^\?\?\?$"), "nothing but '???', which is a missing value in a YAML", "embedding"),
)


def check_word(word: Any, what: str = "placeholder") -> str:
    """Return a word as it is kept: in Unicode's composed form, with plain spaces.

    Letters, marks and symbols of all languages are allowed, also emoji sequences, single spaces and the syntax
    characters of prompts and templates. `what` names the word in the error.

    Raises:
        UserError: it is not a text, blank, too long, or holds what a reader cannot see or a file cannot hold.
    """
    if not isinstance(word, str):
        raise UserError(f"{what} {shown(word)} is not a text; put it in quotes")
    if not word.strip():
        raise UserError(f"{what} '{shown(word)}' is empty; choose a word such as '*'")
    if word != word.strip():
        raise UserError(f"{what} '{shown(word)}' begins or ends in a space; write it without")
    if len(word) > MAX_LENGTH:
        raise UserError(
            f"{what} '{shown(word)}' has {len(word)} characters; at most {MAX_LENGTH} are allowed"
        )
    kept = _composed(check_text(word, what))
    for place in range(len(kept)):
        if reason := _problem(kept, place):
            raise UserError(f"{what} '{shown(word)}' holds {reason}; write it without")
    if not _has_visible(kept):
        raise UserError(f"{what} '{shown(word)}' has nothing that can be seen; choose a word such as '*'")
    for form, reason, _ in _MISREAD:
        if form.search(kept):
            raise UserError(f"{what} '{shown(word)}' holds {reason}; choose another")
    return kept


def own_words(words: Iterable[str]) -> list[str]:
    """Return the words that are not the negative of another one among them."""
    held = list(words)
    return [word for word in held if word.removesuffix(NEGATIVE) not in held or not word.endswith(NEGATIVE)]


def one_word(words: Iterable[str], what: str) -> str:
    """Return the word that is not the negative of another one, to be renamed; UserError if there are several."""
    own = own_words(words)
    if len(own) > 1:
        raise UserError(f"{what} has {len(own)} words; a new name fits one: split the file first")
    return own[0]


def with_negatives(names: Mapping[str, str], held: Sequence[str]) -> dict[str, str]:
    """Return new names by old ones, and with them those of the negatives that are held and have no new name yet."""
    negatives = {f"{old}{NEGATIVE}": f"{new}{NEGATIVE}" for old, new in names.items()}
    return {old: new for old, new in negatives.items() if old in held} | dict(names)


def check_words(params: Mapping[str, Any], most: int | None = None) -> None:
    """Check the words of a personalization, and the lists that belong to them, by its params.

    `most` is the most vectors of a word, if that is known.

    Raises:
        UserError: a word is not allowed, or the lists do not fit together.
    """
    strings, _ = paired(params.get("placeholder_strings"), params.get("initializer_words"))
    kept = [check_word(word) for word in strings]
    check_different(kept)
    learned = [*kept, *(PER_IMAGE_TOKENS if params.get("per_image_tokens") else ())]
    vector_counts(kept, learned, params.get("num_vectors_per_token") or 1, most or MOST_VECTORS)


def check_different(words: Sequence[str], folded: Callable[[str], str] = str) -> None:
    """Raise UserError for a word that is there twice, as `folded`, the spelling of a tokenizer, has it."""
    seen: dict[str, str] = {}
    for word in words:
        spelling = folded(word)
        if spelling in seen:
            raise UserError(
                f"placeholder '{word}' is there twice, first as '{seen[spelling]}'; choose another word"
            )
        seen[spelling] = word


def paired(
    placeholder_strings: Sequence[str] | str | None, initializer_words: Sequence[str | None] | str | None
) -> tuple[list[str], list[str | None]]:
    """The placeholders and initializers of a YAML as lists, the second at most as long as the first.

    Raises:
        UserError: there are more initializers.
    """
    strings, initializers = _as_list(placeholder_strings), _as_list(initializer_words)
    if len(initializers) > len(strings):
        raise UserError(
            f"{len(initializers)} initializer_words for {len(strings)} placeholder_strings; give one for each"
        )
    return strings, initializers


def vector_counts(
    configured: Sequence[str],
    placeholders: Sequence[str],
    wanted: int | Sequence[int] | Mapping[str, int],
    limit: int,
) -> dict[str, int]:
    """The number of vectors of each of `placeholders`, which begin with the `configured` ones.

    A list gives the numbers of the configured placeholders in order, a mapping names them; all others get one vector.

    Raises:
        UserError: numbers outside 1 to `limit`, a list of another length, a name that is no placeholder.
    """
    if isinstance(wanted, Mapping):
        wanted = {check_word(string): count for string, count in wanted.items()}
        unknown = [string for string in wanted if string not in placeholders]
        if unknown:
            raise UserError(f"num_vectors_per_token names '{unknown[0]}', which is no placeholder")
        counts = {string: wanted.get(string, 1) for string in placeholders}
    elif isinstance(wanted, Sequence) and not isinstance(wanted, str):
        if len(wanted) != len(configured):
            raise UserError(
                f"num_vectors_per_token has {len(wanted)} entries for {len(configured)} placeholder_strings; "
                f"give one for each"
            )
        counts = dict.fromkeys(placeholders, 1) | dict(zip(configured, wanted, strict=True))
    else:
        counts = dict.fromkeys(placeholders, wanted)
    for string, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= limit:
            raise UserError(f"num_vectors_per_token of '{string}' is {count}; use a number from 1 to {limit}")
    return counts


def _as_list(value: Sequence[Any] | str | None) -> list[Any]:
    """A list from a YAML's list, a single string or nothing."""
    return [value] if isinstance(value, str) else list(value or ())


def check_text(text: str, what: str) -> str:
    """Return a text of a user.

    Raises UserError if it is none, or if Python could not decode a command line, which tokenizers refuse.
    """
    if not isinstance(text, str):
        raise UserError(f"{what} {shown(text)} is not a text; put it in quotes")
    if _has_surrogates(text):
        raise UserError(
            f"{what} '{shown(text)}' is not valid text: it has bytes that are not UTF-8; type it in a "
            "UTF-8 terminal, or set PYTHONUTF8=1"
        )
    return text


def cleaned(word: str, otherwise: str = "embedding") -> str:
    """Return the nearest word that `check_word` allows, for a file of another tool; `otherwise` if nothing is left."""
    text = "".join(" " if c.isspace() else c for c in word if not _has_surrogates(c))
    before = None
    while text != before:  # what is left out may bring two characters together that do not go together
        before = text
        text = _composed(text)[:MAX_LENGTH].strip()
        for form, _, instead in _MISREAD:
            text = form.sub(instead, text)
        text = "".join(c for place, c in enumerate(text) if _problem(text, place) is None)
    return text if _has_visible(text) else otherwise


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def _composed(word: str) -> str:
    """NFC with single plain spaces; line breaks and tabs are kept."""
    spaced = "".join(" " if unicodedata.category(c) == "Zs" else c for c in word)
    return re.sub(" +", " ", unicodedata.normalize("NFC", spaced))


def _problem(word: str, place: int) -> str | None:
    """Why the character at a place is not allowed there, or None."""
    character = word[place]
    category, name = unicodedata.category(character), f"U+{ord(character):04X}"
    if category in ("Cc", "Zl", "Zp"):
        return f"the control character {name}"
    if category == "Co":
        return f"the private character {name}, which has no meaning elsewhere"
    if _IS_DAMAGE.match(character):
        return f"the character {name}, which stands for damaged text"
    if _IS_BLANK.match(character):
        return f"the invisible character {name}"
    if _IS_FORM.match(character) and word[place - 1 : place] <= _LAST_WITHOUT_JOINERS:
        return f"the invisible variation selector {name} where it changes nothing"
    if category != "Cf":
        return None
    before, after = word[:place], word[place + 1 :]
    if character in (_ZWNJ, _ZWJ):
        joins = before[-1:] > _LAST_WITHOUT_JOINERS and before[-1:] not in (_ZWNJ, _ZWJ)
        ends = not after or after[0].isspace()
        if joins and (not ends or unicodedata.combining(before[-1]) == _VIRAMA):
            return None
        return f"the invisible joiner {name} where it joins nothing"
    if _IS_DIRECTION.match(character):
        return f"the invisible direction mark {name}"
    if _IS_VISIBLE_FORMAT.match(character):
        return None
    if _IS_TAG.match(character) and re.search(f"{_BLACK_FLAG}[{_TAGS}]*$", before):
        return None
    return f"the invisible character {name}"


def _has_visible(word: str) -> bool:
    return any(unicodedata.category(c) not in ("Cf", "Zs", "Mn", "Me", "Mc") for c in word)


def folded(word: str, ignores_case: bool = True) -> str:
    """Return the form in which words are compared: words with equal folded forms are found in the same places."""
    text = " ".join(unicodedata.normalize("NFC", word).split())
    text = re.sub(f"[{_EMOJI_FORM}]", "", text)
    return text.lower() if ignores_case else text


def pattern(word: str) -> str:
    """Return a regular expression, without groups, that finds a word in text in composed form (NFC).

    A word that begins (or ends) in a letter, digit, mark or underscore is not found inside a longer word, and an emoji
    is not found inside a longer emoji sequence. Spaces may be of any number and kind, and the marks of text and emoji
    form may be missing or added.
    """
    parts = folded(word, ignores_case=False).split() or [word]
    spelled = r"\s+".join("".join(map(_spelled, part)) for part in parts)
    joiners, marks = _ZWNJ + _ZWJ, _marks()
    before = rf"(?<![\w{marks}{joiners}])" if _continues(parts[0][0]) else f"(?<!{_ZWJ})"
    # A mark, a joiner or a skin tone after the word would be a part of it.
    after = f"{_EMOJI_FORM}{_KEYCAP}{marks}{joiners}{_SKIN_TONES}"
    if _continues(parts[-1][-1]):
        after += r"\w"
    return f"{before}{spelled}(?![{after}])"


def split(text: str, placeholders: Iterable[str], ignores_case: bool = True) -> list[tuple[str, str | None]]:
    """Return the pieces of a text in order: (text, None) for ordinary text, (text, placeholder) for a placeholder.

    Together the texts are the given one in composed form. Where several placeholders match, the longest is taken.
    """
    text = unicodedata.normalize("NFC", text)
    longest_first = sorted(placeholders, key=len, reverse=True)
    pieces: list[tuple[str, str | None]] = []
    end = 0
    if longest_first:
        for match in _any_of(tuple(longest_first), ignores_case).finditer(text):
            placeholder = longest_first[(match.lastindex or 0) - 1]  # each alternative is one group
            pieces += [(text[end : match.start()], None), (match[0], placeholder)]
            end = match.end()
    pieces.append((text[end:], None))
    return [(piece, placeholder) for piece, placeholder in pieces if piece]


@lru_cache(maxsize=64)
def _any_of(placeholders: tuple[str, ...], ignores_case: bool) -> re.Pattern[str]:
    alternatives = [f"({pattern(placeholder)})" for placeholder in placeholders]
    return re.compile("|".join(alternatives), re.IGNORECASE if ignores_case else 0)


def _spelled(character: str) -> str:
    symbol = character in "0123456789#*" or (character > "\x7f" and not _continues(character))
    return re.escape(character) + (f"[{_EMOJI_FORM}]?" if symbol else "")


def _continues(character: str) -> bool:
    """Whether a character is a part of a longer word beside letters."""
    return character.isalnum() or character == "_" or unicodedata.category(character) in ("Mn", "Mc")


# Where marks are: between are the characters of Chinese, Korean and Tangut and those for private use.
_MARKED = range(0x300, 0x3400), range(0xA66F, 0xABEE), range(0xFB1E, 0x17000), range(0x1BC9D, 0x1F000)


@lru_cache
def _marks() -> str:
    """The combining marks of all languages, as ranges of a regular expression's set; Python's \\w has none."""
    ranges: list[list[int]] = []
    for code in itertools.chain(*_MARKED):
        if unicodedata.category(chr(code)) in ("Mn", "Mc") and chr(code) not in _EMOJI_FORM:
            if ranges and code == ranges[-1][1] + 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


# Windows reserves these names for devices, with any suffix.
_RESERVED = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{name}{i}" for name in ("com", "lpt") for i in "123456789\u00b9\u00b2\u00b3"),
}
_MOST_BYTES = 200  # file systems allow 255; a number and a suffix follow


def file_stem(word: str) -> str:
    """Return a file name without suffix for a word: "<my-cat>" becomes "my-cat", and "*" becomes "embedding".

    It stays as close to the word as possible, because most tools use it as the prompt word. Letters and marks of all
    languages are kept; symbols, joiners and what this file system cannot name become "_" or are left out, and so do
    spaces, which end a word in ComfyUI.
    """
    text = unicodedata.normalize("NFC", word)
    text = "".join(c if _continues(c) or c in f"+.-{_ZWNJ}{_ZWJ}" else "\0" for c in text if _can_be_named(c))
    name = re.sub(f"\0[\0{_ZWNJ}{_ZWJ}{_EMOJI_FORM}]*", "_", text).strip("._-")
    name = name.encode()[:_MOST_BYTES].decode(errors="ignore")[:100].rstrip("._-")
    if name.split(".")[0].lower() in _RESERVED:
        name = f"{name.replace('.', '_')}_"
    return name or "embedding"


def folder_name(text: str) -> str:
    """Return a text of a user as a part of a folder's name: as it is, but "_" for what cannot be typed or named."""
    hidden = ("Cc", "Zl", "Zp")
    return "".join(c if _can_be_named(c) and unicodedata.category(c) not in hidden else "_" for c in text)


def _can_be_named(character: str) -> bool:
    try:
        os.fsencode(character)
    except UnicodeEncodeError:
        return False
    return unicodedata.category(character) != "Cs"
