"""The pictures of a personalization set as square tensors, read once."""

from __future__ import annotations

import logging
import math
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
    """What one sample shows: the picture's number, whether it is mirrored, the caption, and which of its squares."""

    image: int
    flipped: bool
    caption: str
    view: int = 0

    @property
    def variant(self) -> tuple[int, bool, int]:
        """What `variants()` and `image(...)` of a dataset know the pixels by."""
        return self.image, self.flipped, self.view


def squares(width: int, height: int, crops: int, zooms: Sequence[float]) -> list[tuple[int, int, int]]:
    """The different squares (left, top, side) of a picture, those of the first zoom first.

    A zoom of 1 is as large a square as there is, one of 2 half its side. Along each axis with room left there are
    `crops` places, evenly from end to end; one is the middle.
    """
    found = {}
    for zoom in zooms:
        side = round(min(width, height) / zoom)
        for top in _places(height - side, crops):
            for left in _places(width - side, crops):
                found[left, top, side] = None
    return list(found)


def _places(room: int, count: int) -> list[int]:
    return [room // 2] if count == 1 else [room * i // (count - 1) for i in range(count)]


class Pictures:
    """Pictures read once, made square and resized, and kept while they fit into `memory` bytes.

    `pictures[i, view]` is [H, W, 3] uint8, and `views(i)` how many `squares` there are of it; stretched pictures
    (`center_crop` false) have one. Every file is read on construction, so that a bad one is an ImageError before any
    training; those beyond the memory limit are read again whenever they are asked for.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: int | None,
        interpolation: str = "bicubic",
        center_crop: bool = True,
        crops: int = 1,
        zooms: Sequence[float] = (1.0,),
        memory: int = MEMORY,
    ) -> None:
        if interpolation not in RESAMPLING:
            raise UserError(f"interpolation is {interpolation!r}: choose one of {', '.join(RESAMPLING)}")
        if size is not None and size < 1:
            raise UserError(
                f"size is {size}: it must be a number of pixels, or left out to keep the pictures' own"
            )
        self.crops, self.zooms = _checked(crops, zooms, center_crop, size)
        self.paths = list(paths)
        self.size = size
        self.center_crop = center_crop
        self._resample = RESAMPLING[interpolation]
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._views: list[int] = []
        for i, path in enumerate(self.paths):
            image = self._open(path)
            boxes = self._boxes(image)
            self._views.append(len(boxes))
            for view, box in enumerate(boxes):
                pixels = self._cut(image, box)
                if pixels.numel() <= memory:
                    memory -= pixels.numel()
                    self._kept[i, view] = pixels
        if len(self._kept) < sum(self._views):
            logger.info("%d of %d pictures are kept in memory", len(self._kept), sum(self._views))

    def __len__(self) -> int:
        return len(self.paths)

    def views(self, i: int) -> int:
        return self._views[i]

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        if key in self._kept:
            return self._kept[key]
        i, view = key
        image = self._open(self.paths[i])
        return self._cut(image, self._boxes(image)[view])

    def _open(self, path: Path) -> Image.Image:
        image = open_image(path)
        if min(image.size) < SMALLEST_SIDE * max(self.zooms):
            zoomed = f" at zoom {max(self.zooms):g}" if max(self.zooms) > 1 else ""
            raise ImageError(
                f"image {path} is {image.width}x{image.height} pixels: {SMALLEST_SIDE} on a side are the least{zoomed}"
            )
        return image

    def _boxes(self, image: Image.Image) -> list[tuple[int, int, int, int]]:
        if not self.center_crop:
            return [(0, 0, image.width, image.height)]
        found = squares(image.width, image.height, self.crops, self.zooms)
        return [(left, top, left + side, top + side) for left, top, side in found]

    def _cut(self, image: Image.Image, box: tuple[int, int, int, int]) -> Tensor:
        image = image.crop(box)
        if self.size is not None:
            image = image.resize((self.size, self.size), self._resample)
        return torch.from_numpy(np.array(image))


def _checked(
    crops: object, zooms: object, center_crop: bool, size: int | None
) -> tuple[int, tuple[float, ...]]:
    if not isinstance(crops, int) or crops < 1:
        raise UserError(f"crops is {crops!r}: it must be a whole number from 1 on")
    listed = list(zooms) if isinstance(zooms, Sequence) and not isinstance(zooms, str) else []
    if not listed or not all(isinstance(z, int | float) and math.isfinite(z) and z >= 1 for z in listed):
        raise UserError(f"zooms is {zooms!r}: it must be a list of numbers from 1 on, as [1, 1.25]")
    if not center_crop and (crops > 1 or listed != [1]):
        raise UserError(
            "crops and zooms are of squares, and center_crop: false stretches; leave one of them out"
        )
    if size is None and listed != [1]:
        raise UserError(
            f"zooms is {listed} without a size: set size, so that all squares become equally large"
        )
    return crops, tuple(float(z) for z in listed)
