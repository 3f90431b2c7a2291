"""Weighted prompts as AUTOMATIC1111 and ComfyUI write them: (word:1.3), ((word)), [word], BREAK.

A weight scales what a token adds to the encoder's output. The two tools scale differently, and both definitions are
here; a prompt without weights is encoded exactly as without this file.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm import words
from ldm.front_ends import setting
from ldm.models.diffusion.conditioning import (
    TimedCondition,
    TimedPrompts,
    concat_conditions,
    context_of,
    with_context,
)
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.personalization import Personalization, TextEncoder
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


def chunk_count(model: LatentDiffusion, prompt: str, syntax: str) -> int:
    """The number of chunks of a prompt; 1 where the syntax has none."""
    encoder, manager = model.cond_stage_model, model.embedding_manager
    if syntax == "plain" or not isinstance(encoder, TextEncoder):
        return 1
    names = [] if manager is None else list(manager.placeholders)
    return len(parse(prompt, names, syntax, encoder.prompt_tokenizer.ignores_case))


def conditions(
    model: LatentDiffusion,
    prompts: Sequence[str],
    negative_prompt: str | None,
    syntax: str,
    least_chunks: int = 1,
) -> tuple[Any, Any]:
    """The condition of a batch of prompts, and that of the negative prompt for each (None without guidance).

    All are filled up to the longest of them, and to `least_chunks`, because guidance needs conditions of one length.
    """
    negatives = [] if negative_prompt is None else model.negative_prompts(prompts, negative_prompt)
    encoder, manager = model.cond_stage_model, model.embedding_manager
    if syntax != "plain" and isinstance(encoder, TextEncoder):
        names = [] if manager is None else list(manager.placeholders)
        ignores_case = encoder.prompt_tokenizer.ignores_case
        parsed = [parse(text, names, syntax, ignores_case) for text in [*prompts, *negatives]]
        longest = max(least_chunks, *map(len, parsed))
        if longest > 1 or any(part.weight != 1 for chunks in parsed for part in chunks[0]):
            filled = [_filled(chunks, longest) for chunks in parsed]
            wanted, unwanted = filled[: len(prompts)], filled[len(prompts) :]
            condition = model.completed(_weighted_condition(encoder, manager, wanted, syntax))
            if not negatives:
                return condition, None
            return condition, model.completed(
                _weighted_condition(encoder, manager, unwanted, syntax), negatives
            )
        texts = ["".join(part.text for part in chunks[0]) for chunks in parsed]
        prompts, negatives = texts[: len(prompts)], texts[len(prompts) :]
    condition = model.get_learned_conditioning(list(prompts))
    return condition, model.get_unconditional_conditioning(negatives) if negatives else None


def _weighted_condition(
    encoder: TextEncoder, manager: Personalization | None, prompts: Sequence[Chunks], syntax: str
) -> Any:
    """The weighted condition of prompts with equal numbers of chunks; that of timed words is one at the timestep.

    Prompts without a learned word are encoded plainly and once, which may be much faster.
    """

    def at(chunks: Sequence[Chunks], times: Tensor) -> Any:
        return encode(encoder, manager, chunks, syntax, times)

    parts: list[Any] = []
    for has_words, texts in itertools.groupby(prompts, functools.partial(_has_words, encoder, manager)):
        fixed = [tuple(tuple(chunk) for chunk in chunks) for chunks in texts]
        if has_words and manager is not None and manager.timed:
            parts.append(TimedCondition([TimedPrompts(fixed, at, manager.stage_of)]))
        else:
            parts.append(encode(encoder, manager if has_words else None, fixed, syntax))
    return functools.reduce(concat_conditions, parts)


def _has_words(encoder: TextEncoder, manager: Personalization | None, chunks: Chunks) -> bool:
    if manager is None:
        return False
    texts = ["".join(segment.text for segment in chunk) for chunk in chunks]
    return bool(encoder.prompt_tokenizer.found(texts, manager.placeholders))


def check_token_limit(encoder: TextEncoder, manager: Personalization | None, prompt: str, syntax: str) -> str:
    """The text of a prompt that the token limit truncates, empty if everything fits.

    Raises:
        UserError: a placeholder is truncated, wholly or in part, or the prompt's syntax is not supported.
    """
    tokenizer = encoder.prompt_tokenizer
    ids: dict[str, int] = {}
    widths: dict[str, int] = {}
    if manager is not None:
        ids = {word: int(token) for word, token in manager.string_to_token_dict.items()}
        widths = manager.placeholders
    lost = []
    for chunk in parse(prompt, ids, syntax, tokenizer.ignores_case):
        text = "".join(segment.text for segment in chunk)
        for cut in tokenizer.truncated(text, ids, widths):
            raise UserError(
                f"the token limit of {tokenizer.max_length} truncates '{shown(cut.placeholder)}' in the prompt "
                f"'{shown(prompt, 80)}' ({cut.kept} of {cut.vectors} vectors remain); move it forward or shorten "
                "the prompt"
            )
        lost.append(tokenizer.overflow(text, ids, widths))
    return " ".join(filter(None, lost))


def encode(
    encoder: TextEncoder,
    manager: Personalization | None,
    prompts: Sequence[Chunks],
    syntax: str = "a1111",
    times: Tensor | None = None,
) -> Any:
    """The weighted condition of prompts in chunks: a context [B, n * L, d], n the largest number of chunks.

    It is layered as the personalization's own is; `times` [B] are the timesteps for one that depends on them.

    With E the encoder's context of a chunk and w its weights [L], `a1111` gives w E, rescaled to the mean of E (as
    AUTOMATIC1111's "Original" emphasis does, here for each chunk and each text tower by itself); `comfyui` gives
    E0 + w (E - E0), with E0 the context of the empty prompt. Both are E where all weights are 1. Prompts with fewer
    chunks than others are filled up with the empty prompt. What an encoder gives beside the context, such as a pooled
    vector, is that of the first chunk without weights.
    """
    count = max(map(len, prompts))
    encoded = []
    for row, chunks in enumerate(prompts):
        own = None if times is None else times[row, None]
        filled = _filled(chunks, count)
        encoded.append(_joined([_encode_chunk(encoder, manager, chunk, syntax, own) for chunk in filled]))
    return functools.reduce(concat_conditions, encoded)


def _joined(chunks: Sequence[Any]) -> Any:
    """The conditions of one prompt's chunks as one: their contexts one after the other."""
    return with_context(chunks[0], torch.cat([context_of(chunk) for chunk in chunks], dim=-2))


