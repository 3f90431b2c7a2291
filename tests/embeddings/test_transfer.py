from __future__ import annotations

import pytest
import torch

from ldm.embeddings import Concept, EmbeddingError, LearnedEmbeddings, Metadata, read, write
from ldm.embeddings.transfer import fit_models, fit_transfer, transferred
from tests.embeddings.samples import vectors


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


def test_rows_that_were_added_after_the_vocabulary_are_left_out():
    source, target = tables(noise=0.0)
    longer = torch.cat([target, torch.full((8, 24), 9.0)])
    torch.testing.assert_close(fit_transfer(source, longer).weight, fit_transfer(source, target).weight)
    with pytest.raises(EmbeddingError, match="have 400 and 409 tokens"):
        fit_transfer(source, torch.cat([target, target[:9]]))


def test_equal_tables_change_nothing():
    source, _ = tables(noise=0.0)
    transfer = fit_transfer(source, source.clone())
    assert transfer.agreement == 1.0 and torch.equal(transfer(source[:3] * 7), source[:3] * 7)


def word(encoder: str = "clip_l", part: str = "", width: int = 768) -> LearnedEmbeddings:
    concept = Concept("<cat>", vectors(2, width), encoder, part, token=1234)
    return LearnedEmbeddings((concept,), Metadata(base_model="a", steps=100, initializer="cat"))


WIDTHS = {"clip_l": 768, "clip_h": 1024, "clip_g": 1280, "bert": 1280}


def related(*kinds: str, rows: int = 200) -> dict[str, torch.Tensor]:
    """Return token tables of some encoders, which are different linear maps of the same numbers."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, 12, generator=generator)
    maps = {
        kind: torch.randn(12, width, generator=torch.Generator().manual_seed(seed))
        for seed, (kind, width) in enumerate(WIDTHS.items())
    }
    return {kind: hidden @ maps[kind] for kind in kinds}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (["clip_l"], ["clip_h"]),
        (["clip_l"], ["clip_l", "clip_g"]),
        (["clip_h"], ["clip_l", "clip_g"]),
        (["clip_l", "clip_g"], ["clip_l"]),
        (["bert"], ["bert"]),
    ],
)
def test_a_word_moves_between_all_families(source, target, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.embeddings.transfer.PENALTIES", (1e-3,))
    tables = related(*source)
    concepts = tuple(Concept("<cat>", tables[kind][7:9], kind, token=1234) for kind in source)
    learned = LearnedEmbeddings(concepts, Metadata(base_model="a", steps=100, initializer="cat"))
    found = transferred(learned, fit_models(tables, related(*target)), "a.ckpt", "b.ckpt")
    assert [concept.encoder for concept in found.concepts] == target
    for concept in found.concepts:
        near = torch.cosine_similarity(concept.vectors, related(*target)[concept.encoder][7:9])
        assert near.min() > 0.99 and concept.token == 1234
    assert found.metadata == Metadata(base_model="b.ckpt", initializer="cat", transferred_from="a.ckpt")
    for format in ("safetensors", "original"):
        back = read(write(found, tmp_path / format, format))
        assert back.metadata == found.metadata and back.triggers == ["<cat>"]
        assert [concept.encoder for concept in back.concepts] == target


def test_negative_vectors_stay_negative():
    found = transferred(word(part="negative"), fit_models(related("clip_l"), related("clip_h")), "a", "b")
    assert found.concepts[0].part == "negative"


def test_vectors_of_the_output_are_left_out_with_a_warning(caplog):
    both = LearnedEmbeddings((*word().concepts, *word(part="output").concepts))
    found = transferred(both, fit_models(related("clip_l"), related("clip_h")), "a", "b")
    assert [concept.part for concept in found.concepts] == [""]
    assert "'<cat>': what is added to the encoder's output is left out" in caplog.text


def test_impossible_transfers_are_refused(monkeypatch):
    source, target = tables(noise=0.1)
    with pytest.raises(EmbeddingError, match="vocabulary of 15 tokens is too small"):
        fit_transfer(source[:15], target[:15])
    for one, other in (("clip_l", "bert"), ("bert", "clip_g")):
        with pytest.raises(EmbeddingError, match="BERT's vocabulary differs from CLIP's.*train it anew"):
            fit_models(related(one), related(other))
    monkeypatch.setattr("ldm.embeddings.transfer.PENALTIES", (1e-3,))
    to_sd2 = fit_models(related("clip_l"), related("clip_h"))
    with pytest.raises(
        EmbeddingError, match="'<cat>' is for Stable Diffusion 2.x.*of width 768.*with the source"
    ):
        transferred(word("clip_h", width=1024), to_sd2, "a", "b")
    second = fit_models(related("clip_g"), related("clip_h"))
    with pytest.raises(EmbeddingError, match="'<cat>' is for latent diffusion.*clip_g"):
        transferred(word("bert", width=1280), second, "a", "b")
