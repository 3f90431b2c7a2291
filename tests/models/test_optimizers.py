from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ldm.models.optimizers import FullMatrixAdam, MuonWithAdamW, SphereSGD, build_optimizer, orthogonalised
from ldm.util import ConfigError


def _parameter(*shape: int) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(sum(shape))
    parameter = torch.nn.Parameter(torch.randn(shape, generator=generator))
    parameter.grad = torch.randn(shape, generator=generator)
    return parameter


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
def test_orthogonalised_sets_singular_values_to_one_and_keeps_directions(shape) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalised(matrix).float()
    values = torch.linalg.svdvals(found)
    assert found.shape == matrix.shape
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.97


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


def test_matrices_step_as_in_torch_muon() -> None:
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


def test_parameters_without_gradient_stay_and_a_saved_state_resumes() -> None:
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


def test_muon_is_built_from_a_yaml() -> None:
    node = {"target": "ldm.models.optimizers.MuonWithAdamW", "params": {"matrix_factor": 5.0}}
    optimizer = build_optimizer([{"params": [_parameter(8, 8)]}], 1e-3, node)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert optimizer.param_groups[0]["matrix_factor"] == 5.0


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


def test_sphere_sgd_converges_to_a_direction() -> None:
    vectors, wanted = rows(0.4), torch.eye(16)[:1]
    optimizer = SphereSGD([vectors], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        (-(vectors * wanted).sum()).backward()
        optimizer.step()
    assert angle(vectors.detach(), wanted).item() < 0.03


def test_the_pull_to_the_first_direction_does_not_depend_on_the_scale_of_the_loss() -> None:
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


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_the_parts_of_a_vector_turn_as_if_they_were_alone(kappa: float) -> None:
    """The towers of an encoder differ in the size of their gradients."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(2, 7, generator=generator) for _ in range(2))
    gradient[:, 3:] *= 100

    def turned(vectors: Tensor, gradients: Tensor, **group) -> Tensor:
        parameter = nn.Parameter(vectors.clone())
        optimizer = SphereSGD([{"params": [parameter], **group}], lr=0.1, kappa=kappa)
        for _ in range(3):
            parameter.grad = gradients.clone()
            optimizer.step()
        return parameter.detach()

    together = turned(start, gradient, parts=(3, 4))
    for part in (slice(0, 3), slice(3, 7)):
        assert torch.equal(together[:, part], turned(start[:, part], gradient[:, part]))


def test_without_a_gradient_nothing_turns() -> None:
    vectors = rows(1.0)
    before = vectors.detach().clone()
    optimizer = SphereSGD([vectors], lr=0.1, kappa=0.0)
    optimizer.step()
    assert torch.equal(vectors, before)
    vectors.grad = torch.zeros_like(vectors)
    optimizer.step()
    torch.testing.assert_close(vectors.detach(), before)


def test_a_negative_kappa_is_an_error() -> None:
    with pytest.raises(ConfigError, match="kappa is -1"):
        SphereSGD([rows(1.0)], kappa=-1)


def test_a_step_inside_autocast_is_as_exact() -> None:
    matrix = torch.randn(16, 144, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(0, -3, 16)) @ v  # as unequal as gradients are
    with torch.autocast("cpu", torch.bfloat16):
        found = orthogonalised(matrix)
    assert torch.equal(found, orthogonalised(matrix))
    assert torch.linalg.svdvals(found).max() < 1.3


def _whitened(gradients: list[Tensor], betas: tuple[float, float], damping: float) -> Tensor:
    """The step of FullMatrixAdam after these gradients [N, d], by the whole matrix in float64."""
    first, second = betas
    ages = range(len(gradients) - 1, -1, -1)
    past = torch.stack(gradients).double()
    mean = (
        sum(first**age * g for age, g in zip(ages, past, strict=True))
        * (1 - first)
        / (1 - first ** len(past))
    )
    weights = torch.tensor([second**age for age in ages], dtype=torch.float64)
    matrix = torch.einsum("t,tnd,tne->de", weights / weights.sum() / past.shape[1], past, past)
    matrix += damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
    values, axes = torch.linalg.eigh(matrix)
    return mean @ axes @ torch.diag(values.rsqrt()) @ axes.mT


@pytest.mark.parametrize(("shape", "steps"), [((1, 32), 5), ((3, 8), 5), ((2, 2, 6), 4), ((7,), 3), ((), 3)])
def test_full_matrix_adam_whitens_with_the_whole_matrix(shape, steps) -> None:
    parameter, options = _parameter(*shape), {"betas": (0.8, 0.9), "damping": 0.2}
    optimizer = FullMatrixAdam([parameter], lr=0.1, **options)
    gradients, width = [], shape[-1] if shape else 1
    for _ in range(steps):
        before = parameter.detach().clone()
        parameter.grad = torch.randn(shape)
        gradients.append(parameter.grad.reshape(-1, width))
        optimizer.step()
    step = _whitened(gradients, **options).float().reshape(shape)
    torch.testing.assert_close(parameter.detach(), before - 0.1 * step, atol=1e-5, rtol=1e-4)


def test_full_matrix_adam_forgets_what_is_older_than_its_window() -> None:
    several = [_parameter(1, 6) for _ in range(2)]
    optimizers = [FullMatrixAdam([one], lr=0.0, window=3) for one in several]
    for step in range(6):
        same = torch.randn(1, 6)
        for number, (one, optimizer) in enumerate(zip(several, optimizers, strict=True)):
            one.grad = same * (5.0 if number and step < 3 else 1.0)
            optimizer.step()
    first, second = (optimizer.state[one] for one, optimizer in zip(several, optimizers, strict=True))
    assert torch.equal(first["gradients"], second["gradients"]) and len(first["gradients"]) == 3
    assert not torch.equal(first["mean"], second["mean"])


def test_full_matrix_adam_needs_fewer_steps_where_no_axis_follows_the_curvature() -> None:
    """A quadratic with curvatures from 1 to 1,000 along random axes, with noise: the best rate of each optimizer."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q
    curvature = axes @ torch.diag(torch.logspace(0, 3, 24)) @ axes.mT

    def remaining(kind, rate: float) -> float:
        place = torch.nn.Parameter(torch.ones(1, 24))
        optimizer = kind([place], lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 80)
        noise = torch.Generator().manual_seed(1)
        for _ in range(80):
            place.grad = place.detach() @ curvature + torch.randn(1, 24, generator=noise)
            optimizer.step()
            schedule.step()
        return float(place.detach() @ curvature @ place.detach().mT)

    rates = (0.01, 0.03, 0.1, 0.3, 1.0)
    ours, theirs = (
        min(remaining(kind, rate) for rate in rates) for kind in (FullMatrixAdam, torch.optim.AdamW)
    )
    assert ours < 0.5 * theirs, (ours, theirs)


@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_full_matrix_adam_does_not_depend_on_the_scale_of_the_loss(scale) -> None:
    ours, scaled = _parameter(2, 6), _parameter(2, 6)
    optimizers = [FullMatrixAdam([one], lr=0.1) for one in (ours, scaled)]
    for _ in range(4):
        ours.grad = torch.randn(2, 6)
        scaled.grad = scale * ours.grad
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, scaled, atol=1e-4, rtol=1e-4)


def test_full_matrix_adam_steps_alike_inside_autocast() -> None:
    inside, outside = _parameter(2, 6), _parameter(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        FullMatrixAdam([inside], lr=0.1).step()
    FullMatrixAdam([outside], lr=0.1).step()
    assert torch.equal(inside, outside)


def test_full_matrix_adam_does_not_move_without_gradient() -> None:
    still = _parameter(2, 4)
    before = still.detach().clone()
    still.grad = torch.zeros(2, 4)
    FullMatrixAdam([still], lr=1.0).step()
    assert torch.equal(still.detach(), before)


def test_full_matrix_adam_goes_on_from_its_state() -> None:
    gradients = torch.randn(8, 2, 5, generator=torch.Generator().manual_seed(2))
    whole, parted = _parameter(2, 5), _parameter(2, 5)
    optimizers = [FullMatrixAdam([one], lr=0.1) for one in (whole, parted)]
    for number, gradient in enumerate(gradients):
        if number == 4:
            state = optimizers[1].state_dict()
            optimizers[1] = FullMatrixAdam([parted], lr=0.1)
            optimizers[1].load_state_dict(state)
        for one, optimizer in zip((whole, parted), optimizers, strict=True):
            one.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(whole, parted)
