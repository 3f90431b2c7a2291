"""Batches for the loops that are no run of ours: pictures that lie ready in memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import default_collate


def batches(dataset: Any, size: int, device: torch.device, distinct: int = 8) -> Iterator[dict[str, Any]]:
    """Batches {"image": [B, H, W, 3], "caption": [B]} of a dataset, over and over, `distinct` different ones.

    They are made before the first is asked for, so that loading and decoding counts against nobody.
    """
    made = [
        default_collate([dataset[(number * size + i) % len(dataset)] for i in range(size)])
        for number in range(distinct)
    ]
    return itertools.cycle([{**batch, "image": batch["image"].to(device)} for batch in made])
