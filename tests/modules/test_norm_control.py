from __future__ import annotations

import pytest
import torch

from ldm.modules.embedding_manager import EmbeddingManager
from ldm.util import UserError


def manager(clip, kind: str | None, **options) -> EmbeddingManager:
    return EmbeddingManager(clip, ["*"], ["cat"], num_vectors_per_token=3, norm_control=kind, **options)


def norms(held: EmbeddingManager) -> torch.Tensor:
    return held.vectors("*").detach().norm(dim=1)


def usual(clip) -> float:
    return float(clip.token_embedding.weight.detach().norm(dim=1).mean())


def test_fixed_keeps_the_vocabularys_mean_norm_and_the_direction(clip) -> None:
    held = manager(clip, "fixed")
    assert norms(held).tolist() == pytest.approx([usual(clip)] * 3, rel=1e-5), "from the beginning"
    torch.testing.assert_close(held.initial("*"), held.vectors("*").detach())
    before = held.vectors("*").detach().clone()
    parameter = held.vectors("*")
    with torch.no_grad():
        parameter *= torch.tensor([[50.0], [0.1], [1.0]])
    held.on_optimizer_step(1)
    assert held.vectors("*") is parameter, "the optimiser goes on with the same parameter"
    torch.testing.assert_close(parameter.detach(), before, rtol=1e-5, atol=1e-6)


def test_limited_cuts_only_what_is_longer(clip) -> None:
    held = manager(clip, "limited", norm_ratio=2.0)
    vectors = held.vectors("*")
    with torch.no_grad():
        vectors.copy_(torch.nn.functional.normalize(vectors, dim=1) * torch.tensor([[50.0], [0.1], [0.0]]))
    held.on_optimizer_step(1)
    assert norms(held).tolist() == pytest.approx([2 * usual(clip), 0.1, 0.0], rel=1e-5)


def test_off_it_touches_nothing(clip) -> None:
    plain, off = EmbeddingManager(clip, ["*"], ["cat"], num_vectors_per_token=3), manager(clip, None)
    assert torch.equal(plain.vectors("*"), off.vectors("*"))
    with torch.no_grad():
        off.vectors("*").mul_(50)
    before = off.vectors("*").detach().clone()
    off.on_optimizer_step(1)
    assert torch.equal(off.vectors("*"), before)


def test_it_is_measured_anew_where_vectors_came_with_the_weights(clip) -> None:
    held = manager(clip, "fixed")

    class Other:
        token_embedding = torch.nn.Embedding(4, 32, _weight=torch.ones(4, 32))

    held.measure(Other)
    held.on_optimizer_step(1)
    assert norms(held).tolist() == pytest.approx([32**0.5] * 3, rel=1e-5)


def test_nonsense(clip) -> None:
    with pytest.raises(UserError, match="norm_control is 'sphere'; use fixed"):
        manager(clip, "sphere")
    with pytest.raises(UserError, match="norm_ratio is 0"):
        manager(clip, "fixed", norm_ratio=0)
