from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ldm.models.optimizers import SphereSGD
from ldm.util import ConfigError


def rows(*lengths: float) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    directions = nn.functional.normalize(torch.randn(len(lengths), 16, generator=generator), dim=1)
    return nn.Parameter(directions * torch.tensor(lengths)[:, None])


def angle(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a, b, dim=1).clamp(-1, 1).acos()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_each_row_turns_by_the_rate_and_keeps_its_length(scale: float) -> None:
    vectors = rows(0.4, 3.0)
    before = vectors.detach().clone()
    vectors.grad = scale * torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    SphereSGD([vectors], lr=0.05).step()
    torch.testing.assert_close(vectors.detach().norm(dim=1), torch.tensor([0.4, 3.0]))
    assert angle(vectors.detach(), before).tolist() == pytest.approx([math.atan(0.05)] * 2, rel=1e-3)


def test_it_finds_a_direction() -> None:
    vectors, wanted = rows(0.4), torch.eye(16)[:1]
    optimizer = SphereSGD([vectors], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        (-(vectors * wanted).sum()).backward()
        optimizer.step()
    assert angle(vectors.detach(), wanted).item() < 0.03


def test_the_pull_to_the_first_direction_does_not_depend_on_the_losss_scale() -> None:
    ends = []
    for scale in (1e-4, 1e4):
        vectors, wanted = rows(0.4), torch.eye(16)[:1]
        first = vectors.detach().clone()
        optimizer = SphereSGD([vectors], lr=0.02, kappa=1.0)
        for _ in range(200):
            optimizer.zero_grad()
            (-scale * (vectors * wanted).sum()).backward()
            optimizer.step()
        ends.append(vectors.detach())
        # Halfway, where both pull alike.
        assert angle(vectors.detach(), first).item() == pytest.approx(angle(vectors, wanted).item(), abs=0.06)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-3)


def test_without_a_gradient_nothing_turns() -> None:
    vectors = rows(1.0)
    before = vectors.detach().clone()
    optimizer = SphereSGD([vectors], lr=0.1, kappa=0.0)
    optimizer.step()
    assert torch.equal(vectors, before)
    vectors.grad = torch.zeros_like(vectors)
    optimizer.step()
    torch.testing.assert_close(vectors.detach(), before)


def test_nonsense() -> None:
    with pytest.raises(ConfigError, match="kappa is -1"):
        SphereSGD([rows(1.0)], kappa=-1)
