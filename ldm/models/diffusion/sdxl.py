"""Stable Diffusion XL (Podell et al. 2023): latent diffusion conditioned on the sizes of its images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ldm.base_models import check_size_conditions
from ldm.models.diffusion.conditioning import condition_map
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.sdxl import FrozenSDXLEmbedder
from ldm.util import ConfigError

# Height and width of the original image, top and left of the crop in the resized image, height and width of the crop.
Sizes: TypeAlias = tuple[int, int, int, int, int, int]
SIZES = "sizes"  # the batch's key of them, [B, 6]
# The names of the pairs in the order of `Sizes`.
OPTIONS = ("original_size", "crop", "target_size")


class SizedCaptions(list[str]):
    """Captions with the sizes [B, 6] of their images; see `Sizes`."""

    def __init__(self, captions: Iterable[str], sizes: Tensor) -> None:
        super().__init__(captions)
        self.sizes = sizes


class LatentDiffusionXL(LatentDiffusion):
    """Latent diffusion under a text's hidden states, its pooled vector, and the sizes of the image.

    The text encoder is under the name `conditioner`, as in published checkpoints. A batch may hold `sizes` [B, 6] (see
    `Sizes`); without, as for prompts, they are those of `drawing_at`, or of a whole image of the model's own size.

    Args:
        cond_stage_config: node of a `FrozenSDXLEmbedder`.
        conditioning_key: must be crossattn-adm.
        zero_empty_negative: what an empty negative prompt is: zeros, or with False the encoded empty text.
        **options: see `LatentDiffusion`.
    Raises:
        ConfigError: the text encoder is another one, or the UNet takes no vector of its width and six sizes.
    """

    size_conditions = True

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any],
        conditioning_key: str = "crossattn-adm",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        zero_empty_negative: bool = True,
        **options: Any,
    ) -> None:
        if conditioning_key != "crossattn-adm":
            raise ConfigError(f"LatentDiffusionXL: conditioning_key is {conditioning_key}; use crossattn-adm")
        super().__init__(
            unet_config=unet_config,
            cond_stage_config=cond_stage_config,
            conditioning_key=conditioning_key,
            **options,
        )
        if not isinstance(self.cond_stage_model, FrozenSDXLEmbedder):
            raise ConfigError(
                "LatentDiffusionXL: cond_stage_config is no ldm.modules.encoders.sdxl.FrozenSDXLEmbedder; name that"
            )
        width: int = unet_config["params"].get("adm_in_channels") or 0
        pooled = self.cond_stage_model.pooled_width
        # How wide each of the six numbers is embedded.
        self.size_width, rest = divmod(width - pooled, 6)
        if rest or self.size_width < 2:
            raise ConfigError(
                f"unet_config: adm_in_channels is {width}; it must be {pooled}, the width of the pooled text, and 6 "
                "times the width of the embedded sizes"
            )
        self.zero_empty_negative = zero_empty_negative
        self._drawn: Sizes | None = None
        self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__("conditioner" if name == "cond_stage_model" else name, value)

    @property
    def cond_stage_model(self) -> Any:
        """The text encoder, whose name in checkpoints is `conditioner`."""
        return self.conditioner

    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution | Tensor:
        """Return the posterior of images, in float32: in half precision this first stage overflows."""
        with torch.autocast(x.device.type, enabled=False):
            return super().encode_first_stage(x.float())

    def decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Return images of latents, in float32: in half precision this first stage overflows to black images."""
        with torch.autocast(z.device.type, enabled=False):
            return super().decode_first_stage(z.float(), force_not_quantize)

    def captions_of(self, batch: Mapping[str, Any]) -> list[Any]:
        """Return the captions of a batch, with the sizes of its images if it holds them."""
        captions = super().captions_of(batch)
        return SizedCaptions(captions, batch[SIZES]) if SIZES in batch else captions

    def get_learned_conditioning(self, c: Any) -> dict[str, list[Tensor]]:
        """Return captions encoded: their context [B, M, d], and [B, d'] of the pooled vectors and the sizes."""
        encoded = super().get_learned_conditioning(c)
        return self._with_sizes(encoded, c.sizes if isinstance(c, SizedCaptions) else None)

    def completed(self, encoded: Any, negatives: Sequence[str] | None = None) -> dict[str, list[Tensor]]:
        """Return what the text encoder gave for prompts, with the sizes of what is drawn.

        Of an empty negative prompt all but the sizes becomes 0, as in diffusers and AUTOMATIC1111: that is what
        training put in place of dropped captions, unless `zero_empty_negative` is False.
        """
        if negatives is not None and self.zero_empty_negative:
            kept = torch.tensor([bool(text.strip()) for text in negatives], device=self.device)
            encoded = condition_map(lambda part: part * kept.view(-1, *[1] * (part.ndim - 1)), encoded)
        return self._with_sizes(encoded, None)

    def get_unconditional_conditioning(self, negatives: Sequence[str]) -> dict[str, list[Tensor]]:
        return self.completed(super().get_learned_conditioning(list(negatives)), negatives)

    def _with_sizes(self, encoded: Mapping[str, Any], sizes: Tensor | None) -> dict[str, list[Tensor]]:
        (pooled,) = encoded["c_adm"]
        if sizes is None:
            sizes = torch.tensor([self.drawn_sizes()] * len(pooled))
        # Do not wait for the device, which may still compute earlier steps.
        numbers = sizes.to(pooled.device, non_blocking=True).flatten()
        embedded = timestep_embedding(numbers, self.size_width).view(len(pooled), -1)
        return {**encoded, "c_adm": [torch.cat([pooled.float(), embedded], dim=1)]}

    @contextmanager
    def drawing_at(self, height: int, width: int, sizes: Mapping[str, Sequence[int]]) -> Iterator[None]:
        """Within this block prompts are for images of this size in pixels.

        Args:
            sizes: `original_size` and `target_size` (height, width; by default that of the image) and `crop` (top,
                left; by default 0, 0), which replace these size conditions.
        Raises:
            UserError: as `ldm.base_models.check_size_conditions`.
        """
        check_size_conditions(sizes, self.size_conditions)
        given = {"original_size": (height, width), "crop": (0, 0), "target_size": (height, width), **sizes}
        (a, b), (c, d), (e, f) = (given[name] for name in OPTIONS)
        before, self._drawn = self._drawn, (a, b, c, d, e, f)
        try:
            yield
        finally:
            self._drawn = before

    def drawn_sizes(self) -> Sizes:
        """Return the size conditions of prompts: of `drawing_at`, else of a whole image of the model's own size."""
        if self._drawn is not None:
            return self._drawn
        own = (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)
        factor = 2 ** (len(self.first_stage_model.encoder.down) - 1)
        height, width = (side * factor for side in own)
        return height, width, 0, 0, height, width
