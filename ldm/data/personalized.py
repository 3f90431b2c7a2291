"""The dataset of textual inversion: a few images of a concept, each time under another caption."""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm import prompts
from ldm.data.captions import Captions, ConceptImage
from ldm.images import ImageError, list_images, open_image
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


class Sample(NamedTuple):
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


class ImageSet:
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


class PersonalizedBase(Dataset):
    """Pictures of an object, with captions made from templates; the parameters are the original's and a few more.

    A sample is {"image": float32 [H, W, 3] in [-1, 1], "caption": str}. All pictures are read on construction;
    mistakes in the parameters, the folder or a file are UserErrors.

    data_root: the folder of one concept; or `placeholder: folder` pairs for several in one run, which then go
        before `placeholder_token`. Every picture comes equally often.
    size: side of the square; smaller pictures are enlarged. None keeps the pictures' own size.
    repeats: how often a picture comes in an epoch of `set: train`; in any other set it comes once.
    center_crop: square by centre crop; `false` stretches. (The original stretched unless told otherwise.)
    flip_p: probability of mirroring.
    per_image_tokens, mixing_prob: with that probability the caption is a dual template, with the picture's own word
        from `PER_IMAGE_TOKENS`; at most 22 pictures.
    coarse_class_text: words before the placeholder ("cat *"); or `placeholder: words` pairs.
    template_file: lines to use instead of the built-in ones (`ldm.prompts.fill` has the syntax). Lines with a
        second slot are the dual templates; without any, " with [image]" is added to the others.
    use_captions: the `.txt` beside a picture is its only caption. `[name]` and `{}` in it are the placeholder; where
        it has neither these nor the placeholder itself, "placeholder, " goes before it. Pictures without a `.txt`
        use the templates.
    seed: None takes torch's.
    crops, zooms: more squares of each picture, drawn equally often: `crops` places along each side with room left,
        and for each zoom z squares of 1/z of the side (Custom Diffusion, Kumari et al. 2023, found likeness to gain
        by pictures shown in several sizes).
    """

    template_lines: tuple[str, ...] = prompts.OBJECT_TEMPLATES
    dual_template_lines: tuple[str, ...] = prompts.OBJECT_DUAL_TEMPLATES

    def __init__(
        self,
        data_root: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
        size: int | None = None,
        repeats: int = 100,
        interpolation: str = "bicubic",
        flip_p: float = 0.5,
        set: str = "train",
        placeholder_token: str = "*",
        per_image_tokens: bool = False,
        center_crop: bool = True,
        mixing_prob: float = 0.25,
        coarse_class_text: str | Mapping[str, str] | None = None,
        template_file: str | os.PathLike[str] | None = None,
        use_captions: bool = False,
        seed: int | None = None,
        crops: int = 1,
        zooms: Sequence[float] = (1.0,),
    ) -> None:
        for name, value in (("flip_p", flip_p), ("mixing_prob", mixing_prob)):
            if not 0 <= value <= 1:
                raise UserError(f"{name} is {value}: a probability lies between 0 and 1")
        if repeats < 1:
            raise UserError(f"repeats is {repeats}: it must be at least 1")
        self.flip_p, self.mixing_prob, self.per_image_tokens = flip_p, mixing_prob, per_image_tokens
        self.seed = torch.initial_seed() if seed is None else seed
        self.epoch = 0

        folders = _folders(data_root, placeholder_token)
        self.placeholders = list(folders)
        pictures = [
            ConceptImage(path, word, _spoken(word, coarse_class_text, self.placeholders))
            for word, folder in folders.items()
            for path in list_images(folder)
        ]
        self.num_images = len(pictures)
        self._length = self.num_images * (repeats if set == "train" else 1)
        self._captions = Captions(
            pictures,
            self.template_lines,
            self.dual_template_lines,
            template_file,
            per_image_tokens,
            use_captions,
        )
        self.templates, self.dual_templates = self._captions.templates, self._captions.dual_templates
        self.check_placeholder()
        self.image_paths = [picture.path for picture in pictures]
        self._pictures = ImageSet(self.image_paths, size, interpolation, center_crop, crops, zooms)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        drawn = self.draw(index)
        return {"image": self.image(*drawn.variant), "caption": drawn.caption}

    def __iter__(self) -> Iterator[dict[str, Tensor | str]]:
        # Indices have no end (see draw), so the length must end a loop over the dataset.
        return (self[index] for index in range(len(self)))

    def set_epoch(self, epoch: int) -> None:
        """Makes the indices of this epoch draw anew."""
        self.epoch = epoch

    def draw(self, index: int) -> Sample:
        """What the sample at `index` shows.

        Indices may run on beyond the length: `draw(n * len + i)` in epoch 0 is `draw(i)` in epoch n.
        """
        # Only random() is promised to be the same in every version of Python, so nothing else is used.
        rng = random.Random(f"{self.seed}/{self.epoch * len(self) + index}")
        image = index % self.num_images
        flipped = rng.random() < self.flip_p
        mixed = self.per_image_tokens and rng.random() < self.mixing_prob
        lines = self.dual_templates if mixed else self.templates
        caption = self._captions.of(image, lines[int(rng.random() * len(lines))])
        # The last to be drawn: what runs drew before there were views stays the same.
        return Sample(image, flipped, caption, int(rng.random() * self._pictures.views(image)))

    def image(self, image: int, flipped: bool = False, view: int = 0) -> Tensor:
        """The pixels of a picture's square: float32 [H, W, 3] in [-1, 1]."""
        pixels = self._pictures[image, view]
        return (pixels.flip(1) if flipped else pixels).float().div_(127.5).sub_(1)

    def variants(self) -> list[tuple[int, bool, int]]:
        """Every (picture, mirrored, square) that can be drawn: what a cache of latents has to hold."""
        ways = [way for way, wanted in ((False, self.flip_p < 1), (True, self.flip_p > 0)) if wanted]
        return [
            (image, way, view)
            for image in range(self.num_images)
            for view in range(self._pictures.views(image))
            for way in ways
        ]

    def captions(self) -> list[str]:
        """Every caption that can be drawn, once."""
        return self._captions.all()

    def captions_without_placeholder(self, placeholders: Iterable[str] | None = None) -> list[str]:
        """The captions that would train nothing: they hold none of the placeholders (default: its own)."""
        return self._captions.without(self.placeholders if placeholders is None else placeholders)

    def check_placeholder(self, placeholders: Iterable[str] | None = None) -> None:
        """Raises UserError when one of the placeholders (default: its own) is in no caption at all."""
        self._captions.check(self.placeholders if placeholders is None else placeholders)


