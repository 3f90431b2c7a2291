"""A running average of a model's weights, under the names that checkpoints use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class LitEma(nn.Module):
    """Exponential moving average of all trainable parameters.

    The averages are buffers, with the names of the parameters without dots.

    Args:
        decay: the rate in the long run, in [0, 1].
        use_num_updates: let the rate after n updates be (1 + n) / (10 + n) at most.
    Raises:
        ValueError: `decay` is not in [0, 1].
    """

    decay: Tensor
    num_updates: Tensor

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_updates: bool = True) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"EMA decay is {decay}; it must lie in [0, 1]")
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_updates else -1, dtype=torch.int))
        self._names = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._names[name] = name.replace(".", "")
                self.register_buffer(self._names[name], parameter.detach().clone())

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move the averages towards the weights of the model."""
        decay = self.decay
        if self.num_updates >= 0:
            self.num_updates += 1
            decay = torch.minimum(decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages, weights = self._pairs(model)
        torch._foreach_lerp_(averages, weights, float(1.0 - decay))

    @torch.no_grad()
    def reset(self, model: nn.Module) -> None:
        """Set the averages to the weights of the model."""
        for average, weight in zip(*self._pairs(model), strict=True):
            average.copy_(weight)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights of the model by the averages."""
        for average, weight in zip(*self._pairs(model), strict=True):
            weight.copy_(average)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Within this block the model has the averaged weights."""
        _, weights = self._pairs(model)
        own = [weight.detach().clone() for weight in weights]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, value in zip(weights, own, strict=True):
                    weight.copy_(value)

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        parameters = dict(model.named_parameters())
        return (
            [getattr(self, buffer) for buffer in self._names.values()],
            [parameters[name].data for name in self._names],
        )
