"""Prompts to token ids, with placeholders found wherever they stand."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ldm.util import UserError


@dataclass(frozen=True)
class CutOff:
    """A placeholder that the token limit cuts off: `kept` of its `vectors` remain. Occurrences count from 1."""

    placeholder: str
    occurrence: int
    kept: int
    vectors: int


class PromptTokenizer:
    """A Hugging Face tokenizer that reads a placeholder as one id, whatever stands beside it.

    A tokenizer alone joins a placeholder to its neighbours (CLIP reads "*," as one token), so the prompt is
    split at the placeholders first and the pieces are tokenised one by one. A placeholder that begins or ends
    in a letter, digit or underscore needs a neighbour of another kind on that side; all others match anywhere.
    The longest placeholder wins.
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
        self.ignores_case = self.token_ids("Ab") == self.token_ids("ab")

    def token_ids(self, text: str) -> list[int]:
        """Tokenise text as it is: no placeholders, no start, end or padding, no limit."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def placeholder_id(self, string: str, index: int) -> int:
        """The tokenizer's own id of a placeholder that is exactly one token, else the id `vocab_size + index`.

        The latter has no row in the embedding table; `embed_tokens` looks up another row in its place.
        """
        own = self._own_id(string)
        return self.vocab_size + index if own is None else own

    def is_word(self, string: str) -> bool:
        """Whether a placeholder is one token made of letters, so that it may mean something already."""
        return string.isalpha() and self._own_id(string) is not None

    def folded(self, string: str) -> str:
        """What the text is matched as: two placeholders with equal results are the same one."""
        words = " ".join(unicodedata.normalize("NFC", string).split())
        return words.lower() if self.ignores_case else words

    def encode(self, texts: str | Sequence[str], placeholders: Mapping[str, int] | None = None) -> Tensor:
        """Token ids [B, max_length] on the CPU: start, tokens, end, padding; what is too long is cut."""
        texts = [texts] if isinstance(texts, str) else texts
        return torch.tensor([self._row(text, placeholders or {}) for text in texts], dtype=torch.long)

    def truncated(
        self, text: str, placeholders: Mapping[str, int], widths: Mapping[str, int]
    ) -> list[CutOff]:
        """Which occurrences of placeholders do not fit, wholly or in part.

        `widths` says how many vectors stand for each placeholder (1 where it has no entry). Tokens are cut at
        the limit before the vectors are inserted, and once more after.
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

    def found(self, texts: Iterable[str], placeholders: Iterable[str]) -> set[str]:
        """Those of the placeholders that one of the texts holds."""
        longest_first = sorted(placeholders, key=len, reverse=True)
        if not longest_first:
            return set()
        pattern = _pattern(tuple(longest_first), self.ignores_case)
        return {
            longest_first[match.lastindex - 1]
            for text in texts
            for match in pattern.finditer(unicodedata.normalize("NFC", text))
        }

    def _own_id(self, string: str) -> int | None:
        ids = self.token_ids(string)
        if len(ids) != 1 or ids[0] in self.tokenizer.all_special_ids:
            return None  # an unknown word is the special token [UNK], which other words share
        spelled = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
        return ids[0] if self.folded(spelled) == self.folded(string) else None

    def _row(self, text: str, placeholders: Mapping[str, int]) -> list[int]:
        content = [token for token, _ in self._content(text, placeholders)][: self.max_length - 2]
        row = [self.start_id, *content, self.end_id]
        return row + [self.pad_id] * (self.max_length - len(row))

    def _content(self, text: str, placeholders: Mapping[str, int]) -> list[tuple[int, str | None]]:
        """The ids of a prompt, each with the placeholder it stands for (None for ordinary tokens)."""
        if not placeholders:
            return [(token, None) for token in self.token_ids(text)]
        longest_first = sorted(placeholders, key=len, reverse=True)
        pattern = _pattern(tuple(longest_first), self.ignores_case)
        text = unicodedata.normalize("NFC", text)
        matches = list(pattern.finditer(text))
        pieces = [
            text[start:end]
            for start, end in zip(
                [0, *(m.end() for m in matches)], [*(m.start() for m in matches), len(text)], strict=True
            )
        ]
        content: list[tuple[int, str | None]] = []
        for piece, match in zip_longest(pieces, matches):
            content += [(token, None) for token in self.token_ids(piece)] if piece.strip() else []
            if match is not None:
                placeholder = longest_first[match.lastindex - 1]  # each alternative is one group
                content.append((placeholders[placeholder], placeholder))
        return content