def _folders(data_root: object, placeholder: str) -> dict[str, Path]:
    """Placeholder -> folder, from one folder or from pairs."""
    pairs = data_root if isinstance(data_root, Mapping) else {placeholder: data_root}
    if not pairs:
        raise UserError("data_root is empty: name a folder of images, or placeholder: folder pairs")
    for word, folder in pairs.items():
        if not isinstance(folder, str | os.PathLike) or not str(folder):
            raise UserError(f"data_root is {folder!r}: name a folder of images, or placeholder: folder pairs")
        if not isinstance(word, str) or not word.strip():
            raise UserError(f"the placeholder of {folder} is {word!r}: it must be a word")
    return {word: Path(folder).expanduser() for word, folder in pairs.items()}


def _spoken(placeholder: str, coarse: str | Mapping[str, str] | None, placeholders: list[str]) -> str:
    """The placeholder as captions say it: after its class, if it has one."""
    if isinstance(coarse, Mapping):
        unknown = [word for word in coarse if word not in placeholders]
        if unknown:
            raise UserError(f"coarse_class_text names {unknown[0]!r}, which is none of {placeholders}")
        coarse = coarse.get(placeholder)
    return f"{coarse} {placeholder}" if coarse else placeholder


# The names under which other code imports the lists.
imagenet_templates_small = prompts.OBJECT_TEMPLATES
imagenet_dual_templates_small = prompts.OBJECT_DUAL_TEMPLATES
per_img_token_list = prompts.PER_IMAGE_TOKENS