def _filled(chunks: Chunks, count: int) -> Chunks:
    return [*chunks, *([[Segment("")]] * (count - len(chunks)))]


def _encode_chunk(
    encoder: TextEncoder,
    manager: Personalization | None,
    chunk: Sequence[Segment],
    syntax: str,
    times: Tensor | None,
) -> Any:
    """The condition of one chunk at a timestep [1], with a context [1, ..., L, d]."""
    ids: Mapping[str, int] = {}
    widths: Mapping[str, int] = {}
    if manager is not None:
        ids = {word: int(token) for word, token in manager.string_to_token_dict.items()}
        widths = manager.placeholders
    segments = [(segment.text, segment.weight) for segment in chunk]
    tokens, weights = encoder.prompt_tokenizer.encode_weighted(segments, ids, widths)
    row = tokens[None].to(encoder.device)
    encoded = encoder.embed_ids(row, None) if manager is None else manager.encode(encoder, row, times)
    if bool((weights == 1).all()):
        return encoded
    context = context_of(encoded)
    weights = weights.to(context)[:, None]
    if syntax == "comfyui":
        empty = context_of(encoder.encode([""], manager))
        return with_context(encoded, empty + weights * (context - empty))
    towers = context.split(encoder.widths, dim=-1) if len(encoder.widths) > 1 else (context,)
    rescaled = []
    for tower in towers:
        weighted = weights * tower
        means = [states.mean(dim=(-2, -1), keepdim=True) for states in (tower, weighted)]
        rescaled.append(weighted * (means[0] / means[1]))
    return with_context(encoded, torch.cat(rescaled, dim=-1))
