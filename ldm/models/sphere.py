"""An optimiser that turns vectors and leaves their length alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ldm.util import ConfigError

# Keeps a row of zeros from being divided by its length.
_TINY = 1e-12


class SphereSGD(torch.optim.Optimizer):
    """Gradient descent on directions, after Directional Textual Inversion (Kim et al., ICLR 2026).

    Each row of a parameter [N, d] turns by about `lr` radians a step, whatever the scale of the loss: its gradient is
    taken along the sphere, set to length 1, and the row goes against it and back to its length. `kappa` pulls towards
    the direction that the row had at first, which is the initializer's (the paper's prior of von Mises and Fisher);
    it is a share of the gradient's running mean length, so that it means the same for every batch and precision
    (the paper adds 1e-4 to the raw gradient). With `norm_control: fixed` in the embedding manager the length is the
    vocabulary's. The paper's rate is 0.01 for 400 steps; `--scale_lr false` takes it as it is. For
    `optimizer_config.target`.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.01, kappa: float = 0.0) -> None:
        if kappa < 0:
            raise ConfigError(f"SphereSGD: kappa is {kappa}; it must be 0 or more")
        super().__init__(params, {"lr": lr, "kappa": kappa})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Turn every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for vectors in group["params"]:
                if vectors.grad is not None:
                    self._turn(vectors, group["lr"], group["kappa"])
        return loss

    def _turn(self, vectors: Tensor, rate: float, kappa: float) -> None:
        length = vectors.norm(dim=-1, keepdim=True)
        direction = vectors / length.clamp_min(_TINY)
        gradient, state = vectors.grad, self.state[vectors]
        if kappa:
            size = gradient.norm(dim=-1, keepdim=True)
            if not state:
                state["first"], state["size"] = direction.clone(), size.clone()
            state["size"].lerp_(size, 0.1)
            gradient = gradient - kappa * state["size"] * state["first"]
        gradient = gradient - (direction * gradient).sum(dim=-1, keepdim=True) * direction
        gradient = gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(_TINY)
        turned = direction - rate * gradient
        vectors.copy_(length * turned / turned.norm(dim=-1, keepdim=True).clamp_min(_TINY))
