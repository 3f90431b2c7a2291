"""What `--gpus` means, in the words of today's Trainer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ldm.util import UsageError, UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Devices:
    """Where a run computes: an accelerator, its devices, and how many they are on one machine."""

    accelerator: str
    devices: int | list[int]

    @property
    def count(self) -> int:
        return self.devices if isinstance(self.devices, int) else len(self.devices)


def parse_gpus(gpus: Any) -> int | list[int] | None:
    """The meaning of Lightning 1.x: "0," and "0,1" and lists name devices, "2" is a count, -1 is all.

    None where nothing was asked for, 0 for no GPU.
    """
    if gpus is None or gpus == "":
        return None
    try:
        if isinstance(gpus, str):
            text = gpus.strip()
            if "," not in text and not text.startswith("["):
                return int(text)
            text = text.removeprefix("[").removesuffix("]")
            return [int(part) for part in text.split(",") if part.strip()]
        if isinstance(gpus, bool):
            return int(gpus)
        return gpus if isinstance(gpus, int) else [int(part) for part in gpus]
    except (TypeError, ValueError):
        raise UsageError(
            f'--gpus \'{gpus}\' is not understood; write "0," for GPU 0, "0,1" for two, "-1" for all'
        ) from None


def processes(trainer: Mapping[str, Any], devices: Devices | None = None) -> int:
    """How many processes `lightning.trainer` asks for: devices, its own or those chosen, times `num_nodes`.

    -1, which is all GPUs, may be several.
    """
    nodes = int(trainer.get("num_nodes") or 1)
    said = trainer.get("devices")
    if said is None or said == "auto":
        if devices is not None:
            return devices.count * nodes
        said = trainer.get("gpus")
    said = parse_gpus(said)
    count = len(said) if isinstance(said, list) else 2 if said == -1 else max(said or 1, 1)
    return count * nodes


def choose(gpus: Any, accelerator: Any = None) -> Devices:
    """The devices for a run; without CUDA one line says that the CPU is used, unless `accelerator` says so.

    Raises UserError for a GPU that this machine does not have.
    """
    wanted = parse_gpus(gpus)
    if str(accelerator).lower() == "cpu":
        return Devices("cpu", 1)
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there == 0:
        if wanted not in (None, 0):
            logger.info("no CUDA device here: training on the CPU")
        return Devices("cpu", 1)
    if wanted is None:
        return Devices("cuda", [0])
    if wanted == -1:
        return Devices("cuda", there)
    if wanted in (0, []):
        return Devices("cpu", 1)
    if isinstance(wanted, int):
        if not 0 < wanted <= there:
            raise UserError(f"--gpus {wanted} asks for {wanted} GPUs; this machine has {there}")
        return Devices("cuda", wanted)
    absent = [number for number in wanted if not 0 <= number < there]
    if absent:
        raise UserError(f"--gpus asks for GPU {absent[0]}; this machine has {there}, numbered from 0")
    return Devices("cuda", sorted(set(wanted)))
