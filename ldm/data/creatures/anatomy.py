"""The shapes of a creature in a pose: tapered bones and superellipses, sorted into layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum

from ldm.data.creatures.world import Creature, Scene

Bone = tuple[float, float, float, float, float, float]  # x0, y0, x1, y1, radius at each end
Blob = tuple[float, float, float, float, float, float]  # x, y, half width, half height, exponent, taper


class Layer(IntEnum):
    """Layers in drawing order, the last on top; the number is also the material of the layer's pixels."""

    BACK = 1
    HORN = 2
    BODY = 3
    SHELL = 4
    WING = 5
    HEAD = 6
    EAR = 7
    MUZZLE = 8
    BEAK = 9
    EYE = 10
    PUPIL = 11


@dataclass
class Parts:
    """The shapes of one image, in the creature's coordinates."""

    bones: dict[Layer, list[Bone]] = field(default_factory=dict)
    blobs: dict[Layer, Blob] = field(default_factory=dict)

    def bone(self, layer: Layer, *values: float) -> None:
        """Add a tapered bone to a layer."""
        self.bones.setdefault(layer, []).append(values)  # type: ignore[arg-type]


def parts_of(creature: Creature, scene: Scene) -> Parts:
    """Return every shape of `creature` in the pose of `scene`."""
    build, parts = creature.build, Parts()
    parts.blobs[Layer.BODY] = (*build.body, build.taper)
    if build.head_apart:
        parts.blobs[Layer.HEAD] = (*build.head, 0.0)
    if build.shell[2]:
        x, y, radius = build.shell
        parts.blobs[Layer.SHELL] = (x, y, radius, radius, 2.0, 0.0)
    _limbs(creature, scene, parts)
    _tail_and_fins(creature, scene, parts)
    _ears(creature, parts)
    _face(creature, scene, parts)
    return parts


def _limbs(creature: Creature, scene: Scene, parts: Parts) -> None:
    build = creature.build
    x, y, width, height, _ = build.body
    hip, foot = y - 0.3 * height, build.ground + build.leg_width
    step = 0.07 * scene.swing
    for side in (-1, 1) if build.legs else ():
        thigh = x + side * build.leg_spread
        parts.bone(
            Layer.BODY,
            thigh,
            hip,
            thigh + side * step + 0.02 * side,
            foot,
            build.leg_width * 0.9,
            build.leg_width,
        )
        if build.legs == 4:
            far = thigh - side * 0.02 + 0.16
            parts.bone(
                Layer.BACK, far, hip, far - side * step, foot + 0.03, build.leg_width * 0.9, build.leg_width
            )
    for k in range(build.tentacles):
        across = 2 * k / (build.tentacles - 1) - 1
        start = x + across * build.leg_spread * 0.8
        bend = start + across * 0.16 + 0.05 * scene.swing * (-1) ** k
        knee, tip = y - 0.85 * height - 0.12, build.ground + 0.06 + 0.08 * abs(across)
        layer = Layer.BODY if k % 2 == 0 else Layer.BACK
        parts.bone(layer, start, y - 0.5 * height, bend, knee, build.leg_width * 1.1, build.leg_width)
        parts.bone(
            layer, bend, knee, bend + across * 0.14 + 0.07, tip, build.leg_width, build.leg_width * 0.6
        )
    if build.arms:
        angle = build.arm_angle + 0.3 * scene.swing
        for side in (-1, 1):
            shoulder_x, shoulder_y = x + side * 0.82 * width, y + 0.4 * height
            reach_x, reach_y = side * build.arms * math.cos(angle), build.arms * math.sin(angle)
            parts.bone(
                Layer.BACK,
                shoulder_x,
                shoulder_y,
                shoulder_x + reach_x,
                shoulder_y + reach_y,
                build.arm_width,
                build.arm_width,
            )
    if build.neck:
        head_x, head_y, *_ = build.head
        base = x + (0.6 * width if head_x > 0.15 else 0.0)
        parts.bone(Layer.BODY, base, y + 0.2 * height, head_x, head_y, build.neck * 1.15, build.neck)


