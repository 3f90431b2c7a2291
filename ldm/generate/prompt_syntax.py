"""Weighted prompts as AUTOMATIC1111 and ComfyUI write them: (word:1.3), ((word)), [word], BREAK.

`ldm.generate.embeddings` encodes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ldm import words
from ldm.front_ends import setting
from ldm.util import UserError, shown

SYNTAXES = ("a1111", "comfyui", "plain")
# What one pair of parentheses multiplies by.
EMPHASIS = 1.1
HIGHEST_WEIGHT = 10

_TOKEN = re.compile(
    r"""
    \\[()\[\]\\]                               # an escaped bracket
    | :\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)     # the number that ends a parenthesis
    | [()\[\]]
    | \bBREAK\b
    | (?:(?!\bBREAK\b)[^()\[\]\\:])+         # other text
    | .
    """,
    re.DOTALL | re.VERBOSE,
)
_NUMBER_AT_END = re.compile(r":\s*([^\s:]+)\s*$")
_LIKE_A_NUMBER = re.compile(
    r"(?<!\\):\s*([+-]?(?:[\d.,]*\d[\d.,]*(?:e[+-]?\d+)?|nan|inf(?:inity)?))\s*\)", re.IGNORECASE
)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
_WHEN = re.compile(r":\s*[\d.]+\s*$")
# Syntax of other tools that has no meaning here -> what it is and the remedy. Placeholders are private characters.
_FOREIGN = (
    (re.compile(r"\{[^{}]*\|[^{}]*\}"), "random choices are not supported; write one of them"),
    (re.compile(r"\{\}"), "this is the slot of templates; write the word"),
    (re.compile(r"\{[^{}]+\}"), "weights of NovelAI are written (words) or (words:1.05) here"),
    (re.compile(r"__[\w/-]+__"), "wildcards are not supported; write the words"),
    (
        re.compile(
            r"""(?<!\\)\)(?:\d*\.\d+|[+-]{1,9}(?=[\s,.)]|$))   # (words)1.3 and (words)++
            | (?:[^\W\d_]{2,}|[\U000F0000-\U000FFFFD])(?:\+{1,9}|-{2,9})(?=[\s,.;)]|$)  # word++ and word--
            """,
            re.VERBOSE,
        ),
        "weights of InvokeAI are written (words:1.3) here",
    ),
    (re.compile(r"\.(?:blend|swap|and)\("), "prompts of InvokeAI are not combined here; write one prompt"),
    (
        re.compile(r"(?:[^\W\d_]|[\U000F0000-\U000FFFFD]):\d*\.\d+(?=\s*(?:[^\s\d)\]]|$))|::-?\d"),
        "weights of words without parentheses are written (words:1.3) here",
    ),
    (
        re.compile(r"(?<!\S)--(?:ar|v|q|s|no|iw|niji|seed|stylize|chaos)\s+\S+"),
        "options of Midjourney are not supported; remove them",
    ),
)
_AND = re.compile(r"\bAND\b")


@dataclass(frozen=True)
class Segment:
    """A part of a prompt in which all tokens have the same weight."""

    text: str
    weight: float = 1.0


Chunks = Sequence[Sequence[Segment]]


def parse(
    prompt: str, placeholders: Iterable[str], syntax: str = "a1111", ignores_case: bool = True
) -> Chunks:
    """Split a prompt into chunks (at BREAK) of segments with equal weight.

    `(text)` multiplies weights by 1.1. In AUTOMATIC1111's syntax `(text:1.3)` multiplies by the number, `[text]`
    divides by 1.1, and a bracket that is not closed extends to the end; in ComfyUI's `(text:1.3)` is the weight itself
    whatever stands around it, and square brackets and a single parenthesis are text. `\\(` is a literal parenthesis.
    Placeholders are never taken for syntax.

    Raises:
        UserError: syntax of these tools that has no meaning here: prompt editing `[from:to:when]`, alternation `[a|b]`,
            AND, random choices, a weight that is not a number or is beyond -10 to 10.
    """
    if syntax == "plain":
        return [[Segment(prompt)]]
    pieces = words.split(prompt, placeholders, ignores_case)
    # Each placeholder becomes one private character while the syntax around it is read.
    signs = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in prompt)
    hidden = {next(signs): text for text, word in pieces if word is not None}
    names = iter(hidden)
    text = "".join(piece if word is None else next(names) for piece, word in pieces)
    _refuse_foreign(text, hidden, syntax)
    parts = _a1111_parts(text) if syntax == "a1111" else _comfyui_parts(text)
    chunks: list[list[Segment]] = [[]]
    for part, weight in parts:
        if part is None:
            chunks.append([])
            continue
        part = _restored(part, hidden)
        if chunks[-1] and abs(chunks[-1][-1].weight - weight) < 1e-9:
            chunks[-1][-1] = Segment(chunks[-1][-1].text + part, weight)
        else:
            chunks[-1].append(Segment(part, weight))
    filled = [chunk for chunk in chunks if any(segment.text.strip() for segment in chunk)]
    return filled or [[Segment("")]]


def _restored(text: str, hidden: Mapping[str, str]) -> str:
    return "".join(hidden.get(c, c) for c in text)


# The text of a part and its weight; None is BREAK.
_Parts = list[tuple[str | None, float]]


def _a1111_parts(prompt: str) -> _Parts:
    """The weighted parts of a prompt: brackets multiply what they enclose, wherever the other kind opens and closes."""
    parts: _Parts = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        parts[start:] = [(text, weight * factor) for text, weight in parts[start:]]

    for token in _TOKEN.findall(prompt):
        if token == "BREAK":
            parts.append((None, 1.0))
        elif token in opened:
            opened[token].append(len(parts))
        elif token.endswith(")") and token[0] in ":)" and opened["("]:
            multiply("(", EMPHASIS if token == ")" else _weight(token[1:-1]))
        elif token == "]" and opened["["]:
            multiply("[", 1 / EMPHASIS)
        else:
            parts.append((token[1:] if token[0] == "\\" and len(token) == 2 else token, 1.0))
    while opened["("]:
        multiply("(", EMPHASIS)
    while opened["["]:
        multiply("[", 1 / EMPHASIS)
    return parts


def _comfyui_parts(prompt: str, weight: float = 1.0) -> _Parts:
    """The weighted parts of a prompt: a number is the weight of its parentheses, not a factor."""
    parts: _Parts = []
    for group, enclosed in _groups(prompt):
        if enclosed:
            number = _NUMBER_AT_END.search(group)
            inner = weight * EMPHASIS
            if number is not None and number.start() and (value := _number(number[1])) is not None:
                inner, group = _weight(value), group[: number.start()]
            parts += _comfyui_parts(group, inner)
        else:
            for index, text in enumerate(re.split(r"\bBREAK\b", group)):
                parts += [(None, 1.0)] if index else []
                parts.append((re.sub(r"\\([()])", r"\1", text), weight))
    return parts


def _groups(prompt: str) -> Iterator[tuple[str, bool]]:
    """The pieces of a prompt in order, and whether they stood in a pair of parentheses; escaped ones do not count."""
    start, opened = 0, []
    pairs: dict[int, int] = {}
    for token in re.finditer(r"\\[()]|[()]", prompt):
        if token[0] == "(":
            opened.append(token.start())
        elif token[0] == ")" and opened:
            pairs[opened.pop()] = token.start()
    for left, right in sorted(pairs.items()):
        if left >= start:  # not inside the pair before
            if left > start:
                yield prompt[start:left], False
            yield prompt[left + 1 : right], True
            start = right + 1
    if start < len(prompt):
        yield prompt[start:], False


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _weight(number: str | float) -> float:
    weight = float(number)
    if not abs(weight) <= HIGHEST_WEIGHT:
        raise UserError(f"the weight {weight:g} in the prompt is beyond -10 to 10; 0.5 to 1.5 is usual")
    return weight


def _refuse_foreign(prompt: str, hidden: Mapping[str, str], syntax: str) -> None:
    """Raise UserError for syntax that would otherwise be rendered as letters."""
    found = next(((match[0], remedy) for form, remedy in _FOREIGN if (match := form.search(prompt))), None)
    for match in _LIKE_A_NUMBER.finditer(prompt):
        # ComfyUI reads every number of Python, and its range is checked; AUTOMATIC1111 takes such a one for text.
        if (_number(match[1]) if syntax == "comfyui" else _NUMBER.fullmatch(match[1])) is None:
            found = (match[0], "it is not a number; write a weight as (words:1.3)")
    if syntax == "a1111":
        if editing := _editing(prompt):
            found = (editing, "prompt editing and alternation of AUTOMATIC1111 are not supported; remove it")
        elif _AND.search(prompt):
            found = (
                "AND",
                "prompts of AUTOMATIC1111 joined by AND are not supported; write 'and' or a comma",
            )
    if found is not None:
        text = shown(_restored(found[0], hidden))
        raise UserError(
            f"the prompt contains '{text}': {found[1]}, or use {setting('plain_syntax')} to take it as text"
        )


def _editing(prompt: str) -> str | None:
    """The first `[from:to:when]` or `[a|b]` of a prompt, with any brackets inside; None if there is none."""
    frames: list[tuple[str, int, list[str]]] = []
    for token in re.finditer(r"\\.|.", prompt, re.DOTALL):
        character = token[0]
        if character in "([":
            frames.append((character, token.start(), []))
        elif character in ")]":
            pair = "(" if character == ")" else "["
            if any(frame[0] == pair for frame in frames):
                while (frame := frames.pop())[0] != pair:
                    pass
                own = "".join(frame[2])
                if pair == "[" and ("|" in own or _WHEN.search(own)):
                    return prompt[frame[1] : token.end()]
        elif frames:
            frames[-1][2].append(" " if len(character) > 1 else character)
    return None
