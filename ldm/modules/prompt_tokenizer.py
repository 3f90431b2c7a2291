"""Prompts to token ids, with placeholders found wherever they stand, and vectors put in place of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm import words
from ldm.util import UserError


@dataclass(frozen=True)
class CutOff:
    """A placeholder that the token limit truncates: `kept` of its `vectors` remain; occurrences count from 1."""

    placeholder: str
    occurrence: int
    kept: int
    vectors: int


# The texts whose tokens a PromptTokenizer remembers at most.
MOST_KNOWN = 4096


class PromptTokenizer:
    """A Hugging Face tokenizer that reads a placeholder as one token id, whatever characters are beside it.

    A plain tokenizer joins a placeholder with its neighbours (CLIP reads "*," as one token). Therefore the prompt is
    split at the placeholders first, and the pieces are tokenised one by one. A placeholder that begins (or ends) with
    a letter, digit or underscore only matches where no such character precedes (or follows). Where several
    placeholders match, the longest is taken.

    Args:
        tokenizer: of transformers.
        max_length: L, the number of tokens of an encoded prompt, start and end included.
        vocab_size: number of rows of the encoder's embedding table.
        start_id, end_id, pad_id: special token ids.
    Raises:
        UserError: the tokenizer has ids beyond `vocab_size`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        vocab_size: int,
        start_id: int,
        end_id: int,
        pad_id: int,
    ) -> None:
        largest = max(tokenizer.get_vocab().values())
        if largest >= vocab_size:
            raise UserError(
                f"the tokenizer has ids up to {largest} but the text encoder only {vocab_size} embeddings; "
                f"use the tokenizer that belongs to the encoder"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.vocab_size = vocab_size
        self.start_id, self.end_id, self.pad_id = start_id, end_id, pad_id
        self._known: dict[str, tuple[int, ...]] = {}
        self.ignores_case = self.token_ids("Ab") == self.token_ids("ab")

    def token_ids(self, text: str) -> list[int]:
        """The token ids of a text without placeholders, special tokens, padding and limit."""
        # Training reads the same few templates at every step, and the tokenizer takes 0.1 ms for each.
        if text not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[text] = tuple(
                self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            )
        return list(self._known[text])

    def placeholder_id(self, string: str, index: int) -> int:
        """The tokenizer's own id of a placeholder that is exactly one token, else `vocab_size + index`.

        An id from `vocab_size` on has no row in the embedding table; `embed_tokens` handles it.
        """
        own = self._own_id(string)
        return self.vocab_size + index if own is None else own

    def placeholder_ids(self, strings: Iterable[str]) -> dict[str, Tensor]:
        """The ids of placeholders that are held together, each a 0-dim int64 on the CPU; see `placeholder_id`."""
        return {
            string: torch.tensor(self.placeholder_id(string, index), device="cpu")
            for index, string in enumerate(strings)
        }

    def is_word(self, string: str) -> bool:
        """Whether a placeholder is one token of letters, which probably has a meaning already."""
        return string.isalpha() and self._own_id(string) is not None

    def folded(self, string: str) -> str:
        """The form in which texts are compared: placeholders with equal folded forms are the same one."""
        return words.folded(string, self.ignores_case)

    def encode(self, texts: str | Sequence[str], placeholders: Mapping[str, int] | None = None) -> Tensor:
        """Token ids [B, max_length] on the CPU: start, tokens, end, padding. Text beyond the limit is truncated."""
        texts = [texts] if isinstance(texts, str) else texts
        return torch.tensor([self._row(text, placeholders or {}) for text in texts], dtype=torch.long)

    def truncated(
        self, text: str, placeholders: Mapping[str, int], widths: Mapping[str, int]
    ) -> list[CutOff]:
        """The occurrences of placeholders in a prompt that the token limit truncates, wholly or in part.

        `widths` maps each placeholder to its number of vectors (default 1). The prompt is truncated twice: its tokens
        before the vectors are inserted, and the result of the insertion.
        """
        cut: list[CutOff] = []
        seen: dict[str, int] = {}
        position = 1
        for index, (_, placeholder) in enumerate(self._content(text, placeholders)):
            vectors = 1 if placeholder is None else widths.get(placeholder, 1)
            if placeholder is not None:
                seen[placeholder] = seen.get(placeholder, 0) + 1
                fits = min(vectors, max(0, self.max_length - position))
                kept = fits if index < self.max_length - 2 else 0
                if kept < vectors:
                    cut.append(CutOff(placeholder, seen[placeholder], kept, vectors))
            position += vectors
        return cut

    def overflow(self, text: str, placeholders: Mapping[str, int], widths: Mapping[str, int]) -> str:
        """The ordinary text of a prompt that the token limit truncates; empty if everything fits."""
        lost: list[int] = []
        position = 1
        for index, (token, placeholder) in enumerate(self._content(text, placeholders)):
            if placeholder is None and (position >= self.max_length or index >= self.max_length - 2):
                lost.append(token)
            position += 1 if placeholder is None else widths.get(placeholder, 1)
        return self.tokenizer.decode(lost).strip() if lost else ""

    def encode_weighted(
        self,
        segments: Sequence[tuple[str, float]],
        placeholders: Mapping[str, int],
        widths: Mapping[str, int],
    ) -> tuple[Tensor, Tensor]:
        """Token ids and the weight of each encoded position, both [max_length], for a prompt in weighted segments.

        The weights are those after vectors were inserted: a placeholder with `widths` vectors has as many weights.
        Start, end and padding have weight 1.
        """
        content = [
            (token, word, weight)
            for text, weight in segments
            for token, word in self._content(text, placeholders)
        ]
        content = content[: self.max_length - 2]
        weights = [1.0]
        for _, word, weight in content:
            weights += [weight] * (1 if word is None else widths.get(word, 1))
        weights = (weights + [1.0] * self.max_length)[: self.max_length]
        return torch.tensor(self.row([token for token, _, _ in content])), torch.tensor(weights)

    def row(self, tokens: Sequence[int]) -> list[int]:
        """Tokens between start and end, those beyond the limit cut off, padded to `max_length`."""
        row = [self.start_id, *tokens[: self.max_length - 2], self.end_id]
        return row + [self.pad_id] * (self.max_length - len(row))

    def negative_prompt(self, negative: str, prompt: str, placeholders: Collection[str]) -> str:
        """The negative prompt with the placeholder W-neg for each W in the prompt, where it is not there yet."""
        there, steered = self.found([prompt], placeholders), self.found([negative], placeholders)
        wanted = [f"{word}{words.NEGATIVE}" for word in placeholders if word in there]
        added = [word for word in wanted if word in placeholders and word not in steered]
        return " ".join(filter(None, [negative, *added]))

    def found(self, texts: Iterable[str], placeholders: Iterable[str]) -> set[str]:
        """The placeholders that occur in at least one of the texts."""
        strings = list(placeholders)
        return {word for text in texts for _, word in self.split(text, strings) if word is not None}

    def _own_id(self, string: str) -> int | None:
        ids = self.token_ids(string)
        if len(ids) != 1 or ids[0] in self.tokenizer.all_special_ids:
            return None  # all unknown words share the special token [UNK]
        spelled = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
        return ids[0] if self.folded(spelled) == self.folded(string) else None

    def _row(self, text: str, placeholders: Mapping[str, int]) -> list[int]:
        return self.row([token for token, _ in self._content(text, placeholders)])

    def split(self, text: str, placeholders: Iterable[str]) -> list[tuple[str, str | None]]:
        """The pieces of a prompt in order: (text, None) for ordinary text, (text, placeholder) for a placeholder.

        Together the texts are the prompt in Unicode's composed form (NFC).
        """
        return words.split(text, placeholders, self.ignores_case)

    def _content(self, text: str, placeholders: Mapping[str, int]) -> list[tuple[int, str | None]]:
        """The token ids of a prompt, each with its placeholder (None for ordinary tokens)."""
        if not placeholders:
            return [(token, None) for token in self.token_ids(text)]
        content: list[tuple[int, str | None]] = []
        for piece, placeholder in self.split(text, placeholders):
            if placeholder is not None:
                content.append((placeholders[placeholder], placeholder))
            elif piece.strip():
                content += [(token, None) for token in self.token_ids(piece)]
        return content


def embed_tokens(
    table: nn.Embedding, ids: Tensor, embedding_manager: Callable[[Tensor, Tensor], Tensor] | None
) -> Tensor:
    """Look up token ids [B, L] as [B, L, d], and let the embedding manager replace placeholders.

    For ids beyond the table (see `PromptTokenizer.placeholder_id`) row 0 is looked up; the manager gets the ids
    unchanged.
    """
    embedded = table(ids.masked_fill(ids >= table.num_embeddings, 0))
    return embedded if embedding_manager is None else embedding_manager(ids, embedded)


def check_placeholders(strings: Sequence[str], tokenizer: PromptTokenizer) -> list[str]:
    """Return the words to learn as they are kept (see `ldm.words.check_word`), before anything is trained.

    Raises:
        UserError: a placeholder is not allowed, or equals another one for this tokenizer.
    """
    kept = [words.check_word(string) for string in strings]
    words.check_different(kept, tokenizer.folded)
    return kept


def check_room(counts: Mapping[str, int], most: int, source: str) -> None:
    """Raise UserError, which names `source`, for a word of more vectors than a prompt has room for."""
    for string, count in counts.items():
        if count > most:
            raise UserError(
                f"{source}: '{string}' has {count} vectors, a prompt has room for {most}; learn it with fewer, or name "
                "another word's file"
            )


# -- several vectors in place of one token -------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """For each of P placeholders: token id, number of vectors to insert, row of its first vector; [P] each."""

    ids: Tensor
    widths: Tensor
    offsets: Tensor

    @classmethod
    def build(
        cls, ids: Sequence[int], widths: Sequence[int], rows: Sequence[int], device: torch.device
    ) -> Layout:
        """The layout of placeholders with `rows` vectors each, one after the other in one table."""
        offsets = [sum(rows[:i]) for i in range(len(rows))]
        return cls(*(torch.tensor(values, device=device) for values in (ids, widths, offsets)))


def insert_vectors(tokens: Tensor, embedded: Tensor, vectors: Tensor, layout: Layout) -> Tensor:
    """Insert vectors [R, d] or [B, R, d] in place of the placeholders among tokens [B, L], embedded as [B, L, d].

    A placeholder with several vectors moves the following tokens to the right; what passes position L is dropped.
    Returns a new [B, L, d]; no value is read back from the device.
    """
    matches = tokens.unsqueeze(-1) == layout.ids  # (B, L, P)
    found, which = matches.any(dim=-1), matches.int().argmax(dim=-1)  # (B, L)
    spans = torch.where(found, layout.widths[which], 1)
    ends = spans.cumsum(dim=1)
    places = torch.arange(ends.shape[1], device=ends.device).repeat(ends.shape[0], 1)
    source = torch.searchsorted(ends, places, right=True)  # the token that each position of the result shows
    nth = places - (ends - spans).gather(1, source)
    found = found.gather(1, source)
    rows = torch.where(found, layout.offsets[which].gather(1, source) + nth, 0)
    shifted = embedded.gather(1, source.unsqueeze(-1).expand_as(embedded))
    vectors = vectors.to(embedded.dtype)
    if vectors.ndim == 2:
        inserted = vectors[rows]
    else:  # each prompt has its own
        inserted = vectors.gather(1, rows.unsqueeze(-1).expand(-1, -1, vectors.shape[-1]))
    return torch.where(found.unsqueeze(-1), inserted, shifted)


def place_after_insertion(tokens: Tensor, places: Tensor, widths: Mapping[int, int]) -> Tensor:
    """The positions [B] of the tokens at `places` [B] of prompts [B, L], after vectors were inserted.

    `widths` maps the id of each placeholder to its number of vectors. Positions beyond L are not cut.
    """
    before = torch.arange(tokens.shape[1], device=tokens.device) < places.unsqueeze(-1)
    for token, width in widths.items():
        places = places + (width - 1) * ((tokens == token) & before).sum(dim=-1)
    return places
