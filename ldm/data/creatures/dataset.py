"""A dataset of captioned creature images: rendered once and cached in a file, with new captions in each epoch."""

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

from ldm.data.creatures.captions import Description, caption, foil
from ldm.data.creatures.renderer import render, world_version
from ldm.data.creatures.world import (
    ATTRIBUTES,
    NAMES,
    SPLITS,
    Creature,
    creature,
    individual,
    individual_of,
    scene,
)
from ldm.data.personalized import Sample
from ldm.util import UserError

logger = logging.getLogger(__name__)

_CHUNK = 512


class Creatures(Dataset[dict[str, object]]):
    """`count` images of a split, as {"image": float32 [size, size, 3] in [-1, 1], "caption": str}.

    Indices have no upper limit: index `n * len + i` of the training split is image i with its n-th caption, so that
    each epoch has other captions. In all other splits the caption of an image is always the same.

    cache: folder for the rendered images, which datasets of smaller counts also use; None keeps them in memory.
    captions: include "caption".
    attributes: include "attributes", int64 [8], indices into the values of `ATTRIBUTES`.
    foils: include "foil", the caption with one wrong attribute.
    named: share of images that show one of the individuals with a name.
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
            raise UserError(f"size {size} cannot be rendered: choose 32, 64 or 128")
        if not 0 < count <= len(SPLITS[split]):
            raise UserError(f"count {count} does not fit split {split!r}: choose 1 to {len(SPLITS[split])}")
        if not 0 <= named <= 1:
            raise UserError(f"named is {named}: choose a share between 0 and 1")
        self.size, self.count, self.split, self.named = size, count, split, named
        self._with_captions, self._with_attributes, self._with_foils = captions, attributes, foils
        folder = Path(cache) if cache is not None else None
        self.images, self.labels = _load_or_render(size, count, split, named, folder)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, object]:
        sample = self.draw(index)
        item: dict[str, object] = {"image": self.image(sample.image)}
        if self._with_captions:
            item["caption"] = sample.caption
        if self._with_foils:
            item["foil"] = foil(self.description(sample.image), self._caption_seed(index))
        if self._with_attributes:
            item["attributes"] = torch.from_numpy(self.labels[sample.image].astype(np.int64))
        return item

    def __iter__(self) -> Iterator[dict[str, object]]:
        return (self[index] for index in range(self.count))

    def draw(self, index: int) -> Sample:
        """Return the image number and caption of the sample at `index`."""
        number = index % self.count
        return Sample(
            number, False, caption(self.description(number), random.Random(self._caption_seed(index)))
        )

    def image(self, image: int, flipped: bool = False, view: int = 0) -> Tensor:
        """Return the pixels of an image, float32 [H, W, 3] in [-1, 1]; each image has one view."""
        pixels = torch.from_numpy(self.images[image].astype(np.float32)).div_(127.5).sub_(1)
        return pixels.flip(1) if flipped else pixels

    def variants(self) -> list[tuple[int, bool, int]]:
        """Return every (image, flipped, view) that can be drawn, as a latent cache needs them."""
        return [(number, False, 0) for number in range(self.count)]

    def description(self, index: int) -> Description:
        """Return what captions can say about the image at `index`."""
        row = self.labels[index]
        number = individual_of(SPLITS[self.split][index], self.named)
        values = {name: choices[int(k)] for (name, choices), k in zip(ATTRIBUTES.items(), row, strict=True)}
        return Description(**values, name=None if number is None else NAMES[number])

    def _caption_seed(self, index: int) -> str:
        """The seed of the random stream from which the caption at `index` is drawn."""
        if index < 0:
            raise IndexError(f"sample {index}")
        epoch = index // self.count if self.split == "train" else 0
        return f"caption {index % self.count} {epoch}"


def _load_or_render(
    size: int, count: int, split: str, named: float, folder: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [>= count, size, size, 3] and labels uint8 [>= count, 8], from the cache if possible."""
    if folder is None:
        images = np.empty((count, size, size, 3), np.uint8)
        labels = np.empty((count, len(ATTRIBUTES)), np.uint8)
        _render_into(images, labels, size, split, named)
        return images, labels
    stem = f"{split}-{size}-v{world_version(size)}" + (f"-named{100 * named:g}" if named else "")
    large_enough = [
        (int(match[1]), path)
        for path in folder.glob(f"{stem}-*.npy")
        if (match := re.fullmatch(rf"{stem}-(\d+)", path.stem)) and int(match[1]) >= count
    ]
    if large_enough:
        path = min(large_enough)[1]
    else:
        path = folder / f"{stem}-{count}.npy"
        _render_to_file(path, size, count, split, named)
    return np.load(path, mmap_mode="r"), np.load(_label_path(path), mmap_mode="r")


def _label_path(images: Path) -> Path:
    return images.with_suffix(".labels.npy")


def _render_to_file(path: Path, size: int, count: int, split: str, named: float) -> None:
    """Render into temporary files beside `path`, and rename them when complete.

    The images are renamed last: where they exist, their labels exist too.
    """
    logger.info("rendering %d images of %dx%d into %s", count, size, size, path)
    labels = np.empty((count, len(ATTRIBUTES)), np.uint8)
    parts = [target.with_suffix(f".{os.getpid()}.part") for target in (path, _label_path(path))]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        images = open_memmap(parts[0], mode="w+", dtype=np.uint8, shape=(count, size, size, 3))
        _render_into(images, labels, size, split, named)
        images.flush()
        with parts[1].open("wb") as file:
            np.save(file, labels)
        os.replace(parts[1], _label_path(path))
        os.replace(parts[0], path)
    except OSError as error:
        raise UserError(f"cannot write the rendered images to {path}: {error.strerror}") from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _render_into(images: np.ndarray, labels: np.ndarray, size: int, split: str, named: float) -> None:
    """Fill `images` [N, size, size, 3] and `labels` [N, 8] with the first N images of a split."""
    count = len(images)
    for start in range(0, count, _CHUNK):
        seeds = [SPLITS[split][i] for i in range(start, min(start + _CHUNK, count))]
        creatures = [_creature_of(seed, named) for seed in seeds]
        scenes = [scene(seed, c.color) for seed, c in zip(seeds, creatures, strict=True)]
        chunk = slice(start, start + len(creatures))
        images[chunk] = render(creatures, scenes, size).permute(0, 2, 3, 1).numpy()
        labels[chunk] = [label(Description.of(c, s)) for c, s in zip(creatures, scenes, strict=True)]
        if start // _CHUNK % 40 == 39:
            logger.info("rendered %d of %d", start + len(creatures), count)


def _creature_of(seed: int, named: float) -> Creature:
    """The individual that the image of a seed shows, or else the creature of the seed."""
    number = individual_of(seed, named)
    return creature(seed) if number is None else individual(number)


def label(description: Description) -> list[int]:
    """Return the index of each attribute's value, in the order of `ATTRIBUTES`."""
    return [values.index(getattr(description, key)) for key, values in ATTRIBUTES.items()]