def _tail_and_fins(creature: Creature, scene: Scene, parts: Parts) -> None:
    build = creature.build
    x, y, width, height, _ = build.body
    rear = x - 0.88 * width
    if build.fork:
        for side in (-1, 1):
            reach = build.fork * (1 + 0.15 * side * scene.swing)
            parts.bone(Layer.BACK, rear, y, rear - 0.62 * reach, y + side * reach, 0.07, 0.13)
    elif build.tail:
        angle = build.tail_angle - 0.15 * scene.swing
        tip_x, tip_y = rear + build.tail * math.cos(angle), y + 0.1 * height + build.tail * math.sin(angle)
        parts.bone(
            Layer.BACK, rear, y + 0.1 * height, tip_x, tip_y, min(0.1, build.tail_width), build.tail_width
        )
    if build.fin:
        parts.bone(Layer.BACK, x, y + 0.75 * height, x - 0.16, y + height + build.fin, 0.22, 0.03)
        parts.bone(Layer.BACK, x, y - 0.75 * height, x - 0.16, y - height - 0.7 * build.fin, 0.17, 0.03)
    if build.wing:
        flap = 0.12 * scene.swing
        parts.bone(
            Layer.WING,
            x + 0.1 * width,
            y + 0.06,
            x + 0.1 * width - 1.25 * build.wing,
            y + 0.02 + flap,
            build.wing * 0.55,
            0.05,
        )


def _ears(creature: Creature, parts: Parts) -> None:
    build, kind = creature.build, creature.ears
    x, y, width, height, exponent = build.head
    unit = min(0.42, min(width, height) * 1.12)
    long, wide, spread = build.ear_length * unit, build.ear_width * unit, build.ear_spread

    for side in (-1, 1):

        def at(angle: float, depth: float, side: int = side) -> tuple[float, float]:
            """Return the point at `angle` from the top of the head; `depth` 1 is on the outline, 0 the centre."""
            across, up = math.sin(angle), math.cos(angle)
            edge = (abs(across) ** exponent + abs(up) ** exponent) ** (-1 / exponent)
            return x + side * width * across * edge * depth, y + height * up * edge * depth

        if kind == "round":
            ear_x, ear_y = at(0.78 * spread, 1.12)
            parts.bone(Layer.BACK, ear_x, ear_y, ear_x, ear_y + 0.01, 0.42 * wide, 0.42 * wide)
        elif kind == "pointed":
            root_x, root_y = at(0.62 * spread, 0.75)
            parts.bone(
                Layer.BACK,
                root_x,
                root_y,
                root_x + side * 0.3 * long,
                root_y + 1.05 * long,
                0.38 * wide,
                0.02,
            )
        elif kind == "long":
            root_x, root_y = at(0.42 * spread, 0.8)
            parts.bone(
                Layer.BACK,
                root_x,
                root_y,
                root_x + side * 0.22 * spread * long,
                root_y + 1.35 * long,
                0.17 * wide,
                0.2 * wide,
            )
        elif kind == "floppy":
            root_x, root_y = at(0.72 * spread, 0.92)
            drop = root_y - 1.05 * long
            parts.bone(Layer.EAR, root_x, root_y, x + side * (width + 0.18), drop, 0.13 * wide, 0.27 * wide)
        elif kind == "horns":
            root_x, root_y = at(0.6 * spread, 0.85)
            bend_x, bend_y = root_x + side * 0.42 * long, root_y + 0.42 * long
            parts.bone(Layer.HORN, root_x, root_y, bend_x, bend_y, 0.2 * wide, 0.16 * wide)
            parts.bone(
                Layer.HORN, bend_x, bend_y, bend_x + side * 0.04, bend_y + 0.55 * long, 0.16 * wide, 0.03
            )


def _face(creature: Creature, scene: Scene, parts: Parts) -> None:
    build = creature.build
    x, y, width, height, _ = build.head
    unit = min(0.4, max(0.33, min(width, height))) * build.eye_size
    if build.muzzle:
        left = x + (0.12 if x > 0.15 else -0.06)
        low = y - 0.6 * height
        parts.bone(Layer.MUZZLE, left, low, left + 0.12, low, build.muzzle * 0.8, build.muzzle * 0.8)
    if build.beak:
        parts.bone(
            Layer.BEAK,
            x + 0.8 * width,
            y - 0.2 * height,
            x + 0.8 * width + build.beak,
            y - 0.3 * height,
            0.15,
            0.02,
        )
    up = y + (0.14 * height if build.muzzle else 0.04)
    gap, low, size = 0.47 * unit, up - 0.14 * unit, {1: 0.52, 2: 0.37, 3: 0.32}[creature.eyes] * unit
    places = {
        1: [(x, up)],
        2: [(x - gap, up), (x + gap, up)],
        3: [(x - gap, low), (x + gap, low), (x, low + 0.72 * unit)],
    }[creature.eyes]
    for eye_x, eye_y in places:
        parts.bone(Layer.EYE, eye_x, eye_y, eye_x, eye_y + 0.001, size, size)
        look_x, look_y = eye_x + (0.12 + 0.28 * scene.gaze[0]) * size, eye_y + 0.28 * scene.gaze[1] * size
        parts.bone(Layer.PUPIL, look_x, look_y, look_x, look_y + 0.001, 0.52 * size, 0.52 * size)
