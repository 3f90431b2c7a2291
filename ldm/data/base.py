"""The pictures of a personalization set as square tensors, read once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.images import ImageError, open_image
from ldm.util import UserError

logger = logging.getLogger(__name__)

RESAMPLING = {
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
SMALLEST_SIDE = 8
MEMORY = 2**29


class Draw(NamedTuple):
    """What one sample shows: the picture's number, whether it is mirrored, and the caption."""

    image: int
    flipped: bool
    caption: str


class Pictures:
    """Pictures read once, made square and resized, and kept while they fit into `memory` bytes.

    `pictures[i]` is [H, W, 3] uint8. Every file is read on construction, so that a bad one is an ImageError before
    any training; those beyond the memory limit are read again whenever they are asked for.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: int | None,
        interpolation: str = "bicubic",
        center_crop: bool = True,
        memory: int = MEMORY,
    ) -> None:
        if interpolation not in RESAMPLING:
            raise UserError(f"interpolation is {interpolation!r}: choose one of {', '.join(RESAMPLING)}")
        if size is not None and size < 1:
            raise UserError(
                f"size is {size}: it must be a number of pixels, or left out to keep the pictures' own"
            )
        self.paths = list(paths)
        self.size = size
        self.center_crop = center_crop
        self._resample = RESAMPLING[interpolation]
        self._kept: dict[int, Tensor] = {}
        for i, path in enumerate(self.paths):
            pixels = self._read(path)
            if pixels.numel() <= memory:
                memory -= pixels.numel()
                self._kept[i] = pixels
        if len(self._kept) < len(self.paths):
            logger.info("%d of %d pictures are kept in memory", len(self._kept), len(self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return self._kept[i] if i in self._kept else self._read(self.paths[i])

    def _read(self, path: Path) -> Tensor:
        image = open_image(path)
        side = min(image.size)
        if side < SMALLEST_SIDE:
            raise ImageError(
                f"image {path} is {image.width}x{image.height} pixels: {SMALLEST_SIDE} on a side are the least"
            )
        if self.center_crop:
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        if self.size is not None:
            image = image.resize((self.size, self.size), self._resample)
        return torch.from_numpy(np.array(image))
