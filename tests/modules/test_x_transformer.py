from __future__ import annotations

import json

import torch
from torch.nn import functional as F

from ldm.modules.x_transformer import Attention, Encoder, TransformerWrapper
from tests.golden_record import GOLDEN


def test_attention_is_the_softmax_of_scaled_products():
    attention = Attention(16, heads=2, dim_head=4)
    x = torch.randn(3, 5, 16)
    q, k, v = (
        p(x).view(3, 5, 2, 4).transpose(1, 2) for p in (attention.to_q, attention.to_k, attention.to_v)
    )
    expected = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).reshape(3, 5, 8)
    torch.testing.assert_close(attention(x), attention.to_out(expected))
    with torch.no_grad():  # the other kernel
        torch.testing.assert_close(attention(x), attention.to_out(expected))


def test_layers_have_residual_connections():
    encoder = Encoder(8, depth=1, heads=2, dim_head=4)
    x = torch.randn(1, 3, 8)
    (norm1, attention), (norm2, feed) = encoder.layers
    middle = x + attention(norm1(x))
    inner = F.gelu(feed.net[0][0](norm2(middle)))
    torch.testing.assert_close(encoder(x), middle + feed.net[2](inner))


def test_a_later_token_changes_an_earlier_output():
    transformer = TransformerWrapper(10, 4, Encoder(8, 1))
    first, second = transformer(torch.tensor([[1, 2], [1, 3]]))
    assert not torch.allclose(first[0], second[0])


def test_a_short_prompt_uses_the_first_positions():
    transformer = TransformerWrapper(10, 4, Encoder(8, 1))
    seen = []
    transformer(torch.tensor([[1, 2]]), lambda ids, embedded: seen.append((ids, embedded)) or embedded)
    ids, embedded = seen[0]
    assert torch.equal(embedded, transformer.token_emb(ids))


def test_names_and_shapes_are_those_of_the_published_model():
    manifest = json.loads((GOLDEN / "ldm_text2img_large.state_dict.json").read_text())
    prefix = "cond_stage_model.transformer."
    expected = {k.removeprefix(prefix): tuple(v) for k, v in manifest.items() if k.startswith(prefix)}
    with torch.device("meta"):
        transformer = TransformerWrapper(30522, 77, Encoder(1280, 32))
    assert {k: tuple(v.shape) for k, v in transformer.state_dict().items()} == expected
