from __future__ import annotations

import torch

from ldm.modules import attention as room
from ldm.modules.attention import CrossAttention, PositionConv, SpatialTransformer, attend


def test_attention_is_softmax_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.einsum("bhnd,bhmd->bhnm", q, k).div(8**0.5).softmax(-1)
    torch.testing.assert_close(attend(q, k, v), torch.einsum("bhnm,bhmd->bhnd", weights, v))


def test_short_sequences_with_a_gradient_in_half_precision_take_the_product(monkeypatch) -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    exact = attend(q, k, v)
    half = [states.bfloat16() for states in (q, k, v)]
    with torch.no_grad():
        assert not room.is_short(6, 6, half[0])
    assert not room.is_short(6, 6, q)
    assert not room.is_short(6, 6, half[0].to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert room.is_short(6, 6, q)  # which is converted on the way to the product
    monkeypatch.setattr(room.F, "scaled_dot_product_attention", None)
    torch.testing.assert_close(attend(*half).float(), exact, rtol=0.02, atol=0.02)
    monkeypatch.setattr(room, "SHORT", 35)
    assert not room.is_short(6, 6, half[0])


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


def test_a_convolution_of_positions_is_a_convolution_of_size_1() -> None:
    torch.manual_seed(0)
    conv, reference = PositionConv(6, 4), torch.nn.Conv2d(6, 4, 1)
    reference.load_state_dict(conv.state_dict())
    x = torch.randn(2, 6, 3, 5)
    positions = conv(x.flatten(2).transpose(1, 2))
    torch.testing.assert_close(positions.transpose(1, 2).reshape(2, 4, 3, 5), reference(x))


def test_both_shapes_of_the_projections_give_the_same() -> None:
    torch.manual_seed(0)
    conv, linear = (SpatialTransformer(32, 2, 16, context_dim=6, use_linear=one) for one in (False, True))
    torch.nn.init.normal_(conv.proj_out.weight)
    state = conv.state_dict()
    assert state["proj_in.weight"].shape == (32, 32, 1, 1)
    linear.load_state_dict({k: v.flatten(1) if v.ndim == 4 else v for k, v in state.items()})
    x, context = torch.randn(2, 32, 3, 5), torch.randn(2, 4, 6)
    torch.testing.assert_close(conv(x, context), linear(x, context))
