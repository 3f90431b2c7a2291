"""Muon for matrices, AdamW for the rest."""

from __future__ import annotations

import pytest
import torch

from ldm.models.muon import MuonWithAdamW, orthogonalised
from ldm.models.optim import build_optimizer


def _parameter(*shape: int) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(sum(shape))
    parameter = torch.nn.Parameter(torch.randn(shape, generator=generator))
    parameter.grad = torch.randn(shape, generator=generator)
    return parameter


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
def test_singular_values_become_ones_and_directions_stay(shape) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalised(matrix).float()
    values = torch.linalg.svdvals(found)
    assert found.shape == matrix.shape
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.97


def test_a_step_within_autocast_is_as_exact() -> None:
    matrix = torch.randn(16, 144, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(0, -3, 16)) @ v  # as unequal as gradients are
    with torch.autocast("cpu", torch.bfloat16):
        found = orthogonalised(matrix)
    assert torch.equal(found, orthogonalised(matrix))
    assert torch.linalg.svdvals(found).max() < 1.3


def test_vectors_thin_matrices_and_biases_step_as_adamw() -> None:
    ours, theirs = [[_parameter(12), _parameter(3, 40)] for _ in range(2)]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = [MuonWithAdamW(ours, **options), torch.optim.AdamW(theirs, **options)]
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_kernels_move_by_the_rate_along_every_direction() -> None:
    kernel = _parameter(16, 8, 3, 3)
    before = kernel.detach().clone()
    MuonWithAdamW([kernel], lr=1e-3, matrix_factor=20.0).step()
    values = torch.linalg.svdvals((kernel.detach() - before).flatten(1)) / 0.02
    assert values.min() > 0.6 and values.max() < 1.3


def test_matrices_move_as_torchs_muon_moves_them() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    ours, theirs = _parameter(40, 16), _parameter(40, 16)
    mine = MuonWithAdamW([ours], lr=1e-3, matrix_factor=10.0, weight_decay=0.1)
    other = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, momentum=0.95)
    for _ in range(3):
        mine.step()
        other.step()
    # torch's momentum is an average, ours a sum: the direction is the same, and its length is taken out
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)
    assert (ours - _parameter(40, 16)).abs().max() > 5e-3


def test_what_has_no_gradient_stays_and_a_saved_state_goes_on_the_same() -> None:
    straight, resumed = _parameter(16, 16), _parameter(16, 16)
    still = torch.nn.Parameter(torch.ones(16, 16))
    first = MuonWithAdamW([straight, still], lr=1e-3)
    first.step()
    first.step()
    half = MuonWithAdamW([resumed], lr=1e-3)
    half.step()
    state = half.state_dict()
    again = MuonWithAdamW([resumed], lr=5.0)
    again.load_state_dict(state)
    again.step()
    assert torch.equal(straight, resumed)
    assert torch.equal(still, torch.ones(16, 16))


def test_a_yaml_names_it() -> None:
    node = {"target": "ldm.models.muon.MuonWithAdamW", "params": {"matrix_factor": 5.0}}
    optimizer = build_optimizer([{"params": [_parameter(8, 8)]}], 1e-3, node)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert optimizer.param_groups[0]["matrix_factor"] == 5.0
