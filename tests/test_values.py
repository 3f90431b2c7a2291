"""Types and ranges of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from ldm import values
from ldm.data.personalized import RESAMPLING
from ldm.embeddings import FORMATS
from ldm.models.diffusion.conditioning import CONDITIONING_KEYS
from ldm.models.diffusion.ddpm import PARAMETERIZATIONS
from ldm.models.diffusion.schedule import SAMPLINGS, SCHEDULES, WEIGHTINGS
from ldm.util import UserError

pytestmark = pytest.mark.refused_first

BAD = [-1, 0, 1.5, math.nan, math.inf, "x", "3", None, [], {}, True, 10**12]


def refused(name: str, kind: Any) -> list[Any]:
    return [value for value in BAD if list(values.misfits(name, value, kind))]


@pytest.mark.parametrize(
    ("name", "kind", "accepted"),
    [
        ("timesteps", int, []),
        ("max_steps", int, [-1, 10**12]),
        ("num_workers", int | None, [0, None]),
        ("flip_p", float, [0]),
        ("strength", float, [0, 1.5]),  # of a residual, as its dial
        ("edit_strength", float, [0]),
        ("base_learning_rate", float | str, [1.5, "x", "3"]),
        ("limit_train_batches", int | float | None, [10**12, None]),
        ("limit_val_batches", int | float, [0, 10**12]),
        ("use_ema", bool, [True]),
        ("monitor", str, ["x", "3"]),
        ("attention_resolutions", Sequence[int], [[]]),
        ("channel_mult", Sequence[int], []),
        ("num_vectors_per_token", int | Sequence[int] | Mapping[str, int], [{}]),
        ("ckpt_path", str | Path | None, ["x", "3", None]),
        ("beta_schedule", str, []),
        ("logging_interval", Literal["step", "epoch"] | None, [None]),
        ("params", Any, BAD),
        ("lr", float | torch.Tensor, [1.5, 10**12]),
    ],
)
def test_what_a_kind_accepts(name: str, kind: Any, accepted: list[Any]) -> None:
    kept = [(one, type(one)) for one in accepted]
    assert repr(refused(name, kind)) == repr([value for value in BAD if (value, type(value)) not in kept])


@pytest.mark.parametrize(
    ("name", "value", "kind", "found"),
    [
        ("timesteps", 0, int, ("timesteps", "a whole number from 2 to 10,000")),
        ("betas", [0.9, 1.0], tuple[float, float], ("betas[1]", "a number from 0 and below 1")),
        ("betas", [0.9], tuple[float, float], ("betas", "a list of 2")),
        ("num_vectors_per_token", {"*": 0}, Mapping[str, int], ("num_vectors_per_token.*", "a whole number")),
        ("use_ema", "true", bool, ("use_ema", "true or false; write it without quotes")),
        ("timesteps", "10", int, ("timesteps", "; write it without quotes")),
        ("monitor", False, str, ("monitor", "a text; write it in quotes")),
        ("loss_type", "l3", str, ("loss_type", "one of l1, l2")),
        (
            "limit_train_batches",
            1.5,
            int | float,
            ("limit_train_batches", "of at least 1, or a share up to 1.0"),
        ),
        (
            "limit_train_batches",
            0.0,
            int | float,
            ("limit_train_batches", "of at least 1, or a share up to 1.0"),
        ),
        ("max_steps", 0, int, ("max_steps", "of at least 1 or -1")),
        ("lr_g_factor", math.nan, float, ("lr_g_factor", "a number of at least 0")),
    ],
)
def test_what_is_asked_for(name: str, value: Any, kind: Any, found: tuple[str, str]) -> None:
    ((where, misfit, requirement),) = values.misfits(name, value, kind)
    assert where == found[0] and found[1] in requirement
    assert misfit == value or math.isnan(misfit) or isinstance(value, (list, dict))


def test_lists_of_omegaconf_are_lists() -> None:
    config = OmegaConf.create({"betas": [0.9, 2]})
    assert [found[0] for found in values.misfits("betas", config.betas, Sequence[float])] == ["betas[1]"]


class Parent:
    def __init__(self, size: int, depth: int = -7) -> None: ...


class Child(Parent):
    def __init__(self, only_checked: Unknown = None, **keywords: Any) -> None:  # noqa: F821
        super().__init__(**keywords)


def test_parameters_of_ancestors_and_unknown_annotations() -> None:
    found = values.problems(Child, {"size": 0, "depth": -7, "only_checked": 5, "other": "x"})
    assert [(name, value) for name, value, _ in found] == [("size", 0)]  # a default always fits
    assert not list(values.problems(print, {"sep": 5}))
    assert values.hint(pl.Trainer, "max_steps") is int
    assert [name for name, _, _ in values.problems(torch.optim.AdamW, {"betas": [0.9, 2.0]})] == ["betas[1]"]


def test_choices_are_those_of_the_classes() -> None:
    for name, choices in (
        ("beta_schedule", SCHEDULES),
        ("parameterization", PARAMETERIZATIONS),
        ("loss_weighting", WEIGHTINGS),
        ("timestep_sampling", SAMPLINGS),
        ("conditioning_key", tuple(key for key in CONDITIONING_KEYS if key)),
        ("interpolation", tuple(RESAMPLING)),
        ("formats", tuple(FORMATS)),
    ):
        assert values.RANGES[name] == choices, name


def test_a_named_number() -> None:
    assert values.named_number(" strength = 0.8 ") == ("strength", 0.8)
    for text in ("strength", "strength=", "strength=a", "strength=nan", "strength=-inf", "=1", "a=b=1", ""):
        with pytest.raises(UserError, match=f"'{text}' is not a NAME=NUMBER"):
            values.named_number(text)


def test_a_whole_number_beyond_all_floats_is_not_finite() -> None:
    assert [found[0] for found in values.misfits("scale", 10**400, float)] == ["scale"]
