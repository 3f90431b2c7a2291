from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.modules.ema import LitEma


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1)))
    net[0].bias.requires_grad_(False)
    return net


def test_names_are_those_of_checkpoints() -> None:
    keys = set(LitEma(network()).state_dict())
    assert keys == {"decay", "num_updates", "0weight", "10weight", "10bias"}


def test_decay_warms_up_and_averages() -> None:
    net = network()
    ema = LitEma(net, decay=0.5)
    expected = net[0].weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            net[0].weight += 1
        ema(net)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net[0].weight.detach()
    torch.testing.assert_close(ema.state_dict()["0weight"], expected)
    assert int(ema.num_updates) == 5


def test_scope_restores_the_weights_even_after_an_error() -> None:
    net = network()
    ema = LitEma(net)
    with torch.no_grad():
        net[0].weight.fill_(7)
    with pytest.raises(RuntimeError), ema.applied_to(net):
        assert not (net[0].weight == 7).any()
        raise RuntimeError
    assert (net[0].weight == 7).all()


def test_a_decay_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match="1.5"):
        LitEma(network(), decay=1.5)
