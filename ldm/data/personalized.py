"""The dataset of textual inversion: a few pictures of a concept, each time under another caption.

Every draw (mirrored or not, which caption, which square) is a function of the seed, the epoch and the index alone. So
a run that is resumed at sample 1234 sees what it would have seen, however many workers load the pictures, and pictures
and captions can be had apart: `draw(index)` says which picture it is, `image(...)` gives its pixels.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm import prompts
from ldm.data.base import Draw, Pictures
from ldm.data.captions import Captions, Picture
from ldm.images import list_images
from ldm.util import UserError


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
            Picture(path, word, _spoken(word, coarse_class_text, self.placeholders))
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
        self._pictures = Pictures(self.image_paths, size, interpolation, center_crop, crops, zooms)

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

    def draw(self, index: int) -> Draw:
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
        return Draw(image, flipped, caption, int(rng.random() * self._pictures.views(image)))

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
