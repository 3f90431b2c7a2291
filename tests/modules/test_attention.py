from __future__ import annotations

import pytest
import torch

from ldm.modules import attention as room
from ldm.modules.attention import CrossAttention, SpatialTransformer, attend


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_both_kernels_compute_softmax_attention(monkeypatch, limit: int) -> None:
    monkeypatch.setattr(room, "SHORT", limit)
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.einsum("bhnd,bhmd->bhnm", q, k).div(8**0.5).softmax(-1)
    torch.testing.assert_close(attend(q, k, v), torch.einsum("bhnm,bhmd->bhnd", weights, v))


def test_keys_and_values_may_come_from_different_contexts() -> None:
    torch.manual_seed(0)
    attention = CrossAttention(8, 6, heads=2, dim_head=4)
    x, keys, values = torch.randn(2, 5, 8), torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    alike = attention(x, torch.stack([keys, keys], dim=1))
    torch.testing.assert_close(alike, attention(x, keys))
    torch.testing.assert_close(attention(x, keys[:, None]), attention(x, keys))
    apart = attention(x, torch.stack([keys, values], dim=1))
    with torch.no_grad():
        attention.to_v.weight.zero_()
        assert torch.equal(attention(x, torch.stack([keys, values], dim=1)), attention(x, keys))
    assert not torch.allclose(apart, alike)


def test_a_transformer_takes_its_row_of_a_layered_context() -> None:
    torch.manual_seed(0)
    transformer = SpatialTransformer(32, 2, 16, context_dim=6)
    torch.nn.init.normal_(transformer.proj_out.weight)
    x, context = torch.randn(1, 32, 4, 4), torch.randn(1, 3, 1, 5, 6)
    for layer in range(3):
        transformer.layer = layer
        torch.testing.assert_close(transformer(x, context), transformer(x, context[:, layer, 0]))
        torch.testing.assert_close(transformer(x, context[:, 1:2]), transformer(x, context[:, 1, 0]))
