"""Transferring learned vectors to another model, by a linear map between the token tables of the text encoders.

Two text encoders with the same vocabulary have a vector for every token. Ridge regression fits the map on these
pairs; rows that are held out decide the penalty. The result is a start for further training.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.embeddings.concept import Concept, EmbeddingError, LearnedEmbeddings, encoder_kind
from ldm.embeddings.inspection import nearest_words

# Ridge penalties that are tried, as multiples of the mean variance of the source table.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Every n-th row is held out of the fits that decide the penalty.
HELD_OUT = 10


@dataclass(frozen=True)
class Transfer:
    """A map x -> (x - source_mean) @ weight + target_mean from width d1 to width d2, followed by a scaling.

    Attributes:
        source_mean: [d1]
        target_mean: [d2]
        weight: [d1, d2]
        norm_ratio: mean norm of the target table / that of the source table; a mapped vector is scaled to its
            norm before the map times this ratio.
        penalty: the chosen ridge penalty, one of `PENALTIES`.
        agreement: mean cosine similarity between mapped and true rows among those held out.
        nearest: the same for a simple baseline, the target row of the nearest source token.
        mean: the same for another baseline, the mean of the target table.
    """

    source_mean: Tensor
    target_mean: Tensor
    weight: Tensor
    norm_ratio: float
    penalty: float
    agreement: float
    nearest: float
    mean: float

    def __call__(self, vectors: Tensor) -> Tensor:
        """Map vectors [N, d1] to [N, d2], float32 on the CPU."""
        vectors = vectors.detach().to("cpu", torch.float32)
        mapped = (vectors - self.source_mean) @ self.weight + self.target_mean
        norms = self.norm_ratio * vectors.norm(dim=1, keepdim=True)
        return mapped * norms / mapped.norm(dim=1, keepdim=True).clamp_min(1e-12)


def fit_transfer(source: Tensor, target: Tensor) -> Transfer:
    """Fit the map between two token tables [V, d1] and [V, d2] whose rows are the same tokens.

    Raises:
        EmbeddingError: the tables have different numbers of rows, or too few of them.
    """
    if len(source) != len(target):
        raise EmbeddingError(
            f"the two vocabularies have {len(source)} and {len(target)} tokens; both models must have the "
            "same vocabulary"
        )
    if len(source) < 2 * HELD_OUT:
        raise EmbeddingError(f"a vocabulary of {len(source)} tokens is too small to fit a map")
    source, target = (table.detach().to("cpu", torch.float64) for table in (source, target))
    held = torch.arange(len(source)) % HELD_OUT == 0
    fits = [_ridge(source[~held], target[~held], penalty) for penalty in PENALTIES]
    scores = [_cosine(_apply(fit, source[held]), target[held]) for fit in fits]
    best = max(range(len(PENALTIES)), key=scores.__getitem__)
    source_mean, target_mean, weight = _ridge(source, target, PENALTIES[best])
    return Transfer(
        source_mean.float(),
        target_mean.float(),
        weight.float(),
        norm_ratio=float(target.norm(dim=1).mean() / source.norm(dim=1).mean()),
        penalty=PENALTIES[best],
        agreement=scores[best],
        nearest=_cosine(target[~held][_nearest(source[held], source[~held])], target[held]),
        mean=_cosine(target[~held].mean(dim=0).expand_as(target[held]), target[held]),
    )


def transferred(
    embeddings: LearnedEmbeddings, transfer: Transfer, family: str, source: str, target: str
) -> LearnedEmbeddings:
    """Return the embeddings for another model.

    Args:
        embeddings: for the source model; only vectors in use are transferred.
        transfer: the map from the source model to the target model.
        family: `TextEncoder.family` of the target model.
        source: the name of the source model, for the metadata.
        target: the name of the target model, for the metadata.

    Raises:
        EmbeddingError: the vectors do not have the width of the source model.
    """
    width = transfer.weight.shape[0]
    vectors = embeddings.vectors_for(width)
    kind = encoder_kind(family, transfer.weight.shape[1])
    concepts = tuple(Concept(trigger, transfer(rows), encoder=kind) for trigger, rows in vectors.items())
    metadata = dataclasses.replace(
        embeddings.metadata, base_model=target, base_model_hash=None, steps=None, transferred_from=source
    )
    return LearnedEmbeddings(concepts, metadata)


def _ridge(source: Tensor, target: Tensor, penalty: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return both means and the weight of the regression of centred target rows on centred source rows."""
    source_mean, target_mean = source.mean(dim=0), target.mean(dim=0)
    x, y = source - source_mean, target - target_mean
    gram = x.T @ x
    ridge = penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return source_mean, target_mean, torch.linalg.solve(gram + ridge, x.T @ y)


def _apply(fit: tuple[Tensor, Tensor, Tensor], rows: Tensor) -> Tensor:
    source_mean, target_mean, weight = fit
    return (rows - source_mean) @ weight + target_mean


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=1).mean())


def _nearest(rows: Tensor, table: Tensor, chunk: int = 1024) -> Tensor:
    """Return the index of the nearest row of `table` for each of `rows`, in chunks to limit the memory."""
    return torch.cat([nearest_words(part, table, 1)[1][:, 0] for part in rows.split(chunk)])
