from __future__ import annotations

import pytest
import torch

from ldm.embeddings import Concept, EmbeddingError, LearnedEmbeddings, Metadata
from ldm.embeddings.transfer import fit_transfer, transferred


def tables(
    noise: float, rows: int = 400, width: int = 16, other: int = 24
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a token table, and its rotation into more dimensions, scaled, shifted and with noise."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(rows, width, generator=generator) + 0.5
    rotation = torch.linalg.qr(torch.randn(other, width, generator=generator))[0].T
    target = 3 * source @ rotation + 0.2
    return source, target + noise * torch.randn(rows, other, generator=generator)


def test_a_rotation_is_recovered_and_norms_are_scaled():
    source, target = tables(noise=0.0)
    transfer = fit_transfer(source, target)
    assert transfer.agreement > 0.9999
    mapped, true = transfer(source[:5]), target[:5]
    torch.testing.assert_close(
        mapped / mapped.norm(dim=1, keepdim=True),
        true / true.norm(dim=1, keepdim=True),
        rtol=1e-2,
        atol=1e-3,
    )
    ratio = target.norm(dim=1).mean() / source.norm(dim=1).mean()
    torch.testing.assert_close(mapped.norm(dim=1), ratio * source[:5].norm(dim=1))


def test_the_map_is_better_on_held_out_rows_than_the_nearest_token_and_the_mean():
    transfer = fit_transfer(*tables(noise=1.0))
    assert transfer.agreement > transfer.nearest + 0.1 and transfer.agreement > transfer.mean + 0.1


def test_more_noise_leads_to_a_larger_penalty():
    clean, noisy = fit_transfer(*tables(noise=0.01)), fit_transfer(*tables(noise=30.0, rows=60))
    assert noisy.penalty > clean.penalty


def test_the_metadata_names_both_models():
    source, target = tables(noise=0.1)
    learned = LearnedEmbeddings(
        (Concept("<cat>", source[:2], encoder="clip"),),
        Metadata(base_model="a", steps=100, initializer="cat"),
    )
    found = transferred(learned, fit_transfer(source, target), "clip", "a.ckpt", "b.ckpt")
    assert found.triggers == ["<cat>"] and found.concepts[0].vectors.shape == (2, 24)
    assert found.metadata.base_model == "b.ckpt" and found.metadata.transferred_from == "a.ckpt"
    assert found.metadata.initializer == "cat" and found.metadata.steps is None


def test_impossible_transfers_are_refused():
    source, target = tables(noise=0.1)
    with pytest.raises(EmbeddingError, match="have 400 and 399 tokens"):
        fit_transfer(source, target[1:])
    with pytest.raises(EmbeddingError, match="vocabulary of 15 tokens is too small"):
        fit_transfer(source[:15], target[:15])
    wide = LearnedEmbeddings((Concept("*", torch.ones(1, 768)),))
    with pytest.raises(EmbeddingError, match="text encoder has width 16"):
        transferred(wide, fit_transfer(source, target), "clip", "a", "b")
