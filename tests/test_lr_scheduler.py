"""Learning-rate schedules against closed forms."""

import math

import pytest
import torch

from ldm.lr_scheduler import (
    LambdaLinearScheduler,
    LambdaNamedScheduler,
    LambdaStepScheduler,
    LambdaWarmUpCosineScheduler,
    LambdaWarmUpCosineScheduler2,
)
from ldm.util import ConfigError

TWO_CYCLES = {
    "warm_up_steps": [10, 0],
    "f_min": [0.1, 0.0],
    "f_max": [1.0, 0.5],
    "f_start": [0.0, 0.5],
    "cycle_lengths": [30, 20],
}


def test_one_cycle_of_warm_up_and_cosine():
    schedule = LambdaWarmUpCosineScheduler(
        warm_up_steps=10, lr_min=0.2, lr_max=2.0, lr_start=0.0, max_decay_steps=110
    ).schedule
    assert schedule(0) == 0
    assert schedule(5) == pytest.approx(1.0)
    assert schedule(10) == pytest.approx(2.0)
    assert schedule(35) == pytest.approx(0.2 + 0.9 * (1 + math.cos(math.pi / 4)))
    assert schedule(60) == pytest.approx(1.1)
    assert schedule(110) == pytest.approx(0.2)
    assert schedule(5000) == pytest.approx(0.2)


def test_several_cycles():
    schedule = LambdaWarmUpCosineScheduler2(**TWO_CYCLES)
    assert schedule(5) == pytest.approx(0.5)
    assert schedule(20) == pytest.approx(0.55)
    assert schedule(30) == pytest.approx(0.1), "the last step of a cycle belongs to it"
    assert schedule(40) == pytest.approx(0.25)
    assert schedule(51) == pytest.approx(0.0)


def test_linear_decay():
    schedule = LambdaLinearScheduler(**TWO_CYCLES)
    assert schedule(5) == pytest.approx(0.5)
    assert schedule(15) == pytest.approx(0.1 + 0.9 * 15 / 30)
    assert schedule(40) == pytest.approx(0.5 * 10 / 20)


def test_schedule_of_the_published_stable_diffusion_yaml():
    schedule = LambdaLinearScheduler(
        warm_up_steps=[10000], cycle_lengths=[10000000000000], f_start=[1e-6], f_max=[1.0], f_min=[1.0]
    )
    assert schedule(0) == pytest.approx(1e-6)
    assert schedule(5000) == pytest.approx(0.5, rel=1e-4)
    assert schedule(10**9) == 1


def test_lists_of_different_lengths():
    with pytest.raises(ConfigError, match="one entry per cycle"):
        LambdaLinearScheduler(**(TWO_CYCLES | {"f_max": [1.0]}))


def test_rates_by_steps():
    schedule = LambdaStepScheduler("0.005:100, 1e-3:1000,")
    assert schedule.first == 0.005
    assert [schedule(n) for n in (0, 99)] == [1, 1]
    assert [schedule(n) for n in (100, 999, 5000)] == pytest.approx([0.2] * 3)
    three = LambdaStepScheduler("1e-2:10,5e-3:20,1e-3")
    assert [three(n) for n in (9, 10, 19, 20)] == pytest.approx([1, 0.5, 0.5, 0.1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "'fast' is not RATE:STEPS"),
        ("1e-3:x", "'1e-3:x' is no"),
        ("1e-3:100, 1e-4:50, 1e-5", "must increase"),
        ("1e-3, 1e-4:50", "must increase"),
        ("1e-3:100, 1e-4:50", "must increase"),
        ("1e-3:-1", "must increase"),
        ("0:10, 1e-3", "above 0"),
    ],
)
def test_invalid_rates(text, message):
    with pytest.raises(ConfigError, match=message):
        LambdaStepScheduler(text)


def test_cycle_without_steps():
    with pytest.raises(ConfigError, match="a cycle has -1 steps"):
        LambdaWarmUpCosineScheduler(
            warm_up_steps=10, lr_min=0.2, lr_max=2.0, lr_start=0.0, max_decay_steps=-1
        )


def named(name, **options):
    schedule = LambdaNamedScheduler(name, warm_up_steps=10, max_decay_steps=110, **options)
    return [schedule(n) for n in (0, 5, 10, 60, 109, 110, 500)]


@pytest.mark.parametrize(
    ("name", "options", "factors"),
    [
        ("constant_with_warmup", {}, [0, 0.5, 1, 1, 1, 1, 1]),
        ("linear", {}, [0, 0.5, 1, 0.5, 0.01, 0, 0]),
        ("cosine", {}, [0, 0.5, 1, 0.5, 0.5 * (1 + math.cos(0.99 * math.pi)), 0, 0]),
        (
            "cosine_with_restarts",
            {"num_cycles": 2},
            [0, 0.5, 1, 1, 0.5 * (1 + math.cos(0.98 * math.pi)), 0, 0],
        ),
        ("polynomial", {"power": 2}, [0, 0.5, 1, 0.25, 1e-4, 0, 0]),
    ],
)
def test_named_schedules(name, options, factors):
    assert named(name, **options) == pytest.approx(factors, abs=1e-12)


@pytest.mark.parametrize(
    "name", ["constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_named_schedules_are_those_of_diffusers(name):
    optimization = pytest.importorskip("diffusers.optimization")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = optimization.get_scheduler(
        name, optimizer, num_warmup_steps=7, num_training_steps=50, num_cycles=3
    )
    (factor,) = theirs.lr_lambdas
    ours = LambdaNamedScheduler(name, 7, 50, num_cycles=3)
    assert [ours(n) for n in range(51)] == pytest.approx([factor(n) for n in range(51)], abs=1e-6)


def test_wrong_named_schedules():
    with pytest.raises(ConfigError, match="there is no schedule 'step'"):
        LambdaNamedScheduler("step")
    with pytest.raises(ConfigError, match="'linear' needs max_decay_steps"):
        LambdaNamedScheduler("linear")
