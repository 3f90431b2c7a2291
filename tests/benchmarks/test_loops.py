"""The loops that are timed against each other compute the same: losses, gradients, and what they move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from benchmarks.loops import OriginalLoop, batches, plain_attention, twin
from benchmarks.step_time import as_diffusers
from ldm.modules.attention import attend
from ldm.training.callbacks.latent_cache import LatentCache


def ours(model: Any, dataset: Any, cpu: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of our step on the first two images, from the cache as in a run."""
    cached = LatentCache().cached(model, dataset, cpu)
    batch = default_collate([cached[i] for i in range(2)])
    assert "image" not in batch
    torch.manual_seed(5)
    loss, _ = model.train().shared_step(batch)
    loss.backward()
    (vectors,) = model.embedding_manager.embedding_parameters()
    return loss.detach(), vectors.grad[0].clone()


def test_the_original_arithmetic_is_the_same_loss_and_gradient(tiny_model, images, cpu):
    loop = OriginalLoop(tiny_model, batches(images, 2, cpu), cpu, 1e-3)
    expected, gradient = ours(tiny_model, images, cpu)
    torch.manual_seed(5)
    loss = loop.loss(next(loop.batches))
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-6)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(
        loop.vectors[0].grad[0], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())
    )


def test_the_diffusers_loop_is_the_same_loss_and_gradient(tiny_model, tiny_config, images, cpu, monkeypatch):
    pytest.importorskip("diffusers")
    # torch draws other numbers for a tensor that is a part of another; diffusers asks by the shape.
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.randn(x.shape))
    loop = as_diffusers(tiny_model, tiny_config, batches(images, 2, cpu), cpu, "float32")
    expected, gradient = ours(tiny_model, images, cpu)
    torch.manual_seed(5)
    loss = loop.loss(next(loop.batches))
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        loop.table.grad[-1], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_diffusers_loop_moves_the_new_word_alone(tiny_model, tiny_config, images, cpu, precision):
    pytest.importorskip("diffusers")
    loop = as_diffusers(tiny_model, tiny_config, batches(images, 2, cpu), cpu, precision)
    before = loop.table.detach().clone()
    loop()
    assert torch.equal(loop.table[:-1], before[:-1])
    assert not torch.equal(loop.table[-1], before[-1])
    assert next(loop.denoiser.parameters()).dtype is getattr(torch, precision)


def test_the_original_loop_trains_its_own_vectors(tiny_model, images, cpu, monkeypatch):
    loop = OriginalLoop(tiny_model, batches(images, 2, cpu), cpu, 1e-3)
    (mine,) = tiny_model.embedding_manager.embedding_parameters()
    before = mine.detach().clone()

    def fused(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("the original knew no fused attention")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    # As on an accelerator, where ours would take the fused kernel for everything.
    monkeypatch.setattr("ldm.modules.attention.SHORT", 0)
    encoded = []
    encode = loop.model.encode_first_stage
    monkeypatch.setattr(loop.model, "encode_first_stage", lambda x: encoded.append(len(x)) or encode(x))
    loop()
    loop()
    assert encoded == [2, 2]
    assert torch.equal(mine, before) and mine.grad is None
    assert not torch.equal(loop.vectors[0], before)


def test_plain_attention_is_attention():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 7, 4, generator=generator)
    k, v = torch.randn(2, 2, 3, 5, 4, generator=generator)
    torch.testing.assert_close(plain_attention(q, k, v), attend(q, k, v))


def test_a_twin_shares_what_is_frozen_until_it_is_cast(tiny_model):
    other = twin(tiny_model)
    mine, theirs = dict(tiny_model.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in mine.items():
        shared = parameter.data_ptr() == theirs[name].data_ptr()
        assert shared is not parameter.requires_grad
        assert parameter.requires_grad is theirs[name].requires_grad
    other.bfloat16()
    assert {parameter.dtype for parameter in tiny_model.parameters()} == {torch.float32}


def test_batches_repeat_without_end(images, cpu):
    supply = batches(images, 2, cpu, distinct=3)
    taken = [next(supply) for _ in range(4)]
    assert taken[0]["image"].shape == (2, 32, 32, 3)
    assert taken[3] is taken[0] and taken[1] is not taken[0]
