"""Features by which images and prompts are compared: of CLIP, of DINO, or of the embedded model's own towers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm.files import TOWERS, require_files
from ldm.front_ends import setting
from ldm.images import to_tensor
from ldm.models.two_towers import TwoTowers
from ldm.modules.encoders.base import reading
from ldm.util import UserError

_BATCH = 32
# Model types of transformers by what they can do.
_CLIP, _IMAGE_ONLY = ("clip",), ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")


class Features(Protocol):
    """An extractor of features of length 1.

    Attributes:
        name: the folder or hub name that it was loaded from.
    """

    name: str

    def image(self, images: Sequence[Image.Image]) -> Tensor:
        """Return features of images, [N, d] float32 on the CPU."""
        ...

    def text(self, prompts: Sequence[str]) -> Tensor | None:
        """Return features of prompts, [N, d] float32 on the CPU; None from a network without text."""
        ...

    def of_states(self, states: Tensor) -> Tensor:
        """Return features [N, d] of the text tower's last states [N, D] at the ends of prompts, with gradients.

        Raises:
            UserError: the network has no text tower of this width.
        """
        ...


class OwnFeatures:
    """Features of the two towers with which the embedded model's text encoder was trained."""

    def __init__(self, towers: TwoTowers, name: str) -> None:
        self.towers, self.name = towers.requires_grad_(False), name

    @torch.no_grad()
    def image(self, images: Sequence[Image.Image]) -> Tensor:
        weights = self.towers.logit_scale
        batches = [torch.stack([to_tensor(image) for image in batch]) for batch in _batches(images)]
        return torch.cat([self.towers.image_features(b.to(weights)).float().cpu() for b in batches])

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        return torch.cat([self.towers.text_features(b).float().cpu() for b in _batches(prompts)])

    def of_states(self, states: Tensor) -> Tensor:
        return _projected(self.towers.text_projection, states, self.name)


class PublishedFeatures:
    """Features of a model of transformers: CLIP's projected ones, or a vision transformer's first token, as in DINO.

    Args:
        source: a folder or a hub name.
        device: the device to compute on.
        what: the name of `source` in errors.
    Raises:
        UserError: the model cannot be read, or is neither CLIP nor a vision transformer.
    """

    def __init__(self, source: str, device: torch.device | str, what: str) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

        require_files(what, source, ("config.json",), ("preprocessor_config.json",))
        with reading(what, source):
            kind = AutoConfig.from_pretrained(source).model_type
            if kind not in (*_CLIP, *_IMAGE_ONLY):
                raise UserError(
                    f"{what} is a '{kind}' model; name one of {', '.join((*_CLIP, *_IMAGE_ONLY))}"
                )
            self.processor = AutoImageProcessor.from_pretrained(source)
            self.tokenizer = AutoTokenizer.from_pretrained(source) if kind in _CLIP else None
            self.model: Any = AutoModel.from_pretrained(source).to(device).eval().requires_grad_(False)
        self.name, self.device = source, device

    @torch.no_grad()
    def image(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.cat([self._image(batch) for batch in _batches(images)])

    def _image(self, images: Sequence[Image.Image]) -> Tensor:
        inputs = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device)
        if self.tokenizer is None:
            return _unit(self.model(pixel_values=pixels).last_hidden_state[:, 0])
        return _unit(self.model.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor | None:
        if self.tokenizer is None:
            return None
        # In CLIP's text tower a token attends to earlier ones only, so that padding changes nothing.
        length = self.model.config.text_config.max_position_embeddings
        features = []
        for batch in _batches(prompts):
            ids = self.tokenizer(
                list(batch), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            ).input_ids
            features.append(_unit(self.model.get_text_features(input_ids=ids.to(self.device))))
        return torch.cat(features)

    def of_states(self, states: Tensor) -> Tensor:
        if self.tokenizer is None:
            raise UserError(f"'{self.name}' has no text tower; name a CLIP model")
        return _projected(self.model.text_projection, states, self.name)


def load_features(source: str | Path, device: torch.device | str, what: str = "") -> Features:
    """Return the feature extractor in a folder (of TwoTowers or of transformers) or of a hub name.

    `what` is the name of `source` in errors.

    Raises:
        UserError: the folder holds neither, or the model is neither CLIP nor a vision transformer.
    """
    if (Path(source) / TOWERS).is_file():
        return OwnFeatures(TwoTowers.load(source).to(device), str(source))
    return PublishedFeatures(str(source), device, f"{what or setting('features')} '{source}'")


def _projected(projection: nn.Linear, states: Tensor, name: str) -> Tensor:
    if states.shape[-1] != projection.in_features:
        raise UserError(
            f"'{name}' is a CLIP with text of width {projection.in_features}, not {states.shape[-1]}; name the CLIP "
            "that the text encoder belongs to"
        )
    return F.normalize(projection(states), dim=-1)


def _unit(features: Any) -> Tensor:
    # transformers 5 returns the output of the tower, with the projected features as its pooled ones.
    tensor = features if isinstance(features, Tensor) else features.pooler_output
    return F.normalize(tensor.float(), dim=-1).cpu()


def _batches(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
