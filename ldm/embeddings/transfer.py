"""Carry a learned word from one model to another by a linear map between their text encoders' token tables.

Text encoders that share a vocabulary have a vector for every token in both tables. The map is fitted on these pairs
by ridge regression, its strength chosen on rows that were left out. The result is a start for further training.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.embeddings.concept import Concept, EmbeddingError, LearnedEmbeddings, encoder_kind

# Ridge penalties that are tried, as multiples of the mean variance of the source table.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Every n-th row is left out of the fit and decides on the penalty.
HELD_OUT = 10


@dataclass(frozen=True)
class Transfer:
    """A map x -> (x - source_mean) @ weight + target_mean from width d1 to width d2, with norms matched.

    `norm_ratio` is the mean norm of the target table over that of the source table; the norm of a mapped vector is
    its norm before times that ratio. `penalty` is the chosen ridge penalty and `agreement` the mean cosine to the
    true rows among those left out; `nearest` and `mean` are the same figure for the two simple ways: the row of the
    nearest source token, and the mean of the target table.
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
        wanted = self.norm_ratio * vectors.norm(dim=1, keepdim=True)
        return mapped * wanted / mapped.norm(dim=1, keepdim=True).clamp_min(1e-12)


def fit_transfer(source: Tensor, target: Tensor) -> Transfer:
    """Fit the map between two token tables [V, d1] and [V, d2] whose rows are the same tokens.

    Raises:
        EmbeddingError: the tables have different numbers of rows, or too few of them.
    """
    if len(source) != len(target):
        raise EmbeddingError(
            f"the two vocabularies have {len(source)} and {len(target)} tokens; a word can only be carried between "
            "models with the same vocabulary"
        )
    if len(source) < 2 * HELD_OUT:
        raise EmbeddingError(f"a vocabulary of {len(source)} tokens is too small to fit a map on")
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
    """The words of a file, carried to another model; `source` and `target` name the two models in the metadata.

    Raises:
        EmbeddingError: the vectors do not have the width of the model that the map begins at.
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
    """Means and weight of the regression of centred target rows on centred source rows."""
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
    """For each row the index of the table's row with the largest cosine."""
    table = torch.nn.functional.normalize(table, dim=1)
    parts = [
        (torch.nn.functional.normalize(part, dim=1) @ table.T).argmax(dim=1) for part in rows.split(chunk)
    ]
    return torch.cat(parts)
