"""What generation begins from besides noise: an image to edit, and how much a learned word adds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ldm import words
from ldm.files import file_hash
from ldm.front_ends import setting
from ldm.generate.request import ClassWords
from ldm.images import fitted, open_image, open_mask, to_tensor
from ldm.util import UserError, check_value, shown, shown_value

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InitImage:
    """An image to begin from (SDEdit, Meng et al. 2022, arXiv 2108.01073), or to edit in one place.

    With a mask only what is white in it is generated: at each step the latent outside is that of the image, noised to
    the step's level (Blended Latent Diffusion, Avrahami et al. 2023, arXiv 2206.02779), and in the end the pixels
    outside are those of the image, exactly.

    Attributes:
        image: RGB; its central part with the shape of the output is used, as for training images.
        mask: greyscale, of the image's size; white is generated, black stays, and grey is blended.
        strength: the share of the sampling steps that are taken: 0 returns the image as the first stage keeps it, 1
            begins from almost pure noise.
        names: the fields "Init image" and "Mask" of the settings, by which the files can be found again.
    Raises:
        UserError: the strength is not in [0, 1], the sizes differ, or what is given are no images.
    """

    image: Image.Image
    mask: Image.Image | None = None
    strength: float = 0.75
    names: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        check_value("strength", self.strength, "edit_strength", float)
        for name, value, kind in (
            ("image", self.image, Image.Image),
            ("mask", self.mask, Image.Image | None),
        ):
            if not isinstance(value, kind):
                raise UserError(
                    f"{name} is {shown_value(value)}, no image of PIL; InitImage.read takes files"
                )
        if self.mask is not None and self.mask.size != self.image.size:
            raise UserError(
                f"the mask is {self.mask.width}x{self.mask.height} pixels, but the image is {self.image.width}x"
                f"{self.image.height}; make them equal"
            )

    @classmethod
    def read(cls, path: str | Path, mask: str | Path | None = None, strength: float = 0.75) -> InitImage:
        """Read the files, upright and over white as training images are.

        Raises:
            UserError: a file cannot be read, the mask is black everywhere, or the sizes or the strength do not fit.
        """
        image, read_mask = open_image(path), None if mask is None else open_mask(mask)
        names = {
            name: f"{Path(file).name} {file_hash(Path(file))[:10]}"
            for name, file in (("Init image", path), ("Mask", mask))
            if file is not None
        }
        return cls(image, read_mask, strength, names)

    def labels(self) -> dict[str, str]:
        """The fields of an image's settings; the first has AUTOMATIC1111's name."""
        return {"Denoising strength": f"{self.strength:g}", **(self.names or {})}

    def at(self, model: LatentDiffusion, height: int, width: int) -> Start:
        """Encode the image for output of this size in pixels."""
        import numpy as np
        import torch
        from torch.nn import functional

        from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

        image = fitted(self.image.convert("RGB"), width, height)
        # Rounding decides by less than a pixel.
        if abs(self.image.width * height - self.image.height * width) > max(self.image.size):
            logger.info(
                "the initial image is %dx%d pixels: its central part with the shape %dx%d is used",
                *self.image.size,
                width,
                height,
            )
        encoded = model.encode_first_stage(to_tensor(image)[None].to(model.alphas_cumprod))
        if isinstance(encoded, DiagonalGaussianDistribution):
            encoded = encoded.mode()
        latent = model.get_first_stage_encoding(encoded)
        if self.mask is None:
            return Start(image, latent)
        mask = fitted(self.mask.convert("L"), width, height, Image.Resampling.BOX)
        if mask.getextrema() == (0, 0):
            raise UserError(
                f"the mask marks nothing in the central part of the image that {width}x{height} pixels show; crop the "
                f"image around it, or choose another {setting('size')}"
            )
        # A cell changes if any of its pixels may.
        marked = torch.from_numpy(np.array(mask) > 0)[None, None].to(latent)
        keep = 1 - functional.adaptive_max_pool2d(marked, latent.shape[-2:])
        return Start(image, latent, mask, keep)


@dataclass(frozen=True)
class Start:
    """An image to begin from at the size of the output.

    Attributes:
        latent: [1, C, h, w] at the denoiser's scale.
        keep: [1, 1, h, w], 1 where the latent stays; None without a mask.
    """

    image: Image.Image
    latent: Tensor
    mask: Image.Image | None = None
    keep: Tensor | None = None

    def kept_in(self, latents: Tensor) -> Tensor:
        """Return latents [B, C, h, w] with this one's where it stays, so that the decoder sees no seam."""
        return latents if self.keep is None else self.keep * self.latent + (1 - self.keep) * latents

    def pasted(self, image: Image.Image) -> Image.Image:
        """Return a generated image with the pixels of the original outside the mask."""
        return image if self.mask is None else Image.composite(image, self.image, self.mask)


def strength_labels(strength: float, class_words: ClassWords) -> dict[str, str]:
    """The fields of an image's settings for a concept strength."""
    pairs = {"": class_words} if isinstance(class_words, str) else class_words
    text = ", ".join(f"{name}={word}" if name else word for name, word in pairs.items())
    return {"Concept strength": f"{strength:g}", "Class words": text}


def with_class_words(model: LatentDiffusion, prompts: Sequence[str], class_words: ClassWords) -> list[str]:
    """Return prompts with the class word in place of each placeholder.

    Raises:
        UserError: the class word of a placeholder in a prompt is not known.
    """
    manager = model.embedding_manager
    names = [] if manager is None else list(manager.placeholders)
    ignores_case = model.cond_stage_model.prompt_tokenizer.ignores_case if names else True

    if not isinstance(class_words, (str, Mapping)):
        raise UserError(f"class_words is {shown(class_words)}; give a word, or a dictionary by placeholder")

    def word_of(name: str) -> str:
        word = class_words if isinstance(class_words, str) else class_words.get(name)
        if not word:
            raise UserError(
                f"concept_strength needs the class word of '{shown(name)}'; name it, as in "
                f"{setting('class_word', shown(name))}"
            )
        return word

    return [
        "".join(
            text if name is None else word_of(name) for text, name in words.split(prompt, names, ignores_case)
        )
        for prompt in prompts
    ]
