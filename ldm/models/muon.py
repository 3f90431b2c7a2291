"""Muon for the matrices and kernels of a network, AdamW for the rest: one optimiser, as a YAML can name it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Quintic Newton-Schulz iteration of Jordan's Muon: the slope at zero is largest that keeps singular values near 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
# Below this many rows or columns nothing is gained by making a matrix orthogonal.
_LEAST = 5


class MuonWithAdamW(torch.optim.Optimizer):
    """Matrices move along their orthogonalised momentum, kernels too, flattened to [out, in * kh * kw].

    `lr` is the rate of AdamW for vectors, biases and thin matrices; that of the others is `lr * matrix_factor`, so
    that one schedule drives both. Where a gradient is missing nothing moves. Weight decay is decoupled in both.
    torch.optim.Muon takes matrices alone, and a model would need two optimisers.
    Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-3,
        matrix_factor: float = 10.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "matrix_factor": matrix_factor,
            "momentum": momentum,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step; returns what `closure` gives."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            alike: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in moving:
                if _is_matrix(parameter):
                    alike.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
                else:
                    _adamw(parameter, self.state[parameter], group)
            for parameters in alike.values():
                _muon(parameters, [self.state[parameter] for parameter in parameters], group)
        return loss


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices [..., m, n] with their singular values brought near 1 (0.7 to 1.2), float32.

    The iteration x <- (a + b x x' + c (x x')^2) x runs on the smaller of the two Gram matrices, and the product of its
    polynomials is applied once: for wide kernels a third of the arithmetic.
    """
    # In half precision the product of the polynomials goes wrong by orders of magnitude; a step may be taken within
    # autocast, as those of first stages are.
    with torch.autocast(matrices.device.type, enabled=False):
        return _iterated(matrices.float())


def _iterated(matrices: Tensor) -> Tensor:
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    product = None
    for _ in range(_STEPS):
        square = gram @ gram
        polynomial = b * gram + c * square
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        gram = polynomial @ gram @ polynomial
    x = product @ x
    return x.mT if tall else x


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and min(len(parameter), parameter[0].numel()) >= _LEAST


def _muon(parameters: Sequence[Tensor], states: Sequence[dict[str, Any]], group: Mapping[str, Any]) -> None:
    """A step of matrices of one shape, which share the arithmetic."""
    directions = []
    for parameter, state in zip(parameters, states, strict=True):
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum, gradient = state["momentum"], parameter.grad
        momentum.mul_(group["momentum"]).add_(gradient)
        directions.append(gradient.add(momentum, alpha=group["momentum"]).flatten(1))
    rate = group["lr"] * group["matrix_factor"]
    # A tall matrix needs longer steps for the same change of what it puts out.
    stretch = max(1.0, directions[0].shape[0] / directions[0].shape[1]) ** 0.5
    for parameter, direction in zip(parameters, orthogonalised(torch.stack(directions)), strict=True):
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.add_(direction.reshape(parameter.shape).to(parameter.dtype), alpha=-rate * stretch)


def _adamw(parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
    if not state:
        state["step"] = 0
        state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["step"] += 1
    first, second = group["betas"]
    state["mean"].lerp_(parameter.grad, 1 - first)
    state["square"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
    corrected = (state["square"] / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.addcdiv_(state["mean"], corrected, value=-group["lr"] / (1 - first ** state["step"]))
