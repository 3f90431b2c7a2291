"""Optimizers and learning-rate schedules of a YAML."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.util import ConfigError, get_obj_from_str, instantiate_from_config

logger = logging.getLogger(__name__)

ADAMW = {"target": "torch.optim.AdamW"}


def build_optimizer(
    groups: Iterable[Mapping[str, Any]],
    learning_rate: float,
    optimizer_config: Mapping[str, Any] | None = None,
    scheduler_config: Mapping[str, Any] | None = None,
) -> Any:
    """Return what Lightning's `configure_optimizers` must return.

    Args:
        groups: torch's parameter groups; a group may have an "lr" of its own, and a "name" for the log.
        optimizer_config: node of any torch optimizer; by default AdamW with torch's settings, as in the original.
        scheduler_config: node of a class with `schedule(step) -> factor`; the factor is applied at each step.
    Raises:
        ConfigError: a class does not exist, or does not accept its parameters.
    """
    node: Mapping[str, Any] = optimizer_config or ADAMW
    groups = list(groups)
    if len(groups) > 1:
        rates = (f"{group.get('name', 'others')} {group.get('lr', learning_rate):.2e}" for group in groups)
        logger.info("learning rates: %s", ", ".join(rates))
    # Plain values: they are saved with the state of the optimizer.
    # Tuples for a YAML's lists: settings are saved with the state of the optimizer, which is read without its classes.
    options = {
        key: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for key, value in (node.get("params") or {}).items()
    }
    try:
        optimizer = get_obj_from_str(node["target"])(groups, lr=learning_rate, **options)
    except TypeError as error:
        raise ConfigError(f"optimizer_config {node['target']}: {error}") from error
    if scheduler_config is None:
        return optimizer
    factor = instantiate_from_config(scheduler_config).schedule
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class _ByGroups(torch.optim.Optimizer):
    """The loop of a step, over the groups of parameters."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with every parameter that has a gradient, and return the value of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.step_group(group)
        return loss

    def step_group(self, group: dict[str, Any]) -> None:
        """Take a step with one group; called without gradient."""
        raise NotImplementedError


def _with_gradient(group: Mapping[str, Any]) -> list[Tensor]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


# Coefficients of Muon's quintic Newton-Schulz iteration: the largest slope at zero that keeps singular values near 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
# Matrices with fewer rows or columns gain nothing from orthogonal steps.
_MIN_SIZE = 5


class MuonWithAdamW(_ByGroups):
    """Muon for matrices and kernels, AdamW for all other parameters, with one learning rate.

    Muon steps along the orthogonalised momentum (Jordan et al., Muon: an optimizer for hidden layers in neural
    networks, 2024); kernels count as matrices [out, in * kh * kw]. torch.optim.Muon accepts matrices alone, so that a
    model would need two optimizers. Parameters without gradient stay as they are.

    Args:
        lr: learning rate of AdamW.
        matrix_factor: the learning rate of Muon is `lr * matrix_factor`, so that one schedule serves both.
        momentum: of Muon.
        betas, eps: of AdamW.
        weight_decay: decoupled, of both.
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

    def step_group(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for parameter in _with_gradient(group):
            if _is_matrix(parameter):
                by_shape.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
            else:
                _adamw(parameter, self.state[parameter], group)
        for parameters in by_shape.values():
            _muon(parameters, [self.state[parameter] for parameter in parameters], group)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return matrices [..., m, n] with their singular values moved to 0.7 to 1.2, float32.

    The iteration x <- (a + b x x' + c (x x')^2) x runs on the smaller of the two Gram matrices, and the product of its
    polynomials is applied to x once; for wide kernels that is a third of the arithmetic.
    """
    # In half precision the polynomials are wrong by orders of magnitude, and a step may be taken inside autocast.
    with torch.autocast(matrices.device.type, enabled=False):
        return _iterate(matrices.float())


def _iterate(matrices: Tensor) -> Tensor:
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    product: Tensor | None = None
    for _ in range(_STEPS):
        square = gram @ gram
        polynomial = b * gram + c * square
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        gram = polynomial @ gram @ polynomial
    x = x if product is None else product @ x
    return x.mT if tall else x


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and min(len(parameter), parameter[0].numel()) >= _MIN_SIZE