def embed_tokens(
    table: nn.Embedding, ids: Tensor, embedding_manager: Callable[[Tensor, Tensor], Tensor] | None
) -> Tensor:
    """Look up token ids [B, L] as [B, L, d] and let the embedding manager replace placeholders.

    Ids beyond the table (see `PromptTokenizer.placeholder_id`) are looked up as row 0; the manager sees them
    unchanged.
    """
    embedded = table(ids.masked_fill(ids >= table.num_embeddings, 0))
    return embedded if embedding_manager is None else embedding_manager(ids, embedded)


@lru_cache(maxsize=64)
def _pattern(placeholders: tuple[str, ...], ignores_case: bool) -> re.Pattern[str]:
    return re.compile("|".join(map(_alternative, placeholders)), re.IGNORECASE if ignores_case else 0)


def _alternative(placeholder: str) -> str:
    words = [re.escape(word) for word in unicodedata.normalize("NFC", placeholder).split()]
    before = r"(?<!\w)" if re.match(r"\w", placeholder) else ""
    after = r"(?!\w)" if re.search(r"\w$", placeholder) else ""
    spaced = r"\s+".join(words)
    return f"({before}{spaced}{after})"


_DOT, _TAKEN = "\ue02e", "\ue000"  # private characters, which no prompt holds
_TAKEN_NAMES = frozenset(dir(nn.ParameterDict())) | frozenset(dir(nn.Module()))


def parameter_key(placeholder: str) -> str:
    """The name of a placeholder in a state dict: its own, but for dots and names such as "train"."""
    key = placeholder.replace(".", _DOT)
    return _TAKEN + key if key in _TAKEN_NAMES else key


def as_list(value: Any) -> list[Any]:
    """A list from a YAML's list, a single string or nothing."""
    return [value] if isinstance(value, str) else list(value or ())


def check_placeholders(strings: Sequence[str], tokenizer: PromptTokenizer) -> None:
    """Raise UserError for a placeholder that is no text, is blank, or reads as another one does."""
    seen: dict[str, str] = {}
    for string in strings:
        if not isinstance(string, str):
            raise UserError(f"placeholder {string!r} is not a text; put it in quotes")
        if not string.strip():
            raise UserError(f"placeholder '{string}' is empty; choose a word such as '*'")
        if string != string.strip():
            raise UserError(f"placeholder '{string}' begins or ends in a space; write it without")
        folded = tokenizer.folded(string)
        if folded in seen:
            raise UserError(
                f"placeholder '{string}' is there twice, first as '{seen[folded]}'; choose another word"
            )
        seen[folded] = string


def vector_counts(
    configured: Sequence[str],
    every: Sequence[str],
    wanted: int | Sequence[int] | Mapping[str, int],
    limit: int,
) -> dict[str, int]:
    """The number of vectors of each placeholder of `every`, which begins with the `configured` ones.

    A list counts the configured ones in order, a mapping names them; those not counted have one vector.
    """
    if isinstance(wanted, Mapping):
        strangers = [string for string in wanted if string not in every]
        if strangers:
            raise UserError(f"num_vectors_per_token names '{strangers[0]}', which is no placeholder")
        counts = {string: wanted.get(string, 1) for string in every}
    elif isinstance(wanted, Sequence) and not isinstance(wanted, str):
        if len(wanted) != len(configured):
            raise UserError(
                f"num_vectors_per_token has {len(wanted)} entries for {len(configured)} placeholder_strings; "
                f"give one for each"
            )
        counts = dict.fromkeys(every, 1) | dict(zip(configured, wanted, strict=True))
    else:
        counts = dict.fromkeys(every, wanted)
    for string, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= limit:
            raise UserError(f"num_vectors_per_token of '{string}' is {count}; use a number from 1 to {limit}")
    return counts
