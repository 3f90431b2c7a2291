"""Conditions of a denoiser: their forms, and how they enter it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ldm.base_models import check_size_conditions
from ldm.util import ConfigError, UserError, instantiate_from_config

# A tensor such as a context [B, M, d] or a layered one [B, layers, 1 or 2, M, d] (see ldm.modules.personalization),
# several of them, a mapping of `DiffusionWrapper.forward`'s arguments to such, or a TimedCondition.
Condition: TypeAlias = "Tensor | Sequence[Any] | Mapping[str, Any] | TimedCondition"

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm", "crossattn-adm")


class DiffusionWrapper(nn.Module):
    """Passes a condition to the UNet.

    Args:
        diff_model_config: node of the UNet.
        conditioning_key: where the condition enters: `concat` as channels, `crossattn` as context, `hybrid` as both,
            `adm` as class, `crossattn-adm` as context and vector, or None.
    Raises:
        ConfigError: `conditioning_key` is none of these.
    """

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            raise ConfigError(
                f"conditioning_key '{conditioning_key}' is unknown; use one of "
                f"{', '.join(str(key) for key in CONDITIONING_KEYS)}"
            )
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] = (),
        c_crossattn: Sequence[Tensor] = (),
        c_adm: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return the UNet's output for x [B, C, H, W] at t [B].

        c_concat: [B, C', H, W] each; c_crossattn: [B, M, d] each (adm: ids [B]); c_adm: [B, d'] each.
        """
        if self.conditioning_key in ("concat", "hybrid"):
            x = torch.cat([x, *c_concat], dim=1)
        if self.conditioning_key in ("crossattn", "hybrid"):
            return self.diffusion_model(x, t, context=torch.cat(list(c_crossattn), dim=-2))
        if self.conditioning_key == "crossattn-adm":
            context, vector = torch.cat(list(c_crossattn), dim=-2), torch.cat(list(c_adm), dim=1)
            return self.diffusion_model(x, t, context=context, y=vector)
        if self.conditioning_key == "adm":
            return self.diffusion_model(x, t, y=c_crossattn[0])
        return self.diffusion_model(x, t)

    def keywords(self, condition: Condition | None) -> dict[str, Sequence[Tensor]]:
        """Return a condition as keyword arguments of `forward`."""
        if condition is None:
            return {}
        if isinstance(condition, Mapping):
            return dict(condition)
        assert not isinstance(condition, TimedCondition), "see at_timesteps"
        parts = [condition] if isinstance(condition, Tensor) else list(condition)
        return {"c_concat" if self.conditioning_key == "concat" else "c_crossattn": parts}


def without(captions: list[Any], dropped: Tensor) -> list[Any]:
    """Return captions with the empty one where `dropped` [B] is true; see `with_texts`."""
    return with_texts(
        captions, ["" if drop else text for text, drop in zip(captions, dropped.tolist(), strict=True)]
    )


def with_texts(captions: list[Any], texts: Sequence[str]) -> list[Any]:
    """Return other texts in the same kind of list, with all else that it holds, such as the sizes of images."""
    kept = copy.copy(captions)
    kept[:] = texts
    return kept


class Captioned:
    """What a model that learns from captions does with them, for subclasses that encode more than their words."""

    cond_stage_key: str

    def captions_of(self, batch: Mapping[str, Any]) -> list[Any]:
        """Return the captions of a batch as a list, which may hold more that is encoded with them."""
        return list(batch[self.cond_stage_key])

    def get_learned_conditioning(self, c: Any) -> Any:
        """Return a condition encoded."""
        raise NotImplementedError

    def get_unconditional_conditioning(self, negatives: Sequence[str]) -> Any:
        """Return the condition that guidance steers away from, for negative prompts."""
        return self.get_learned_conditioning(list(negatives))

    def completed(self, encoded: Any, negatives: Sequence[str] | None = None) -> Any:
        """Return what the text encoder gave for prompts, with all other conditions of the denoiser.

        `negatives` are the texts of negative prompts that guidance steers away from.
        """
        return encoded

    # Whether prompts are for images of a size, which `drawing_at` sets.
    size_conditions: bool = False

    @contextmanager
    def drawing_at(self, height: int, width: int, sizes: Mapping[str, Sequence[int]]) -> Iterator[None]:
        """Within this block prompts are for images of this size in pixels, for models with size conditions.

        Raises UserError as `ldm.base_models.check_size_conditions`.
        """
        check_size_conditions(sizes, self.size_conditions)
        yield


