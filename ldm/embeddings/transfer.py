"""Transferring learned vectors to another model, by a linear map between the token tables of the text encoders.

Two text encoders with the same vocabulary have a vector for every token. Ridge regression fits the map on these
pairs; rows that are held out decide the penalty. The result is a start for further training.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.embeddings.concept import EmbeddingError, LearnedEmbeddings
from ldm.embeddings.inspection import nearest_words
from ldm.front_ends import setting
from ldm.util import shown

logger = logging.getLogger(__name__)

# Ridge penalties that are tried, as multiples of the mean variance of the source table.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Every n-th row is held out of the fits that decide the penalty, and as many again to measure the result.
HELD_OUT = 10
# Models to which a few tokens were added share the other rows.
_MOST_ADDED = 0.02
_MOST_QUERIES = 1000
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Transfer:
    """A map x -> (x - source_mean) @ weight + target_mean from width d1 to width d2, followed by a scaling.

    Attributes:
        source_mean: [d1]
        target_mean: [d2]
        weight: [d1, d2]
        norm_ratio: mean norm of the target table / that of the source table; a mapped vector is scaled to its
            norm before the map times this ratio.
        penalty: the chosen ridge penalty, one of `PENALTIES`; 0 for equal tables, whose map changes nothing.
        agreement: mean cosine similarity between mapped and true rows, of rows that neither the fit nor the choice
            of the penalty used.
        nearest: the same for a simple baseline, the target row of the nearest other source token.
        mean: the same for another baseline, the mean of the target table.
        held_out: how many rows these three were measured on.
    """

    source_mean: Tensor
    target_mean: Tensor
    weight: Tensor
    norm_ratio: float
    penalty: float
    agreement: float
    nearest: float
    mean: float
    held_out: int

    def __call__(self, vectors: Tensor) -> Tensor:
        """Map vectors [N, d1] to [N, d2], float32 on the CPU."""
        vectors = vectors.detach().to("cpu", torch.float32)
        if self.penalty == 0:
            return vectors.clone()
        mapped = (vectors - self.source_mean) @ self.weight + self.target_mean
        norms = self.norm_ratio * vectors.norm(dim=1, keepdim=True)
        return mapped * norms / mapped.norm(dim=1, keepdim=True).clamp_min(1e-12)


def fit_transfer(source: Tensor, target: Tensor) -> Transfer:
    """Fit the map between two token tables [V, d1] and [V, d2] whose rows are the same tokens.

    One may have up to 2 % more rows, of tokens that were added after the shared ones.

    Raises:
        EmbeddingError: the tables have different numbers of rows, or too few of them.
    """
    rows = min(len(source), len(target))
    if max(len(source), len(target)) - rows > _MOST_ADDED * rows:
        raise EmbeddingError(
            f"the two vocabularies have {len(source)} and {len(target)} tokens; both models must have the same "
            "vocabulary, as Stable Diffusion 1, 2 and XL do"
        )
    if rows < 2 * HELD_OUT:
        raise EmbeddingError(f"a vocabulary of {rows} tokens is too small to fit a map")
    source, target = (table[:rows].detach().to("cpu", torch.float32) for table in (source, target))
    place = torch.arange(rows) % HELD_OUT
    choosing, measuring = place == 0, place == HELD_OUT // 2
    fitted = ~(choosing | measuring)
    if torch.equal(source, target):
        best, fit = 0.0, (source.mean(dim=0), target.mean(dim=0), torch.eye(source.shape[1]))
        agreement = 1.0
    else:
        attempts = _ridge(source[fitted], target[fitted], PENALTIES)
        scores = [_cosine(_apply(attempt, source[choosing]), target[choosing]) for attempt in attempts]
        chosen = max(range(len(PENALTIES)), key=scores.__getitem__)
        best, agreement = (
            PENALTIES[chosen],
            _cosine(_apply(attempts[chosen], source[measuring]), target[measuring]),
        )
        (fit,) = _ridge(source, target, (best,))
    asked = measuring.nonzero()[:_MOST_QUERIES, 0]
    return Transfer(
        *fit,
        norm_ratio=float(target.norm(dim=1).mean() / source.norm(dim=1).mean()),
        penalty=best,
        agreement=agreement,
        nearest=_cosine(target[fitted][_nearest(source[asked], source[fitted])], target[asked]),
        mean=_cosine(target[fitted].mean(dim=0).expand_as(target[measuring]), target[measuring]),
        held_out=int(measuring.sum()),
    )


def transferred(
    embeddings: LearnedEmbeddings,
    transfers: Mapping[tuple[str, str], Transfer],
    source: str,
    target: str,
) -> LearnedEmbeddings:
    """Return the embeddings for another model.

    Args:
        embeddings: for the source model; only vectors in use are transferred, and with a warning only those that
            come before the encoder's layers: the map knows no others.
        transfers: for each encoder kind of the target model one map, by (kind of the source, kind of the target).
        source: the name of the source model, for the metadata.
        target: the name of the target model, for the metadata.

    Raises:
        EmbeddingError: a trigger has no vectors of a source encoder, or none of its width.
    """
    concepts = []
    for trigger in embeddings.triggers:
        parts = embeddings.only(trigger).concepts
        own = [concept for concept in parts if concept.part in ("", "negative")]
        if len(own) < len(parts):
            logger.warning(
                "'%s': what is added to the encoder's output is left out, the map is for vectors before the encoder; "
                "the word will do less",
                shown(trigger),
            )
        for (kind, other), transfer in transfers.items():
            width = len(transfer.weight)
            usable = [c for c in own if c.width == width and c.encoder in (kind, None)]
            if not usable:
                made_for = embeddings.only(trigger).concepts[0].models
                raise EmbeddingError(
                    f"'{shown(trigger)}' is for {made_for}; the text encoder of '{shown(source)}' is {kind}, of width "
                    f"{width}: name the model that the word was trained on with {setting('source')}"
                )
            concept = usable[0]
            # The token id stays: both models have the same vocabulary.
            concepts.append(
                dataclasses.replace(concept, vectors=transfer(concept.vectors), encoder=other, unused=None)
            )
    metadata = dataclasses.replace(
        embeddings.metadata, base_model=target, base_model_hash=None, steps=None, transferred_from=source
    )
    return LearnedEmbeddings(tuple(concepts), metadata)


def fit_models(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[tuple[str, str], Transfer]:
    """Return a map for each text encoder of the target model, from the source's encoder of its kind or its first.

    `source` and `target` are what `ldm.embeddings.inspection.token_tables` returns. Raises EmbeddingError if the
    vocabularies differ.
    """
    chosen = {other: other if other in source else next(iter(source)) for other in target}
    families = {("bert" if kind == "bert" else "clip") for pair in chosen.items() for kind in pair}
    if len(families) > 1:
        raise EmbeddingError(
            "BERT's vocabulary differs from CLIP's: a word can be carried over between models of Stable Diffusion "
            "1, 2 and XL, or between two of LDM text2img; train it anew"
        )
    return {(kind, other): fit_transfer(source[kind], target[other]) for other, kind in chosen.items()}


_Fit = tuple[Tensor, Tensor, Tensor]


def _ridge(source: Tensor, target: Tensor, penalties: tuple[float, ...]) -> list[_Fit]:
    """Return, for each penalty, both means and the weight of centred target rows on centred source rows."""
    double = torch.float64
    source_mean, target_mean = source.mean(dim=0, dtype=double), target.mean(dim=0, dtype=double)
    gram = torch.zeros(source.shape[1], source.shape[1], dtype=double)
    cross = torch.zeros(source.shape[1], target.shape[1], dtype=double)
    for rows, others in zip(source.split(_ROWS_AT_ONCE), target.split(_ROWS_AT_ONCE), strict=True):
        x, y = rows - source_mean, others - target_mean
        gram += x.T @ x
        cross += x.T @ y
    fits = []
    for penalty in penalties:
        ridge = penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=double)
        weight = torch.linalg.solve(gram + ridge, cross)
        fits.append((source_mean.float(), target_mean.float(), weight.float()))
    return fits


def _apply(fit: _Fit, rows: Tensor) -> Tensor:
    source_mean, target_mean, weight = fit
    return (rows - source_mean) @ weight + target_mean


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=1).mean())


def _nearest(rows: Tensor, table: Tensor, chunk: int = 1024) -> Tensor:
    """Return the index of the nearest row of `table` for each of `rows`, in chunks to limit the memory."""
    return torch.cat([nearest_words(part, table, 1)[1][:, 0] for part in rows.split(chunk)])
