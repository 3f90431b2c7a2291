"""Convolutions of many channels over few positions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.modules.diffusionmodules import util
from ldm.modules.diffusionmodules.util import Conv3x3


@pytest.fixture
def many(monkeypatch):
    monkeypatch.setattr(util, "LEAST_CHANNELS", 8)


def _pair(out: int = 12) -> tuple[Conv3x3, nn.Conv2d]:
    torch.manual_seed(0)
    ours, theirs = Conv3x3(8, out), nn.Conv2d(8, out, 3, padding=1)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("shape", [(1, 8, 8, 8), (1, 8, 4, 6), (3, 8, 4, 4)])
def test_result_and_gradients_are_the_convolutions(many, shape) -> None:
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


def test_the_product_is_taken_for_small_maps_alone(many, monkeypatch) -> None:
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


def test_under_autocast_it_rounds_as_the_convolution_does(many) -> None:
    ours, theirs = _pair()
    x = torch.randn(1, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = ours(x), theirs(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
