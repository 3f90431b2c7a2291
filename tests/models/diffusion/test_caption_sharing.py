"""Equal captions of a batch go through the text encoder once."""

from __future__ import annotations

import pytest
import torch

from tests.golden_record import Golden

CAPTIONS = ["a photo of *", "a rendering of *", "a photo of *", "a photo of *"]


@pytest.fixture(params=["clip_one_vector", "bert_one_vector"])
def model(request):
    return Golden(request.param).model()


def test_each_different_caption_is_encoded_once(model, monkeypatch) -> None:
    encode, seen = model.cond_stage_model.encode, []
    monkeypatch.setattr(
        model.cond_stage_model, "encode", lambda text, **rest: seen.append(text) or encode(text, **rest)
    )
    shared = model.get_learned_conditioning(CAPTIONS)
    assert seen == [CAPTIONS[:2]]
    assert torch.equal(shared[0], shared[2]) and torch.equal(shared[0], shared[3])
    alone = torch.cat([model.get_learned_conditioning([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_captions_encoded_apart(model) -> None:
    (vectors,) = model.embedding_manager.embedding_parameters()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(model.get_learned_conditioning(CAPTIONS).shape, generator=generator)

    def gradient(encoded: torch.Tensor) -> torch.Tensor:
        vectors.grad = None
        (encoded * weights).sum().backward()
        return vectors.grad

    shared = gradient(model.get_learned_conditioning(CAPTIONS))
    encoder, manager = model.cond_stage_model, model.embedding_manager
    apart = gradient(torch.cat([encoder.encode([text], embedding_manager=manager) for text in CAPTIONS]))
    assert shared.abs().max() > 0
    torch.testing.assert_close(shared, apart, rtol=1e-3, atol=1e-4 * float(apart.abs().max()))


def test_one_prompt_and_different_ones(model) -> None:
    assert model.get_learned_conditioning("a photo of *").shape[0] == 1
    assert model.get_learned_conditioning(CAPTIONS[:2]).shape[0] == 2
