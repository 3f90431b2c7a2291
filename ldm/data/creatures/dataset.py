"""Captioned pictures of creatures for training: painted once, kept in a file, told anew each time."""

from __future__ import annotations

import logging
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.base import Draw
from ldm.data.creatures.captions import Names, caption, foil
from ldm.data.creatures.individuals import NAMES, individual, individual_of
from ldm.data.creatures.renderer import render, world_version
from ldm.data.creatures.world import ATTRIBUTES, SPLITS, Creature, creature, scene
from ldm.util import UserError

logger = logging.getLogger(__name__)

_CHUNK = 512


class Creatures(Dataset):
    """`count` pictures of a split as {"image": float32 [size, size, 3] in [-1, 1], "caption": str}.

    `cache` is a folder for the painted pictures (made once, shared by all smaller counts); None keeps them in memory.
    Indices run on beyond the length: sample `n * len + i` of the training split is picture i with its n-th caption,
    another true one each epoch; of any other split the caption is always the same.
    `attributes=True` adds "attributes", int64 [8], indices into `ATTRIBUTES`; `foils=True` adds "foil", the caption
    with one attribute told wrongly. `named` is the share of pictures that show one of the individuals with a name.
    """

    def __init__(
        self,
        size: int,
        count: int,
        split: str = "train",
        cache: str | os.PathLike[str] | None = None,
        captions: bool = True,
        attributes: bool = False,
        foils: bool = False,
        named: float = 0.0,
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"split {split!r} is unknown: choose one of {', '.join(SPLITS)}")
        if size not in (32, 64, 128):
            raise UserError(f"size {size} is not one the creatures are drawn at: choose 32, 64 or 128")
        if not 0 < count <= len(SPLITS[split]):
            raise UserError(f"count {count} does not fit split {split!r}: choose 1 to {len(SPLITS[split])}")
        if not 0 <= named <= 1:
            raise UserError(f"named is {named}: a share lies between 0 and 1")
        self.size, self.count, self.split, self.named = size, count, split, named
        self._with_captions, self._with_attributes, self._with_foils = captions, attributes, foils
        folder = Path(cache) if cache is not None else None
        self.pictures, self.labels = _painted(size, count, split, named, folder)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, object]]:
        return (self[index] for index in range(self.count))

    def draw(self, index: int) -> Draw:
        """What the sample at `index` shows and tells; `index` may run on for ever."""
        picture, stream = self._telling(index)
        return Draw(picture, False, caption(self.names(picture), random.Random(stream)))

    def _telling(self, index: int) -> tuple[int, str]:
        """The picture at `index` and the random stream by which it is told."""
        if index < 0:
            raise IndexError(f"sample {index}")
        picture, telling = index % self.count, index // self.count if self.split == "train" else 0
        return picture, f"caption {picture} {telling}"

    def image(self, picture: int, flipped: bool = False, view: int = 0) -> Tensor:
        """A picture [H, W, 3] in [-1, 1]; there is one view of each."""
        image = torch.from_numpy(self.pictures[picture].astype(np.float32)).div_(127.5).sub_(1)
        return image.flip(1) if flipped else image

    def variants(self) -> list[tuple[int, bool, int]]:
        """Every (picture, mirrored, view) that can be drawn: what a cache of latents has to hold."""
        return [(picture, False, 0) for picture in range(self.count)]

    def __getitem__(self, index: int) -> dict[str, object]:
        drawn = self.draw(index)
        item: dict[str, object] = {"image": self.image(drawn.image)}
        if self._with_captions:
            item["caption"] = drawn.caption
        if self._with_foils:
            item["foil"] = foil(self.names(drawn.image), self._telling(index)[1])
        if self._with_attributes:
            item["attributes"] = torch.from_numpy(self.labels[drawn.image].astype(np.int64))
        return item

    def names(self, index: int) -> Names:
        """What words can tell of the picture at `index`."""
        row = self.labels[index]
        who = individual_of(SPLITS[self.split][index], self.named)
        told = (values[int(k)] for values, k in zip(ATTRIBUTES.values(), row, strict=True))
        return Names(*told, name=None if who is None else NAMES[who])


def _painted(
    size: int, count: int, split: str, named: float, folder: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [>= count, size, size, 3] and labels uint8 [>= count, 8], from the cache if it has enough."""
    if folder is None:
        pictures, labels = (
            np.empty((count, size, size, 3), np.uint8),
            np.empty((count, len(ATTRIBUTES)), np.uint8),
        )
        _paint(pictures, labels, size, split, named)
        return pictures, labels
    stem = f"{split}-{size}-v{world_version(size)}" + (f"-named{100 * named:g}" if named else "")
    enough = [
        (int(found[1]), path)
        for path in folder.glob(f"{stem}-*.npy")
        if (found := re.fullmatch(rf"{stem}-(\d+)", path.stem)) and int(found[1]) >= count
    ]
    if enough:
        path = min(enough)[1]
    else:
        path = folder / f"{stem}-{count}.npy"
        _paint_to_file(path, size, count, split, named)
    return np.load(path, mmap_mode="r"), np.load(_label_path(path), mmap_mode="r")


def _label_path(pictures: Path) -> Path:
    return pictures.with_suffix(".labels.npy")


def _paint_to_file(path: Path, size: int, count: int, split: str, named: float) -> None:
    """Paints into temporary files beside `path`, renamed when whole: the labels first, the pictures announce them."""
    logger.info("painting %d pictures of %dx%d into %s", count, size, size, path)
    labels = np.empty((count, len(ATTRIBUTES)), np.uint8)
    parts = [target.with_suffix(f".{os.getpid()}.part") for target in (path, _label_path(path))]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures = open_memmap(parts[0], mode="w+", dtype=np.uint8, shape=(count, size, size, 3))
        _paint(pictures, labels, size, split, named)
        pictures.flush()
        with parts[1].open("wb") as file:
            np.save(file, labels)
        os.replace(parts[1], _label_path(path))
        os.replace(parts[0], path)
    except OSError as error:
        raise UserError(f"cannot write the painted pictures to {path}: {error.strerror}") from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _paint(pictures: np.ndarray, labels: np.ndarray, size: int, split: str, named: float) -> None:
    count = len(pictures)
    for start in range(0, count, _CHUNK):
        seeds = [SPLITS[split][i] for i in range(start, min(start + _CHUNK, count))]
        creatures = [_shown(seed, named) for seed in seeds]
        scenes = [scene(seed, c.color) for seed, c in zip(seeds, creatures, strict=True)]
        chunk = slice(start, start + len(creatures))
        pictures[chunk] = render(creatures, scenes, size).permute(0, 2, 3, 1).numpy()
        labels[chunk] = [label(Names.of(c, s)) for c, s in zip(creatures, scenes, strict=True)]
        if start // _CHUNK % 40 == 39:
            logger.info("painted %d of %d", start + len(creatures), count)


def _shown(seed: int, named: float) -> Creature:
    who = individual_of(seed, named)
    return creature(seed) if who is None else individual(who)


def label(names: Names) -> list[int]:
    """The indices of a picture's names in `ATTRIBUTES`, in its order."""
    return [values.index(getattr(names, key)) for key, values in ATTRIBUTES.items()]
