"""A learned word carried to another model."""

from __future__ import annotations

import pytest
import torch

from ldm.embeddings import Concept, EmbeddingError, LearnedEmbeddings, Metadata
from ldm.embeddings.transfer import fit_transfer, transferred


def tables(
    noise: float, rows: int = 400, width: int = 16, other: int = 24
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token table, and one that is a rotation of it into more dimensions, scaled, shifted and noisy."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(rows, width, generator=generator) + 0.5
    rotation = torch.linalg.qr(torch.randn(other, width, generator=generator))[0].T
    target = 3 * source @ rotation + 0.2
    return source, target + noise * torch.randn(rows, other, generator=generator)


def test_a_rotation_is_found_and_carries_vectors_over_with_their_norm():
    source, target = tables(noise=0.0)
    transfer = fit_transfer(source, target)
    assert transfer.agreement > 0.9999
    carried, true = transfer(source[:5]), target[:5]
    torch.testing.assert_close(
        carried / carried.norm(dim=1, keepdim=True),
        true / true.norm(dim=1, keepdim=True),
        rtol=1e-2,
        atol=1e-3,
    )
    ratio = target.norm(dim=1).mean() / source.norm(dim=1).mean()
    torch.testing.assert_close(carried.norm(dim=1), ratio * source[:5].norm(dim=1))


def test_it_is_better_on_rows_left_out_than_the_nearest_token_and_the_mean():
    transfer = fit_transfer(*tables(noise=1.0))
    assert transfer.agreement > transfer.nearest + 0.1 and transfer.agreement > transfer.mean + 0.1


def test_more_noise_is_met_with_a_larger_penalty():
    clean, noisy = fit_transfer(*tables(noise=0.01)), fit_transfer(*tables(noise=30.0, rows=60))
    assert noisy.penalty > clean.penalty


def test_a_file_says_where_it_comes_from():
    source, target = tables(noise=0.1)
    learned = LearnedEmbeddings(
        (Concept("<cat>", source[:2], encoder="clip"),),
        Metadata(base_model="a", steps=100, initializer="cat"),
    )
    carried = transferred(learned, fit_transfer(source, target), "clip", "a.ckpt", "b.ckpt")
    assert carried.triggers == ["<cat>"] and carried.concepts[0].vectors.shape == (2, 24)
    assert carried.metadata.base_model == "b.ckpt" and carried.metadata.transferred_from == "a.ckpt"
    assert carried.metadata.initializer == "cat" and carried.metadata.steps is None


def test_what_cannot_be_carried_is_refused():
    source, target = tables(noise=0.1)
    with pytest.raises(EmbeddingError, match="have 400 and 399 tokens"):
        fit_transfer(source, target[1:])
    with pytest.raises(EmbeddingError, match="vocabulary of 15 tokens is too small"):
        fit_transfer(source[:15], target[:15])
    wide = LearnedEmbeddings((Concept("*", torch.ones(1, 768)),))
    with pytest.raises(EmbeddingError, match="text encoder takes width 16"):
        transferred(wide, fit_transfer(source, target), "clip", "a", "b")
