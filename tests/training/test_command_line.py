"""Command lines of the original and of other tools."""

from __future__ import annotations

import inspect
from shlex import split
from typing import get_args

import pytest
from pytorch_lightning import Trainer
from pytorch_lightning.trainer.trainer import _PRECISION_INPUT

from ldm.training.command_line import TRAINER_OPTIONS, TRAINER_TYPES, make_parser, parse
from ldm.util import UsageError


def test_original_command():
    options = parse(
        split(
            "--base a.yaml b.yaml -t --actual_resume m.ckpt -n cat --gpus 0, --data_root pics --init_word toy"
        )
    )
    assert options.base == ["a.yaml", "b.yaml"]
    assert options.train is True
    assert (options.actual_resume, options.name, options.gpus) == ("m.ckpt", "cat", "0,")
    assert (options.data_root, options.init_word) == ("pics", "toy")


def test_all_flags_of_the_original_exist():
    flags = {flag for action in make_parser()._actions for flag in action.option_strings}
    assert flags >= set(
        split(
            "-n --name -r --resume -b --base -t --train --no-test -p --project -d --debug -s --seed "
            "-f --postfix -l --logdir --scale_lr --datadir_in_name --actual_resume --data_root "
            "--embedding_manager_ckpt --placeholder_string --init_word --gpus"
        )
    )


@pytest.mark.parametrize(
    ("words", "value"),
    [("--scale_lr false", False), ("--scale_lr", True), ("", None), ("--scale_lr yes", True)],
)
def test_switches_with_and_without_value(words, value):
    assert parse(words.split()).scale_lr is value


@pytest.mark.parametrize("gpus", ["0,", "0", "-1", "0,1"])
def test_gpus_is_text(gpus):
    assert parse(["--gpus", gpus, "-t"]).gpus == gpus


def test_overrides_at_any_position():
    options = parse(["-t", "model.base_learning_rate=1e-3", "--base", "a.yaml", "data.params.batch_size=1"])
    assert options.base == ["a.yaml"]
    assert options.train is True
    assert options.overrides == ["model.base_learning_rate=1e-3", "data.params.batch_size=1"]


def test_flag_with_equals_sign_is_not_an_override():
    options = parse(["--data_root=pics", "actual_resume=m.ckpt"])
    assert options.data_root == "pics"
    assert options.overrides == ["actual_resume=m.ckpt"]


def test_the_list_of_trainer_options_is_that_of_lightning():
    assert set(TRAINER_OPTIONS) == set(inspect.signature(Trainer).parameters)
    precisions = {value for kind in get_args(_PRECISION_INPUT) for value in get_args(kind)}
    assert {*get_args(TRAINER_TYPES["precision"])} == precisions - {64, "64", "64-true"}


def test_types_of_trainer_flags():
    options = parse(
        split("--max_steps 10 --precision bf16-mixed --num_nodes=2 --gradient_clip_val 1e-1 --deterministic")
    )
    assert options.trainer == {
        "max_steps": 10,
        "precision": "bf16-mixed",
        "num_nodes": 2,
        "gradient_clip_val": 0.1,
        "deterministic": True,
    }
    assert parse(["--max_steps", "-1"]).trainer == {"max_steps": -1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataroot x", "did you mean --data_root"),
        (
            "--optimizer_type Lion",
            "--optimizer_type is not supported: set model.params.optimizer_config.target",
        ),
        ("--scale_lr perhaps", "neither true nor false"),
        ("--num_vectors 0", "not a positive whole number"),
        ("-t stray", "neither true nor false"),
        ("--gpus 0, stray", "neither a flag nor an override"),
        ("--seed abc", "--seed"),
    ],
)
def test_mistakes_are_usage_errors(words, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse(words.split())
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_every_flag_has_one_line_of_help():
    for action in make_parser()._actions:
        assert action.help and "\n" not in action.help and len(action.help) < 90, action.option_strings
