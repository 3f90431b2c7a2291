"""Weighted prompts as AUTOMATIC1111 and ComfyUI write them: (word:1.3), ((word)), [word], BREAK.

A weight scales what a token adds to the encoder's output. The two tools scale differently, and both definitions are
here; a prompt without weights is encoded exactly as without this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.personalization import Personalization, TextEncoder
from ldm.modules.prompt_tokenizer import PromptTokenizer
from ldm.util import UserError

SYNTAXES = ("a1111", "comfyui", "plain")
# What one pair of parentheses multiplies by.
EMPHASIS = 1.1
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
_EDITING = re.compile(r"\[[^\[\]]*(?::\s*[\d.]+\s*|\|[^\[\]]*)\]")


@dataclass(frozen=True)
class Segment:
    """A part of a prompt in which all tokens have the same weight."""

    text: str
    weight: float = 1.0


Chunks = list[list[Segment]]


def parse(
    prompt: str, tokenizer: PromptTokenizer, placeholders: Iterable[str], syntax: str = "a1111"
) -> Chunks:
    """Split a prompt into chunks (at BREAK) of segments with equal weight.

    `(text)` multiplies weights by 1.1, `(text:1.3)` by the number; in AUTOMATIC1111's syntax `[text]` divides by 1.1.
    Brackets may be nested; `\\(` is a literal bracket; a bracket that is not closed extends to the end, one that was
    never opened is text. Placeholders are never taken for syntax.

    Raises:
        UserError: syntax that has no meaning here: prompt editing `[from:to:when]`, alternation `[a|b]`, a weight
            that is not a number or is beyond -10 to 10.
    """
    if syntax == "plain":
        return [[Segment(prompt)]]
    words = list(placeholders)
    plain = "".join("x" * len(piece) if word else piece for piece, word in tokenizer.split(prompt, words))
    if syntax == "a1111" and (editing := _EDITING.search(plain)):
        raise UserError(
            f"the prompt contains '{editing[0]}': prompt editing and alternation of AUTOMATIC1111 are not supported; "
            "remove it, or use --prompt_syntax plain to take it as text"
        )
    parser = _Parser(brackets=syntax == "a1111")
    for piece, word in tokenizer.split(prompt, words):
        if word is not None:
            parser.add_text(piece)
        else:
            for match in _TOKEN.finditer(piece):
                parser.add(match[0])
    return parser.chunks()


class _Parser:
    """Collects (text, weight) and multiplies the weights between two brackets when the second one is read."""

    def __init__(self, brackets: bool) -> None:
        self.brackets = brackets
        self.parts: list[tuple[str | None, float]] = []  # text None is BREAK
        self.open_round: list[int] = []
        self.open_square: list[int] = []

    def add_text(self, text: str) -> None:
        self.parts.append((text, 1.0))

    def add(self, token: str) -> None:
        if token == "BREAK":
            self.parts.append((None, 1.0))
        elif token == "(":
            self.open_round.append(len(self.parts))
        elif token == "[" and self.brackets:
            self.open_square.append(len(self.parts))
        elif token.startswith(":") and token.endswith(")") and len(token) > 1 and self.open_round:
            self._multiply(self.open_round.pop(), _weight(token[1:-1]))
        elif token == ")" and self.open_round:
            self._multiply(self.open_round.pop(), EMPHASIS)
        elif token == "]" and self.brackets and self.open_square:
            self._multiply(self.open_square.pop(), 1 / EMPHASIS)
        elif token.startswith("\\") and len(token) == 2:
            self.add_text(token[1])
        else:
            self.add_text(token)

    def _multiply(self, start: int, factor: float) -> None:
        self.parts[start:] = [(text, weight * factor) for text, weight in self.parts[start:]]

    def chunks(self) -> Chunks:
        for start in self.open_round:
            self._multiply(start, EMPHASIS)
        for start in self.open_square:
            self._multiply(start, 1 / EMPHASIS)
        chunks: Chunks = [[]]
        for text, weight in self.parts:
            if text is None:
                chunks.append([])
            elif chunks[-1] and abs(chunks[-1][-1].weight - weight) < 1e-9:
                chunks[-1][-1] = Segment(chunks[-1][-1].text + text, weight)
            else:
                chunks[-1].append(Segment(text, weight))
        filled = [chunk for chunk in chunks if any(segment.text.strip() for segment in chunk)]
        return filled or [[Segment("")]]


def _weight(text: str) -> float:
    weight = float(text)
    if abs(weight) > 10:
        raise UserError(f"the weight {weight:g} in the prompt is beyond -10 to 10; 0.5 to 1.5 is usual")
    return weight


def chunk_count(model: LatentDiffusion, prompt: str, syntax: str) -> int:
    """The number of chunks of a prompt; 1 where the syntax has none."""
    encoder, manager = model.cond_stage_model, model.embedding_manager
    if syntax == "plain" or not isinstance(encoder, TextEncoder):
        return 1
    words = [] if manager is None else list(manager.placeholders)
    return len(parse(prompt, encoder.prompt_tokenizer, words, syntax))


def conditions(
    model: LatentDiffusion, prompts: Sequence[str], negative_prompt: str | None, syntax: str
) -> tuple[Any, Any]:
    """The condition of a batch of prompts, and that of the negative prompt for each (None without guidance)."""
    negatives = [] if negative_prompt is None else [negative_prompt] * len(prompts)
    encoder, manager = model.cond_stage_model, model.embedding_manager
    if syntax != "plain" and isinstance(encoder, TextEncoder):
        words = [] if manager is None else list(manager.placeholders)
        parsed = [parse(text, encoder.prompt_tokenizer, words, syntax) for text in [*prompts, *negatives]]
        if any(len(chunks) > 1 or any(part.weight != 1 for part in chunks[0]) for chunks in parsed):
            encoded = encode(encoder, manager, parsed, syntax)
            return encoded[: len(prompts)], encoded[len(prompts) :] if negatives else None
        texts = ["".join(part.text for part in chunks[0]) for chunks in parsed]
        prompts, negatives = texts[: len(prompts)], texts[len(prompts) :]
    condition = model.get_learned_conditioning(list(prompts))
    return condition, model.get_learned_conditioning(negatives) if negatives else None


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
    for chunk in parse(prompt, tokenizer, ids, syntax):
        text = "".join(segment.text for segment in chunk)
        for cut in tokenizer.truncated(text, ids, widths):
            raise UserError(
                f"the token limit of {tokenizer.max_length} truncates '{cut.placeholder}' in the prompt "
                f"'{prompt[:80]}' ({cut.kept} of {cut.vectors} vectors remain); move it forward or shorten the prompt"
            )
        lost.append(tokenizer.overflow(text, ids, widths))
    return " ".join(filter(None, lost))


def encode(
    encoder: TextEncoder,
    manager: Personalization | None,
    prompts: Sequence[Chunks],
    syntax: str = "a1111",
) -> Tensor:
    """The weighted context of prompts in chunks: [B, n * L, d], n the largest number of chunks.

    With E the encoder's output of a chunk and w its weights [L], `a1111` gives w E, rescaled to the mean of E (as
    AUTOMATIC1111's "Original" emphasis does, here for each chunk by itself); `comfyui` gives E0 + w (E - E0), with E0
    the output of the empty prompt. Both are E where all weights are 1. Prompts with fewer chunks than others are
    filled up with the empty prompt.
    """
    count = max(map(len, prompts))
    contexts = [
        torch.cat([_encode_chunk(encoder, manager, chunk, syntax) for chunk in _filled(chunks, count)])
        for chunks in prompts
    ]
    return torch.stack(contexts)


def _filled(chunks: Chunks, count: int) -> Chunks:
    return [*chunks, *([[Segment("")]] * (count - len(chunks)))]


def _encode_chunk(
    encoder: TextEncoder, manager: Personalization | None, chunk: Sequence[Segment], syntax: str
) -> Tensor:
    """The context [L, d] of one chunk."""
    ids: Mapping[str, int] = {}
    widths: Mapping[str, int] = {}
    if manager is not None:
        ids = {word: int(token) for word, token in manager.string_to_token_dict.items()}
        widths = manager.placeholders
    segments = [(segment.text, segment.weight) for segment in chunk]
    tokens, weights = encoder.prompt_tokenizer.encode_weighted(segments, ids, widths)
    device = encoder.token_embedding.weight.device
    encoded = encoder.embed_ids(tokens[None].to(device), manager)[0]
    if bool((weights == 1).all()):
        return encoded
    weights = weights.to(encoded)[:, None]
    if syntax == "comfyui":
        empty = encoder.encode([""], manager)[0]
        return empty + weights * (encoded - empty)
    weighted = weights * encoded
    return weighted * (encoded.mean() / weighted.mean())
