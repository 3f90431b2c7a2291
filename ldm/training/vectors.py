"""What a personalization has learned so far, put aside and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


def take(manager: nn.Module) -> dict[str, Tensor]:
    """A copy of a manager's state on the CPU."""
    return {key: value.detach().to("cpu", copy=True) for key, value in manager.state_dict().items()}


@contextmanager
def held(manager: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this block the manager has another state; after it, to the bit, its own."""
    before = take(manager)
    manager.load_state_dict(state)
    try:
        yield
    finally:
        manager.load_state_dict(before)
