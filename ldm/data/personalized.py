"""The dataset of textual inversion: some images of a concept, with a random caption for each sample."""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm import prompts
from ldm.data.captions import Captions, ConceptImage, phrase
from ldm.images import (
    Box,
    boxes_of,
    check_sides,
    count_masked,
    list_images,
    mask_files,
    mask_of,
    mask_outside,
    no_masks,
    open_image,
)
from ldm.util import UserError, check_integer, check_together, check_value, counted, shown
from ldm.words import check_word

logger = logging.getLogger(__name__)

RESAMPLING = {
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# The bytes of pixels that are kept in memory.
MEMORY = 2**29


class Sample(NamedTuple):
    """The content of a sample: the number of its image, whether it is flipped, its caption, and its view.

    The views of an image are the `squares` that can be cropped from it.
    """

    image: int
    flipped: bool
    caption: str
    view: int = 0

    @property
    def variant(self) -> tuple[int, bool, int]:
        """The arguments (image, flipped, view) of a dataset's `image`, as `variants()` lists them."""
        return self.image, self.flipped, self.view


class PersonalizedBase(Dataset[dict[str, Tensor | str]]):
    """Images of a concept, with captions made from templates.

    A sample is {"image": float32 [H, W, 3] in [-1, 1], "caption": str, "sizes": int64 [6], see `sizes`}. All images are
    read on construction. Raises UserError for invalid parameters, folders and files. The parameters up to
    `coarse_class_text` are the original's.

    data_root: the folder with the images of one concept; or pairs `placeholder: folder` for several concepts in one
        run, which replace `placeholder_token`. All images are drawn equally often.
    size: side of the square images in pixels; smaller images are enlarged. None keeps the size of each image.
    repeats: how often an epoch of `set: train` has each image; other sets have it once.
    interpolation: linear, bilinear, bicubic or lanczos.
    flip_p: probability of flipping an image horizontally.
    center_crop: crop the central square; `false` stretches the image. (The original's default was to stretch.)
    per_image_tokens, mixing_prob: with probability `mixing_prob` the caption is a dual template, which also has the
        image's own word from `PER_IMAGE_TOKENS`. At most 22 images.
    coarse_class_text: words before the placeholder ("cat *"); or pairs `placeholder: words`.
    template_file: a file with templates that replace the built-in ones, in the syntax of `ldm.prompts.fill`. Lines
        with a second slot are the dual templates; if there are none, " with [image]" is added to the others.
    use_captions: an image with a `.txt` or `.caption` beside it has its text as the only caption. `[name]` and `{}`
        in it stand for the placeholder; if it has neither these nor the placeholder, "placeholder, " is put before
        it. Images without such a file use the templates; at least one must have one.
    seed: seed of all random draws; None uses torch's initial seed.
    crops, zooms: crop several squares from each image, drawn equally often: for each zoom z, squares of 1/z of the
        largest side, at `crops` positions along each axis. Custom Diffusion (Kumari et al. 2023) reports that
        several sizes improve the likeness.
    mask_weight: use the masks of the images, and weight the loss of what they leave out by this number: 0 ignores it,
        0.1 is OneTrainer's default. A mask is a file beside the image, `NAME-masklabel.png` or `NAME_mask.png`, in
        which white marks what is learned; or else the image's alpha channel. A sample then also has "loss_weight",
        float32 [H, W]. At least one image must have a mask; those without one count as a whole. Crops that show
        nothing of the mask are not drawn. None ignores masks.
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
        set: Literal["train", "val", "valid", "validation", "eval", "test"] = "train",
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
        mask_weight: float | None = None,
    ) -> None:
        check_value("mask_weight", mask_weight, "mask_weight", float | None)
        for name, value in (("flip_p", flip_p), ("mixing_prob", mixing_prob)):
            if not 0 <= value <= 1:
                raise UserError(f"{name} is {value}: choose a probability between 0 and 1")
        check_integer(repeats, "repeats")
        self.flip_p, self.mixing_prob, self.per_image_tokens = flip_p, mixing_prob, per_image_tokens
        self.seed = torch.initial_seed() if seed is None else seed
        self.epoch = 0

        folders = _folders(data_root, placeholder_token)
        self.placeholders = list(folders)
        images = [
            ConceptImage(path, word, phrase(word, coarse_class_text, self.placeholders))
            for word, folder in folders.items()
            for path in list_images(folder)
        ]
        self.num_images = len(images)
        self._length = self.num_images * (repeats if set == "train" else 1)
        self._captions = Captions(
            images,
            self.template_lines,
            self.dual_template_lines,
            template_file,
            per_image_tokens,
            use_captions,
        )
        self.templates, self.dual_templates = self._captions.templates, self._captions.dual_templates
        self.image_paths = [image.path for image in images]
        self.mask_weight = mask_weight
        masks = mask_weight is not None
        self._images = ImageSet(self.image_paths, size, interpolation, center_crop, crops, zooms, masks=masks)
        if mask_weight is not None and not self._images.masked:
            raise no_masks(mask_weight, self.image_paths[0])
        if not masks and set == "train" and (ignored := count_masked(self.image_paths)):
            logger.info(
                "%d of %d images have a mask, which is not used; mask_weight: 0.1 in the dataset's params uses it",
                ignored,
                self.num_images,
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        sample = self.draw(index)
        item: dict[str, Tensor | str] = {
            "image": self.image(*sample.variant),
            "caption": sample.caption,
            "sizes": self.sizes(*sample.variant),
        }
        weight = self.loss_weight(*sample.variant)
        return item if weight is None else {**item, "loss_weight": weight}

    def __iter__(self) -> Iterator[dict[str, Tensor | str]]:
        # Indices have no upper limit (see draw), so a loop would not end by an IndexError.
        return (self[index] for index in range(len(self)))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which all random draws depend."""
        self.epoch = epoch

    def draw(self, index: int) -> Sample:
        """Draw image, flip, caption and view of the sample at `index`.

        Indices have no upper limit: `draw(n * len + i)` in epoch 0 is `draw(i)` in epoch n.
        """
        # random() is the only method whose values are the same in every version of Python.
        rng = random.Random(f"{self.seed}/{self.epoch * len(self) + index}")
        image = index % self.num_images
        flipped = rng.random() < self.flip_p
        mixed = self.per_image_tokens and rng.random() < self.mixing_prob
        lines = self.dual_templates if mixed else self.templates
        caption = self._captions.of(image, lines[int(rng.random() * len(lines))])
        # The view is drawn last, so that the other draws are those of earlier versions, which had no views.
        return Sample(image, flipped, caption, int(rng.random() * self._images.views(image)))

    def image(self, image: int, flipped: bool = False, view: int = 0) -> Tensor:
        """Return the pixels of a view of an image, float32 [H, W, 3] in [-1, 1]."""
        pixels = self._images[image, view]
        return (pixels.flip(1) if flipped else pixels).float().div_(127.5).sub_(1)

    def sizes(self, image: int, flipped: bool = False, view: int = 0) -> Tensor:
        """Return the size conditions of Stable Diffusion XL for a view, int64 [6] (Podell et al. 2023, section 2.2).

        Height and width of the whole image, top and left of the view in the image at the view's scale (flipped like the
        view), and height and width of the view.
        """
        (whole_width, whole_height), (left, top, right, bottom) = self._images.placement(image, view)
        side = self._images.size
        height, width = (bottom - top, right - left) if side is None else (side, side)
        across, down = width / (right - left), height / (bottom - top)
        beside = whole_width - right if flipped else left
        numbers = whole_height, whole_width, round(top * down), round(beside * across), height, width
        return torch.tensor(numbers)

    def loss_weight(self, image: int, flipped: bool = False, view: int = 0) -> Tensor | None:
        """Return the weight in the loss of the pixels of a view, float32 [H, W] in [0, 1]; None without masks."""
        if self.mask_weight is None:
            return None
        mask = self._images.mask(image, view)
        mask = (mask.flip(1) if flipped else mask).float().div_(255)
        return self.mask_weight + (1 - self.mask_weight) * mask

    def variants(self) -> list[tuple[int, bool, int]]:
        """Return every (image, flipped, view) that can be drawn, as a latent cache needs them."""
        flips = [
            flipped for flipped, possible in ((False, self.flip_p < 1), (True, self.flip_p > 0)) if possible
        ]
        return [
            (image, flipped, view)
            for image in range(self.num_images)
            for view in range(self._images.views(image))
            for flipped in flips
        ]

    def captions(self) -> list[str]:
        """Return every possible caption once."""
        return self._captions.all()


def _folders(data_root: object, placeholder: str) -> dict[str, Path]:
    """Return the folder of each placeholder, from one folder or from pairs."""
    pairs: Mapping[object, object] = data_root if isinstance(data_root, Mapping) else {placeholder: data_root}
    folders = {}
    if not pairs:
        raise UserError("data_root is empty: name a folder of images, or placeholder: folder pairs")
    for word, folder in pairs.items():
        if not isinstance(folder, str | os.PathLike) or not str(folder):
            raise UserError(f"data_root is {folder!r}: name a folder of images, or placeholder: folder pairs")
        folders[check_word(word, f"placeholder of {shown(str(folder))}:")] = Path(folder).expanduser()
    return folders


class ImageSet:
    """The views of image files: squares, cropped and resized; `image_set[i, view]` is uint8 [H, W, 3].

    With `masks`, `image_set.mask(i, view)` is the same view of the image's mask, and views that show nothing of it are
    left out.

    With `center_crop` false there is one view per image, which is stretched. Every file is read on construction, so
    that invalid files raise ImageError before training starts. Views are kept while they fit into `memory` bytes;
    the others are read from their file each time.
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
        masks: bool = False,
    ) -> None:
        if interpolation not in RESAMPLING:
            raise UserError(f"interpolation is {interpolation!r}: choose one of {', '.join(RESAMPLING)}")
        if size is not None and size < 1:
            raise UserError(
                f"size is {size}: choose a number of pixels, or omit it to keep the size of each image"
            )
        self.crops, self.zooms = _check_squares(crops, zooms, center_crop, size)
        self.paths = list(paths)
        self.size = size
        self.center_crop = center_crop
        self._resample = RESAMPLING[interpolation]
        self._memory, self._room = memory, memory
        self._in_memory: dict[tuple[int, int], Tensor] = {}
        self._masks = mask_files(self.paths) if masks else None
        self.masked = 0  # the number of images with a mask
        self._placements: list[tuple[tuple[int, int], list[Box]]] = []
        for i, path in enumerate(counted(self.paths, _tell_reading)):
            image, mask = self._open(path)
            boxes = boxes_of(image.size, self.crops, self.zooms, self.center_crop)
            if mask is not None:
                self.masked += 1
                boxes = [box for box in boxes if self._crop(mask, box, Image.Resampling.BOX).any()]
                if not boxes:
                    raise mask_outside(path)
            self._placements.append((image.size, boxes))
            for view, box in enumerate(boxes):
                self._keep((i, view), self._view(image, mask, box))
        views = sum(len(boxes) for _, boxes in self._placements)
        if len(self._in_memory) < views:
            logger.info("%d of %d views of the images are kept in memory", len(self._in_memory), views)

    def __len__(self) -> int:
        return len(self.paths)

    def views(self, i: int) -> int:
        """Return the number of views of image `i`."""
        return len(self._placements[i][1])

    def placement(self, i: int, view: int) -> tuple[tuple[int, int], Box]:
        """Return the size (width, height) of image `i`, and the box of a view in it."""
        size, boxes = self._placements[i]
        return size, boxes[view]

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        return self._read(key)[..., :3]

    def mask(self, i: int, view: int) -> Tensor:
        """Return the mask of a view, uint8 [H, W]; 255 everywhere for an image without one."""
        pixels = self._read((i, view))
        return pixels[..., 3] if pixels.shape[-1] > 3 else torch.full_like(pixels[..., 0], 255)

    def _read(self, key: tuple[int, int]) -> Tensor:
        """Return a view as uint8 [H, W, 3], or [H, W, 4] with its mask."""
        if key in self._in_memory:
            return self._in_memory[key]
        i, view = key
        return self._keep(key, self._view(*self._open(self.paths[i]), self._placements[i][1][view]))

    def __getstate__(self) -> dict[str, Any]:
        # A loader's process that is spawned would get every image as a shared file, and soon have too many open. It
        # reads the images that it needs.
        return {**self.__dict__, "_in_memory": {}, "_room": self._memory}

    def _keep(self, key: tuple[int, int], pixels: Tensor) -> Tensor:
        """Hold a view in memory as long as there is room."""
        if pixels.numel() <= self._room:
            self._room -= pixels.numel()
            self._in_memory[key] = pixels
        return pixels

    def _open(self, path: Path) -> tuple[Image.Image, Image.Image | None]:
        """Return an image, and its mask if it has one."""
        image = open_image(path)
        check_sides(path, image.size, max(self.zooms))
        return image, None if self._masks is None else mask_of(path, image.size, self._masks)

    def _view(self, image: Image.Image, mask: Image.Image | None, box: Box) -> Tensor:
        pixels = self._crop(image, box, self._resample)
        if mask is None:
            return pixels
        return torch.cat([pixels, self._crop(mask, box, Image.Resampling.BOX)[..., None]], dim=-1)

    def _crop(self, image: Image.Image, box: Box, resample: Image.Resampling) -> Tensor:
        image = image.crop(box)
        if self.size is not None:
            image = image.resize((self.size, self.size), resample)
        return torch.from_numpy(np.array(image))


def _tell_reading(done: int, total: int) -> None:
    logger.info("read %d of %d images", done, total)


def _check_squares(
    crops: object, zooms: object, center_crop: bool, size: int | None
) -> tuple[int, tuple[float, ...]]:
    crops = check_integer(crops, "crops")
    listed = list(zooms) if isinstance(zooms, Sequence) and not isinstance(zooms, str) else []
    if not listed or not all(isinstance(z, int | float) and math.isfinite(z) and z >= 1 for z in listed):
        raise UserError(f"zooms is {zooms!r}: choose a list of numbers of at least 1, such as [1, 1.25]")
    check_together(crops=crops, zooms=listed, center_crop=center_crop, size=size)
    return crops, tuple(float(z) for z in listed)


# The original's names of these lists.
imagenet_templates_small = prompts.OBJECT_TEMPLATES
imagenet_dual_templates_small = prompts.OBJECT_DUAL_TEMPLATES
per_img_token_list = prompts.PER_IMAGE_TOKENS
