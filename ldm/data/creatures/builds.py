"""A creature's proportions, which no caption names: drawn around the plan of its species, or freely."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """Draw one of `options`.

    It uses `random()` only, whose sequence is the same in every Python version.
    """
    return options[int(rng.random() * len(options))]


def uniform(rng: random.Random, low: float, high: float) -> float:
    """Draw a number between `low` and `high`."""
    return low + (high - low) * rng.random()


@dataclass(frozen=True)
class Build:
    """Proportions in image units: the image spans [-1, 1], y points up, and the creature faces right.

    Ellipses are (x, y, half width, half height, exponent); exponent 2 is an ellipse, 6 nearly a box. A part of size
    zero is not drawn.
    """

    body: tuple[float, float, float, float, float]
    head: tuple[float, float, float, float, float]
    head_apart: bool = True  # False: the face is on the body; `head` only positions eyes and ears
    taper: float = 0.0
    neck: float = 0.0
    ground: float = -0.9
    legs: int = 0
    leg_width: float = 0.0
    leg_spread: float = 0.0
    arms: float = 0.0
    arm_width: float = 0.0
    arm_angle: float = 0.0
    tentacles: int = 0
    tail: float = 0.0
    tail_width: float = 0.0
    tail_angle: float = 0.0
    fork: float = 0.0
    fin: float = 0.0
    wing: float = 0.0
    beak: float = 0.0
    muzzle: float = 0.0
    shell: tuple[float, float, float] = (0.0, 0.0, 0.0)
    ear_length: float = 1.0
    ear_width: float = 1.0
    ear_spread: float = 1.0
    eye_size: float = 1.0
    pattern_period: float = 1.0
    pattern_phase: float = 0.0
    pattern_angle: float = 0.0


_PLANS: dict[str, Build] = {
    "bear": Build(
        body=(0, -0.42, 0.46, 0.4, 2.3), head=(0, 0.2, 0.46, 0.38, 2.2), legs=2, leg_width=0.17, leg_spread=0.24,
        arms=0.34, arm_width=0.13, arm_angle=-0.5, muzzle=0.2, pattern_angle=1.57,
    ),
    "bird": Build(
        body=(-0.06, -0.22, 0.54, 0.42, 2.1), head=(0.22, 0.24, 0.36, 0.34, 2), legs=2, leg_width=0.05, leg_spread=0.16,
        tail=0.24, tail_width=0.13, tail_angle=2.7, wing=0.27, beak=0.3, pattern_angle=1.2,
    ),
    "fish": Build(
        body=(0.12, -0.08, 0.64, 0.46, 2), head=(0.38, -0.02, 0.36, 0.36, 2), head_apart=False, fork=0.38, fin=0.28,
        tail=0.3, tail_width=0.1, tail_angle=3.14, pattern_angle=0.0,
    ),
    "fox": Build(
        body=(-0.08, -0.3, 0.5, 0.28, 2.4), head=(0.4, 0.14, 0.38, 0.33, 2), neck=0.2, legs=4, leg_width=0.1,
        leg_spread=0.36, tail=0.46, tail_width=0.19, tail_angle=2.05, muzzle=0.16, pattern_angle=0.0,
    ),
    "giraffe": Build(
        body=(-0.2, -0.28, 0.42, 0.24, 2.4), head=(0.37, 0.46, 0.36, 0.29, 2.1), neck=0.15, legs=4, leg_width=0.075,
        leg_spread=0.3, tail=0.3, tail_width=0.04, tail_angle=4.2, muzzle=0.14, pattern_angle=0.2, ear_length=0.85,
    ),
    "octopus": Build(
        body=(0, 0.1, 0.54, 0.5, 2.2), head=(0, 0.08, 0.5, 0.5, 2), head_apart=False, tentacles=6, leg_width=0.1,
        leg_spread=0.46, pattern_angle=1.57,
    ),
    "robot": Build(
        body=(0, -0.42, 0.46, 0.34, 9), head=(0, 0.26, 0.44, 0.3, 9), neck=0.12, legs=2, leg_width=0.12,
        leg_spread=0.26, arms=0.36, arm_width=0.1, arm_angle=0.0, pattern_angle=1.57,
    ),
    "snail": Build(
        body=(-0.05, -0.68, 0.8, 0.2, 2.6), head=(0.56, 0.02, 0.32, 0.3, 2), neck=0.17, shell=(-0.2, -0.16, 0.5),
        ground=-0.86, pattern_angle=0.8, ear_length=0.9,
    ),
}  # fmt: skip


def draw_build(kind: str, rng: random.Random) -> Build:
    """Draw an individual's proportions around the plan of its species; for any other kind, around a random plan."""
    plan = _PLANS[kind] if kind in _PLANS else _free_plan(rng)
    vary = _Vary(rng)
    body, head = plan.body, plan.head
    wide, tall = vary.factor(0.1), vary.factor(0.1)
    shift = body[2] * (wide - 1)
    return dataclasses.replace(
        plan,
        body=(body[0], body[1], body[2] * wide, body[3] * tall, body[4] * vary.factor(0.12)),
        head=(
            head[0] + shift * (1 if head[0] > 0.1 else 0),
            head[1] + vary.shift(0.04),
            head[2] * vary.factor(0.1),
            head[3] * vary.factor(0.1),
            head[4] * vary.factor(0.08),
        ),
        taper=plan.taper + vary.shift(0.16),
        leg_width=plan.leg_width * vary.factor(0.2),
        leg_spread=plan.leg_spread * vary.factor(0.12),
        arms=plan.arms * vary.factor(0.2),
        arm_width=plan.arm_width * vary.factor(0.2),
        arm_angle=plan.arm_angle + vary.shift(0.5),
        tail=plan.tail * vary.factor(0.2),
        tail_width=plan.tail_width * vary.factor(0.2),
        tail_angle=plan.tail_angle + vary.shift(0.2),
        fork=plan.fork * vary.factor(0.15),
        fin=plan.fin * vary.factor(0.25),
        wing=plan.wing * vary.factor(0.15),
        beak=plan.beak * vary.factor(0.2),
        muzzle=plan.muzzle * vary.factor(0.2),
        shell=(plan.shell[0], plan.shell[1], plan.shell[2] * vary.factor(0.1)),
        ear_length=plan.ear_length * vary.factor(0.2),
        ear_width=plan.ear_width * vary.factor(0.2),
        ear_spread=plan.ear_spread * vary.factor(0.18),
        eye_size=plan.eye_size * vary.factor(0.13),
        pattern_period=plan.pattern_period * vary.factor(0.22),
        pattern_phase=rng.random(),
        pattern_angle=plan.pattern_angle + vary.shift(0.3),
    )


