"""Both towers of Stable Diffusion XL against numbers recorded from the originals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.modules.encoders.sdxl import FrozenSDXLEmbedder
from ldm.modules.personalization import TextEncoder
from ldm.util import skip_pretrained
from tests.golden_record import GOLDEN, Golden, fill
from tests.modules.conftest import manager_of

RECORD = Golden("sdxl_tiny")


def build() -> FrozenSDXLEmbedder:
    sizes = {name: RECORD.meta["open_clip_text_cfg"][name] for name in ("width", "heads", "layers")}
    with skip_pretrained():
        encoder: Any = fill(FrozenSDXLEmbedder(version=str(GOLDEN / "clip_tiny"), arch=sizes), "conditioner.")
    return encoder


@pytest.fixture(scope="module")
def encoder() -> FrozenSDXLEmbedder:
    return build()


def close(result: Tensor, expected: Tensor) -> None:
    assert result.shape == expected.shape
    assert (result - expected).abs().max() <= 2e-4 * expected.abs().max()


@torch.no_grad()
def test_context_and_pooled_vector_are_those_of_the_originals(encoder) -> None:
    condition = encoder.encode(RECORD.meta["prompts"])
    (context,), (pooled,) = condition["c_crossattn"], condition["c_adm"]
    close(context, RECORD.io["context"])
    close(context[..., :32], RECORD.io["hidden_l"])
    close(context[..., 32:], RECORD.io["hidden_g"])
    close(pooled, RECORD.io["pooled"])


def test_each_tower_pads_in_its_own_way(encoder, monkeypatch) -> None:
    assert torch.equal(encoder.token_ids(RECORD.meta["prompts"]), RECORD.io["tokens_l"])
    seen: list[Tensor] = []
    second = encoder.towers[1].model
    monkeypatch.setattr(second, "forward", lambda ids, *_, **__: seen.append(ids) or torch.zeros(2, 77, 32))
    encoder.encode(RECORD.meta["prompts"])
    assert torch.equal(seen[0], RECORD.io["tokens_g"])


def test_it_offers_what_a_text_encoder_offers(encoder) -> None:
    assert isinstance(encoder, TextEncoder)
    assert (encoder.family, encoder.width, encoder.widths) == ("sdxl", 64, (32, 32))
    table = encoder.token_embedding.weight
    assert torch.equal(table[265, :32], encoder.towers[0].token_embedding.weight[265])
    assert torch.equal(table[265, 32:], encoder.towers[1].token_embedding.weight[265])
    assert not any(parameter.requires_grad for parameter in encoder.train().parameters())
    assert not encoder.towers[0].training


@torch.no_grad()
def test_vectors_of_a_word_reach_both_towers_and_the_pooled_vector(encoder) -> None:
    manager = manager_of(encoder, "*", initializer_words=["a"])
    plain = encoder.encode(["a photo of a dog"])
    same = encoder.encode(["a photo of * dog"], manager)
    for key, (value,) in plain.items():
        torch.testing.assert_close(same[key][0], value)
    with torch.no_grad():
        manager.vectors("*")[:, 32:] *= -9
    changed = encoder.encode(["a photo of * dog"], manager)
    assert torch.equal(changed["c_crossattn"][0][..., :32], same["c_crossattn"][0][..., :32])
    assert not torch.allclose(changed["c_crossattn"][0][..., 32:], same["c_crossattn"][0][..., 32:])
    assert not torch.allclose(changed["c_adm"][0], same["c_adm"][0])


@torch.no_grad()
def test_several_vectors_move_the_end_token_that_is_pooled(encoder) -> None:
    """Three vectors of three tokens are the prompt with those tokens."""
    manager = manager_of(encoder, "<x>", num_vectors_per_token=3)
    tokens = encoder.prompt_tokenizer.token_ids("photo of a")
    manager.take({"<x>": encoder.token_embedding.weight[tokens]}, "the test")
    ours, expected = encoder.encode(["a <x> dog"], manager), encoder.encode(["a photo of a dog"])
    # Padding is moved too, which no token before the end can see.
    close(ours["c_crossattn"][0][:, :7], expected["c_crossattn"][0][:, :7])
    close(ours["c_adm"][0], expected["c_adm"][0])
    long = encoder.encode(["<x> " * 40], manager)
    assert long["c_adm"][0].isfinite().all()


def test_gradients_reach_both_parts_of_the_vectors(encoder) -> None:
    manager = manager_of(encoder, "*")
    condition = encoder.encode(["a photo of *"], manager)
    condition["c_crossattn"][0].sum().backward()
    (vectors,) = manager.embedding_parameters()
    assert vectors.grad is not None
    assert all(part.abs().max() > 0 for part in vectors.grad.split(encoder.widths, dim=1))


@torch.no_grad()
def test_vectors_can_begin_at_what_both_towers_make_of_a_word(encoder) -> None:
    manager = manager_of(encoder, "*", initializer_words=["dog"], cross_init=True)
    (context,) = encoder.encode(["dog"])["c_crossattn"]
    close(manager.vectors("*"), context[0, 1:2])
