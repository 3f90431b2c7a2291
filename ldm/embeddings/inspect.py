"""What vectors look like beside a vocabulary: their norms, and the words nearest to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ldm.embeddings.concept import Concept, LearnedEmbeddings

_CHUNK = 8192


@dataclass(frozen=True)
class VocabularyNorms:
    """The spread of the norms of a vocabulary's vectors: the 5th, 50th and 95th percentile."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class ConceptReport:
    """What can be said of one concept; the last two fields are None without a table of the same width.

    `norms` has one number for each vector, `nearest` one list of (word, cosine similarity), best first.
    """

    trigger: str
    part: str
    encoder: str | None
    models: str
    vectors: int
    width: int
    norms: tuple[float, ...]
    vocabulary_norms: VocabularyNorms | None = None
    nearest: tuple[tuple[tuple[str, float], ...], ...] | None = None


def describe(
    embeddings: LearnedEmbeddings,
    table: Tensor | None = None,
    words: Sequence[str] | None = None,
    count: int = 5,
) -> list[ConceptReport]:
    """A report on every concept.

    `table` [V, d] is a vocabulary's vectors, `words` its V words (token ids are shown without them), `count`
    how many of the nearest words to name.
    """
    return [_report(concept, table, words, count) for concept in embeddings.concepts]


def nearest_words(vectors: Tensor, table: Tensor, count: int = 5) -> tuple[Tensor, Tensor]:
    """The `count` rows of `table` [V, d] nearest to each of `vectors` [N, d].

    Returns cosine similarities and row numbers, both [N, count], best first.
    """
    wanted = normalize(vectors.float(), dim=1)
    # In chunks, so that a table in half precision is never whole in memory a second time.
    similar = torch.cat([wanted @ normalize(rows.float(), dim=1).T for rows in table.split(_CHUNK)], dim=1)
    return similar.topk(min(count, table.shape[0]), dim=1)


def _report(concept: Concept, table: Tensor | None, words: Sequence[str] | None, count: int) -> ConceptReport:
    spread, near = None, None
    if table is not None and table.shape[1] == concept.width:
        quantiles = torch.tensor([0.05, 0.5, 0.95])
        spread = VocabularyNorms(*table.float().norm(dim=1).quantile(quantiles).tolist())
        similar, rows = nearest_words(concept.vectors, table, count)
        near = tuple(
            tuple((_word(words, row), value) for row, value in zip(numbers, values, strict=True))
            for numbers, values in zip(rows.tolist(), similar.tolist(), strict=True)
        )
    return ConceptReport(
        trigger=concept.trigger,
        part=concept.part,
        encoder=concept.encoder,
        models=concept.models,
        vectors=len(concept.vectors),
        width=concept.width,
        norms=tuple(concept.vectors.norm(dim=1).tolist()),
        vocabulary_norms=spread,
        nearest=near,
    )


def _word(words: Sequence[str] | None, row: int) -> str:
    return words[row] if words is not None and row < len(words) and words[row] else f"#{row}"
