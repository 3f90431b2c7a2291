from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ldm.modules.diffusionmodules import util
from ldm.modules.diffusionmodules.util import (
    Conv3x3,
    GroupNorm32,
    channels_first,
    timestep_embedding,
    zero_module,
)


def test_timestep_embedding_is_cosines_then_sines() -> None:
    embedding = timestep_embedding(torch.tensor([0.0, 7.5]), 6)
    assert embedding.shape == (2, 6) and embedding.dtype == torch.float32
    assert embedding[0].tolist() == [1, 1, 1, 0, 0, 0]
    frequencies = [1, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)]
    expected = [math.cos(7.5 * f) for f in frequencies] + [math.sin(7.5 * f) for f in frequencies]
    torch.testing.assert_close(embedding[1], torch.tensor(expected))
    assert timestep_embedding(torch.zeros(1), 5).shape == (1, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_of_half_precision_is_that_of_float32_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = GroupNorm32(4, 8).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(2, 8, 16, 16) * 3 + 50).to(dtype)
    wide = nn.functional.group_norm(x.float(), 4, norm.weight.float(), norm.bias.float(), norm.eps)
    assert torch.equal(norm(x), wide.to(dtype))


def test_channels_first() -> None:
    images = torch.arange(24, dtype=torch.uint8).view(1, 2, 4, 3)
    moved = channels_first(images, torch.device("cpu"))
    assert moved.shape == (1, 3, 2, 4) and moved.dtype == torch.float32 and moved.is_contiguous()
    assert moved[0, 2, 1, 3] == images[0, 1, 3, 2]
    assert channels_first(images[..., 0], torch.device("cpu")).shape == (1, 1, 2, 4)


def test_zero_module() -> None:
    assert all((p == 0).all() for p in zero_module(nn.Linear(2, 2)).parameters())


@pytest.fixture
def low_channel_limit(monkeypatch):
    monkeypatch.setattr(util, "LEAST_CHANNELS", 8)


def _pair(out: int = 12) -> tuple[Conv3x3, nn.Conv2d]:
    torch.manual_seed(0)
    ours, theirs = Conv3x3(8, out), nn.Conv2d(8, out, 3, padding=1)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("shape", [(1, 8, 8, 8), (1, 8, 4, 6), (3, 8, 4, 4)])
def test_conv3x3_has_the_results_and_gradients_of_a_convolution(low_channel_limit, shape) -> None:
    ours, theirs = _pair()
    x = torch.randn(shape)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, wanted = ours(mine), theirs(other)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn_like(wanted)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_only_small_maps_use_the_matrix_product(low_channel_limit, monkeypatch) -> None:
    taken = []
    unfold = torch.nn.functional.unfold
    monkeypatch.setattr(
        util.F, "unfold", lambda x, *rest, **more: taken.append(x.shape) or unfold(x, *rest, **more)
    )
    ours, _ = _pair()
    for side in (8, 9):
        ours(torch.randn(1, 8, side, side))
    ours(torch.randn(2, 8, 8, 8))
    assert taken == [(1, 8, 8, 8)]
    monkeypatch.setattr(util, "LEAST_CHANNELS", 9)
    ours(torch.randn(1, 8, 8, 8))
    assert len(taken) == 1


def test_conv3x3_rounds_like_a_convolution_under_autocast(low_channel_limit) -> None:
    ours, theirs = _pair()
    x = torch.randn(1, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = ours(x), theirs(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