def _muon(parameters: Sequence[Tensor], states: Sequence[dict[str, Any]], group: Mapping[str, Any]) -> None:
    """Take a step of Muon of matrices of one shape, in one batch."""
    directions = []
    for parameter, state in zip(parameters, states, strict=True):
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum, gradient = state["momentum"], _gradient(parameter)
        momentum.mul_(group["momentum"]).add_(gradient)
        directions.append(gradient.add(momentum, alpha=group["momentum"]).flatten(1))
    rate = group["lr"] * group["matrix_factor"]
    # A tall matrix needs longer steps for the same change of its output.
    stretch = max(1.0, directions[0].shape[0] / directions[0].shape[1]) ** 0.5
    for parameter, direction in zip(parameters, orthogonalised(torch.stack(directions)), strict=True):
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.add_(direction.reshape(parameter.shape).to(parameter.dtype), alpha=-rate * stretch)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None  # parameters without one are left out
    return parameter.grad


def _adamw(parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
    """Take a step of AdamW (Loshchilov and Hutter 2019)."""
    gradient = _gradient(parameter)
    if not state:
        state["step"] = 0
        state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["step"] += 1
    first, second = group["betas"]
    state["mean"].lerp_(gradient, 1 - first)
    state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    corrected = (state["square"] / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.addcdiv_(state["mean"], corrected, value=-group["lr"] / (1 - first ** state["step"]))


# Second moments below it count as it, so that a gradient of zeros is no division by zero.
_NO_MOMENT = 1e-24


class FullMatrixAdam(_ByGroups):
    """Adam with the second moments of all pairs of numbers of a vector, from the gradients of the last steps.

    Adam divides each number by the root of its own second moment. Here a vector is multiplied by the inverse root of
    the matrix of all of them, so that directions that no axis follows are scaled too; a few vectors then need fewer
    steps. That is GGT of Agarwal et al. (Efficient full-matrix adaptive regularization, 2019), which keeps gradients
    and no matrix, with Adam's weights of the past. A step costs the eigenvalues of `window` gradients.

    The rows [N, d] of a parameter share one matrix; of what has more axes, all but the last count as rows.

    Args:
        lr: learning rate; a step is shorter than Adam's at the same rate, because the numbers share their moments.
        betas: decay of the mean of the gradients and of their second moments.
        damping: the identity, times this and the mean of the second moments, is added to the matrix.
        window: the number of steps whose gradients are kept.
        weight_decay: decoupled, as in AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        damping: float = 0.1,
        window: int = 100,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": tuple(betas), "damping": damping, "window": window}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    def step_group(self, group: dict[str, Any]) -> None:
        for parameter in _with_gradient(group):
            # Eigenvalues need float32, and a step may be taken inside autocast.
            with torch.autocast(parameter.device.type, enabled=False):
                direction = _whitened_mean(parameter, self.state[parameter], group)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(direction.to(parameter.dtype), alpha=group["lr"])


def _whitened_mean(parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
    """The mean gradient of a parameter, times the inverse root of the damped matrix of second moments."""
    gradient = _gradient(parameter).float()
    gradient = gradient.reshape(-1, gradient.shape[-1] if gradient.ndim else 1)
    if not state:
        state["step"], state["mean"] = 0, torch.zeros_like(gradient)
        state["gradients"] = gradient.new_zeros(0, *gradient.shape)
    state["step"] += 1
    first, second = group["betas"]
    state["mean"].lerp_(gradient, 1 - first)
    state["gradients"] = torch.cat([state["gradients"], gradient[None]])[-group["window"] :]
    count, rows, width = state["gradients"].shape
    ages = torch.arange(count - 1, -1, -1, device=gradient.device)
    weights = second**ages
    past = (state["gradients"] * (weights / weights.sum() / rows).sqrt()[:, None, None]).reshape(-1, width)
    mean = state["mean"] / (1 - first ** state["step"])
    damping = group["damping"] * past.square().sum() / width + _NO_MOMENT
    if len(past) > width:
        moments, axes = _eigenvalues(past.mT @ past)
        step = (mean @ axes * (moments + damping).rsqrt()) @ axes.mT
    else:
        # The products of the gradients have the same eigenvalues in a smaller matrix. Across all gradients only the
        # damping counts, and along them is added 1 / sqrt(moments + damping) - 1 / sqrt(damping), as a quotient.
        moments, axes = _eigenvalues(past @ past.mT)
        root, base = (moments + damping).sqrt(), damping.sqrt()
        step = mean / base - ((mean @ past.mT @ axes) / (root * base * (root + base))) @ axes.mT @ past
    return step.reshape(parameter.shape)


def _eigenvalues(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of a positive matrix, not below zero by rounding, and its eigenvectors in columns."""
    # On an Apple GPU torch may not have them.
    values, axes = torch.linalg.eigh(matrix.cpu() if matrix.device.type == "mps" else matrix)
    return values.clamp(min=0).to(matrix.device), axes.to(matrix.device)


# The smallest length to divide by, for rows of zeros.
_TINY = 1e-12


class SphereSGD(_ByGroups):
    """Gradient descent on the directions of vectors, after Directional Textual Inversion (Kim et al., ICLR 2026).

    Each row of a parameter [N, d] turns by about `lr` radians per step and keeps its length: its gradient is projected
    on the sphere and normalised, so that the scale of the loss does not matter. Use it as `optimizer_config.target`.
    With `norm_control: fixed` of the embedding manager, the length is that of the vocabulary's vectors. The paper's
    learning rate is 0.01 for 400 steps; `--scale_lr false` keeps it as given.

    Args:
        lr: angle of a step, in radians.
        kappa: weight of the pull towards a row's first direction, that of the initializer (the paper's von
            Mises-Fisher prior), as a fraction of the running mean length of the gradient. So it does not depend on
            batch size and precision; the paper adds 1e-4 to the raw gradient.
    Raises:
        ConfigError: `kappa` is below 0.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.01, kappa: float = 0.0) -> None:
        if kappa < 0:
            raise ConfigError(f"SphereSGD: kappa is {kappa}; it must be 0 or more")
        super().__init__(params, {"lr": lr, "kappa": kappa})

    def step_group(self, group: dict[str, Any]) -> None:
        for vectors in _with_gradient(group):
            self._turn(vectors, group)

    def _turn(self, vectors: Tensor, group: Mapping[str, Any]) -> None:
        """Turn a parameter [N, d] with its gradient; where the group names `parts` of d, each part by itself."""
        parts = list(group.get("parts") or (vectors.shape[-1],))
        state, sizes = self.state[vectors], [1] * len(parts)
        if group["kappa"] and not state:
            state["first"] = torch.cat([_directions(part) for part in vectors.split(parts, dim=-1)], dim=-1)
            lengths = [part.norm(dim=-1, keepdim=True) for part in _gradient(vectors).split(parts, dim=-1)]
            state["size"] = torch.cat(lengths, dim=-1)
        firsts = state["first"].split(parts, dim=-1) if state else [None] * len(parts)
        means = state["size"].split(sizes, dim=-1) if state else [None] * len(parts)
        turning = zip(
            vectors.split(parts, -1), _gradient(vectors).split(parts, -1), firsts, means, strict=True
        )
        for part, gradient, first, mean in turning:
            if first is not None and mean is not None:
                mean.lerp_(gradient.norm(dim=-1, keepdim=True), 0.1)
                gradient = gradient - group["kappa"] * mean * first
            _turn(part, gradient, group["lr"])


def _turn(vectors: Tensor, gradient: Tensor, rate: float) -> None:
    """Turn vectors [N, d] by `rate` radians along the gradient's part on the sphere."""
    length, direction = vectors.norm(dim=-1, keepdim=True), _directions(vectors)
    gradient = gradient - (direction * gradient).sum(dim=-1, keepdim=True) * direction
    gradient = gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(_TINY)
    turned = direction - rate * gradient
    vectors.copy_(length * turned / turned.norm(dim=-1, keepdim=True).clamp_min(_TINY))


def _directions(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(_TINY)
