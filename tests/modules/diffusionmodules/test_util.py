from __future__ import annotations

import math

import torch
from torch import nn

from ldm.modules.diffusionmodules.util import GroupNorm32, timestep_embedding, zero_module


def test_timestep_embedding_is_cosines_then_sines() -> None:
    embedding = timestep_embedding(torch.tensor([0.0, 7.5]), 6)
    assert embedding.shape == (2, 6) and embedding.dtype == torch.float32
    assert embedding[0].tolist() == [1, 1, 1, 0, 0, 0]
    frequencies = [1, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)]
    expected = [math.cos(7.5 * f) for f in frequencies] + [math.sin(7.5 * f) for f in frequencies]
    torch.testing.assert_close(embedding[1], torch.tensor(expected))
    assert timestep_embedding(torch.zeros(1), 5).shape == (1, 5)


def test_group_norm_computes_in_float32() -> None:
    norm = GroupNorm32(4, 8).to(torch.bfloat16)
    x = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0)) * 100 + 1000
    wide = nn.functional.group_norm(x.bfloat16().float(), 4, eps=norm.eps)
    got = norm(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wide, atol=0.02, rtol=0.01)


def test_zero_module() -> None:
    assert all((p == 0).all() for p in zero_module(nn.Linear(2, 2)).parameters())
