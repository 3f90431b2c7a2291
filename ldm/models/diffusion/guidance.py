"""The one place that asks the model for its noise estimate, with classifier-free guidance in one batched call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ldm.util import UserError

# a context [B, L, d], a list of such, or {"c_crossattn": [...], "c_concat": [...]}
Condition: TypeAlias = Tensor | list | Mapping[str, Any]


def to_eps(output: Tensor, x: Tensor, alpha: float, parameterization: str) -> Tensor:
    """The noise in `x` at level `alpha`, from what a model of that parameterization returned for it.

    Raises:
        UserError: the parameterization is none of eps, x0, v.
    """
    if parameterization == "eps":
        return output
    if parameterization == "x0":
        return (x - math.sqrt(alpha) * output) / math.sqrt(1.0 - alpha)
    if parameterization == "v":  # v = sqrt(alpha) eps - sqrt(1 - alpha) x0 (Salimans and Ho 2022)
        return math.sqrt(alpha) * output + math.sqrt(1.0 - alpha) * x
    raise UserError(
        f'cannot sample from a model with parameterization "{parameterization}"; known are eps, x0 and v'
    )


def join(first: Condition, second: Condition) -> Condition:
    """Two conditionings of the same make as one, batch after batch.

    Raises:
        UserError: they are not of the same make.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape[1:] != second.shape[1:]:
            raise UserError(
                f"conditionings of shape {tuple(first.shape)} and {tuple(second.shape)} cannot be guided against "
                "each other; encode both with the same text encoder and length"
            )
        return torch.cat([first, second])
    if isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
        return {key: join(first[key], second[key]) for key in first}
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        return [join(one, other) for one, other in zip(first, second, strict=True)]
    raise UserError(
        f"the unconditional conditioning is {_make(first)} but the conditioning is {_make(second)}; make them alike"
    )


def rows(cond: Condition | None) -> int | None:
    """Batch size of a conditioning, None where it holds no tensor."""
    if isinstance(cond, Tensor):
        return cond.shape[0]
    parts = cond.values() if isinstance(cond, Mapping) else cond or ()
    return next((count for count in map(rows, parts) if count is not None), None)


@dataclass(frozen=True)
class GuidedEps:
    """`eps(x, empty) + scale * (eps(x, cond) - eps(x, empty))` (Ho and Salimans 2022).

    Guidance is linear and so is the conversion to eps, thus the guided output is converted once.
    `corrector` is an object with `modify_score(model, eps, x, t, cond, **corrector_kwargs) -> eps`.
    """

    model: Any
    cond: Condition | None
    uncond: Condition | None = None
    scale: float = 1.0
    corrector: Any = None
    corrector_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, x: Tensor, t: float, alpha: float) -> Tensor:
        """The guided noise in `x` [B, C, H, W] at timestep `t`, whose level is `alpha`."""
        # whole timesteps stay integers: a model may use them as an index
        dtype = torch.long if float(t).is_integer() else torch.float32
        times = torch.full((x.shape[0],), t, device=x.device, dtype=dtype)  # (B,)
        output = self._output(x, times).to(x.dtype)
        eps = to_eps(output, x, alpha, getattr(self.model, "parameterization", "eps"))
        if self.corrector is not None:
            eps = self.corrector.modify_score(self.model, eps, x, times, self.cond, **self.corrector_kwargs)
        return eps

    def _output(self, x: Tensor, times: Tensor) -> Tensor:
        if self.uncond is None or self.scale == 1.0:
            return self.model.apply_model(x, times, self.cond)
        both = self.model.apply_model(
            torch.cat([x, x]), torch.cat([times, times]), join(self.uncond, self.cond)
        )
        without, with_cond = both.chunk(2)
        return without + self.scale * (with_cond - without)


def _make(cond: Condition) -> str:
    """A conditioning's kind, for an error text."""
    if isinstance(cond, Tensor):
        return f"a tensor of shape {tuple(cond.shape)}"
    if isinstance(cond, Mapping):
        return f"a dict of {', '.join(cond) or 'nothing'}"
    if isinstance(cond, (list, tuple)):
        return f"a list of {len(cond)}"
    return f"of type {type(cond).__name__}"