class _Vary:
    """Uniform random variation from one random stream."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def factor(self, amount: float) -> float:
        return uniform(self.rng, 1 - amount, 1 + amount)

    def shift(self, amount: float) -> float:
        return uniform(self.rng, -amount, amount)


def _free_plan(rng: random.Random) -> Build:
    """Draw a body plan that no species has: any trunk with any limbs, tail and face parts."""
    trunk = rng.random()
    limbs = int(rng.random() * 5)
    exponent = pick(rng, (2.0, 2.2, 3.0, 5.0))
    if trunk < 0.4:  # upright, with the face on the trunk
        body = (0.0, uniform(rng, -0.3, -0.1), uniform(rng, 0.38, 0.6), uniform(rng, 0.46, 0.62), exponent)
        head, apart = (0.0, body[1] + 0.18, body[2] * 0.85, body[3] - 0.18, 2.0), False
    elif trunk < 0.75:  # upright, with a separate head
        body = (0.0, uniform(rng, -0.48, -0.36), uniform(rng, 0.26, 0.56), uniform(rng, 0.3, 0.42), exponent)
        head = (
            uniform(rng, -0.06, 0.06),
            0.2,
            uniform(rng, 0.34, 0.58),
            uniform(rng, 0.3, 0.42),
            pick(rng, (2.0, 2.4, 3.0)),
        )
        apart = True
    else:  # horizontal, with the head in front
        body = (-0.16, uniform(rng, -0.4, -0.25), uniform(rng, 0.44, 0.6), uniform(rng, 0.26, 0.42), exponent)
        head, apart = (
            (
                uniform(rng, 0.3, 0.42),
                uniform(rng, 0.08, 0.3),
                uniform(rng, 0.3, 0.4),
                uniform(rng, 0.28, 0.36),
                2.0,
            ),
            True,
        )
    lying = trunk >= 0.75
    return Build(
        body=body,
        head=head,
        head_apart=apart,
        taper=uniform(rng, -0.5, 0.5),
        neck=0.18 if lying else 0.0,
        legs=(0, 2, 2, 4, 4)[limbs] if lying or limbs < 3 else 2,
        tentacles=4 if limbs == 0 and apart and not lying else 0,
        leg_width=uniform(rng, 0.06, 0.17),
        leg_spread=body[2] * uniform(rng, 0.5, 0.75),
        arms=0.0 if lying or rng.random() < 0.35 else uniform(rng, 0.24, 0.44),
        arm_width=uniform(rng, 0.06, 0.14),
        arm_angle=uniform(rng, -1.0, 1.0),
        tail=0.0 if rng.random() < 0.5 else uniform(rng, 0.3, 0.55),
        tail_width=uniform(rng, 0.04, 0.18),
        tail_angle=uniform(rng, 2.2, 3.2),
        fin=0.0 if rng.random() < 0.75 or not lying else uniform(rng, 0.2, 0.3),
        wing=0.0 if rng.random() < 0.75 or apart is False else uniform(rng, 0.2, 0.32),
        beak=0.0 if rng.random() < 0.75 else uniform(rng, 0.2, 0.32),
        muzzle=0.0 if rng.random() < 0.7 else uniform(rng, 0.14, 0.2),
        pattern_angle=pick(rng, (0.0, 0.8, 1.57)),
    )