def concat_conditions(first: Condition | None, second: Condition | None) -> Condition:
    """Return two conditions of the same form, concatenated along the batch.

    A plain context [B, M, d] fits a layered one, and a tensor fits a condition that depends on the timestep.

    Raises:
        UserError: their forms or shapes differ.
    """
    if isinstance(first, TimedCondition) or isinstance(second, TimedCondition):
        return TimedCondition((*_timed_parts(first, second), *_timed_parts(second, first)))
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.ndim != second.ndim or first.ndim == 5:
            first, second = _layered_alike(first, second)
        if first.shape[1:] != second.shape[1:]:
            raise UserError(
                f"conditionings of shape {tuple(first.shape)} and {tuple(second.shape)} cannot be guided against "
                "each other; encode both with the same text encoder and length"
            )
        return torch.cat([first, second])
    if isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
        return {key: concat_conditions(first[key], second[key]) for key in first}
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        return [concat_conditions(one, other) for one, other in zip(first, second, strict=True)]
    raise UserError(
        f"the unconditional conditioning is {_form(first)} but the conditioning is {_form(second)}; give both in the "
        "same form"
    )


def _layered_alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return two contexts, plain or layered, with as many layers and keys and values apart in both where it is in one.

    Tensors that are no such contexts are returned as they are.
    """
    if not {first.ndim, second.ndim} <= {3, 5}:
        return first, second
    pair = [one[:, None, None] if one.ndim == 3 else one for one in (first, second)]
    layers, kinds = (max(one.shape[axis] for one in pair) for axis in (1, 2))
    if any(one.shape[1] not in (1, layers) or one.shape[2] not in (1, kinds) for one in pair):
        return first, second
    whole = [one.expand(-1, layers, kinds, -1, -1) for one in pair]
    return whole[0], whole[1]


class TimedPrompts:
    """Prompts whose encoding depends on the timestep at which the denoiser is asked.

    Args:
        prompts: [B] of anything that `encode` understands.
        encode: (prompts [n], times [n]) -> their conditions [n, ...] at these timesteps.
        stages: times [n] -> a number or a row of numbers for each, equal where the encoding is; see
            `Personalization.stage_of`.
    """

    def __init__(
        self,
        prompts: Sequence[Hashable],
        encode: Callable[[Sequence[Any], Tensor], Tensor],
        stages: Callable[[Tensor], Tensor],
    ) -> None:
        self.prompts, self.encode, self.stages = tuple(prompts), encode, stages
        self._kept: dict[tuple[Hashable, tuple[float, ...]], Tensor] = {}

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice) -> TimedPrompts:
        return TimedPrompts(self.prompts[rows], self.encode, self.stages)

    def at(self, times: Tensor) -> Tensor:
        """Return the condition [B, ...] at timesteps [B], whole or fractional.

        Without gradient equal prompts of one stage are encoded once, and kept until another stage is asked for:
        samplers go through the stages in order, and what NeTI gives for all layers is large.
        """
        if torch.is_grad_enabled():
            return self.encode(self.prompts, times)
        stages = map(tuple, self.stages(times).reshape(len(times), -1).tolist())
        keys = list(zip(self.prompts, stages, strict=True))
        rows = {key: row for row, key in reversed(list(enumerate(keys)))}
        missing = [row for key, row in rows.items() if key not in self._kept]
        if missing:
            encoded = self.encode([self.prompts[row] for row in missing], times[missing])
            self._kept.update((keys[row], value) for row, value in zip(missing, encoded, strict=True))
        self._kept = {key: self._kept[key] for key in rows}
        return torch.stack([self._kept[key] for key in keys])


class TimedCondition:
    """A condition that becomes a tensor at the timestep of each row, inside `apply_model`.

    Args:
        parts: the rows in order: prompts that are encoded at each timestep, and tensors [b, ...] that stay the same.
    """

    def __init__(self, parts: Sequence[TimedPrompts | Tensor]) -> None:
        self.parts = tuple(parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, rows: slice) -> TimedCondition:
        """Return consecutive rows."""
        start, stop, _ = rows.indices(len(self))
        kept: list[TimedPrompts | Tensor] = []
        for part in self.parts:
            if part[max(start, 0) : max(stop, 0)].__len__():
                kept.append(part[max(start, 0) : max(stop, 0)])
            start, stop = start - len(part), stop - len(part)
        return TimedCondition(kept)

    def at(self, times: Tensor) -> Condition:
        """Return the condition [B, ...] at timesteps [B]."""
        parts = zip(self.parts, times.split([len(part) for part in self.parts]), strict=True)
        resolved: list[Condition] = [
            part if isinstance(part, Tensor) else part.at(own) for part, own in parts
        ]
        return reduce(concat_conditions, resolved)


@dataclass(frozen=True)
class GuidedCondition:
    """A condition under which the denoiser is guided away from another one, in training as in sampling."""

    cond: Condition
    uncond: Condition
    scale: float


def outputs_under(
    apply: Callable[[Tensor, Tensor, Any], Tensor],
    x: Tensor,
    times: Tensor,
    conditions: Sequence[Condition | None],
) -> Sequence[Tensor]:
    """Return the output for x [B, ...] under each of the conditions, in one pass of the denoiser `apply`."""
    if len(conditions) == 1:
        return [apply(x, times, conditions[0])]
    count = len(conditions)
    joined = reduce(concat_conditions, conditions)
    return apply(torch.cat([x] * count), torch.cat([times] * count), joined).chunk(count)


def extrapolated(start: Tensor, end: Tensor, scale: float) -> Tensor:
    """Return start + scale * (end - start), the rule of guidance (Ho and Salimans 2022)."""
    return start + scale * (end - start)


def _timed_parts(cond: Condition | None, other: Condition | None) -> Sequence[TimedPrompts | Tensor]:
    if isinstance(cond, TimedCondition):
        return cond.parts
    if isinstance(cond, Tensor):
        return (cond,)
    raise UserError(f"a condition {_form(cond)} cannot be guided against one {_form(other)}")


def at_timesteps(cond: Condition | None, times: Tensor) -> Condition | None:
    """Return a condition in which every part that depends on the timestep is encoded at timesteps [B]."""
    if isinstance(cond, TimedCondition):
        return cond.at(times)
    if isinstance(cond, Mapping):
        return {key: at_timesteps(value, times) for key, value in cond.items()}
    if isinstance(cond, (list, tuple)):
        return [at_timesteps(value, times) for value in cond]
    return cond


def condition_map(function: Callable[[Tensor], Tensor], cond: Condition) -> Any:
    """Return a condition of the same form with a function applied to each of its tensors."""
    if isinstance(cond, Tensor):
        return function(cond)
    if isinstance(cond, Mapping):
        return {key: condition_map(function, part) for key, part in cond.items()}
    assert not isinstance(cond, TimedCondition), "see at_timesteps"
    return [condition_map(function, part) for part in cond]


def requires_grad(cond: Condition | None) -> bool:
    """Return whether a gradient can reach a part of a condition."""
    if isinstance(cond, Tensor):
        return cond.requires_grad
    if isinstance(cond, TimedCondition):
        return any(not isinstance(part, Tensor) or part.requires_grad for part in cond.parts)
    return any(map(requires_grad, cond.values() if isinstance(cond, Mapping) else cond or ()))


def context_of(cond: Condition) -> Tensor:
    """Return the context [B, M, d] of what a text encoder gave."""
    context: Tensor = cond["c_crossattn"][0] if isinstance(cond, Mapping) else cond  # type: ignore[assignment]
    return context


def with_context(cond: Condition, context: Tensor) -> Any:
    """Return what a text encoder gave, with another context [B, M, d]."""
    return {**cond, "c_crossattn": [context]} if isinstance(cond, Mapping) else context


def condition_rows(cond: Condition | None) -> int | None:
    """Return the batch size of a condition, None if it holds no tensor."""
    if isinstance(cond, Tensor):
        return cond.shape[0]
    if isinstance(cond, TimedCondition):
        return len(cond)
    parts = cond.values() if isinstance(cond, Mapping) else cond or ()
    return next((count for count in map(condition_rows, parts) if count is not None), None)


def _form(cond: Condition | None) -> str:
    """Describe a condition's form, for an error text."""
    if isinstance(cond, Tensor):
        return f"a tensor of shape {tuple(cond.shape)}"
    if isinstance(cond, TimedCondition):
        return "one that depends on the timestep"
    if isinstance(cond, Mapping):
        return f"a dict of {', '.join(cond) or 'nothing'}"
    if isinstance(cond, (list, tuple)):
        return f"a list of {len(cond)}"
    return f"of type {type(cond).__name__}"
