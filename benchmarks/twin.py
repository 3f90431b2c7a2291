"""A second model on the same weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model that shares the memory of its frozen parameters, and has trained ones of its own.

    Either may be moved or cast without the other: that gives it new memory.
    """
    shared = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in model.parameters()
        if not parameter.requires_grad
    }
    with torch.no_grad():
        return copy.deepcopy(model, shared)
