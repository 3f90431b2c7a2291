"""A classifier of the attributes that an image of a creature shows; it shares no weights with the judged model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import kornia
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ldm.data.creatures.world import ATTRIBUTES
from ldm.files import atomic_write, write_text
from ldm.util import UserError, instantiate_from_config

logger = logging.getLogger(__name__)

_COLUMN = {name: column for column, name in enumerate(ATTRIBUTES)}
_PLAIN, _NEON = ATTRIBUTES["pattern"].index("plain"), ATTRIBUTES["style"].index("neon")
_WEIGHTS, _DESCRIPTION = "model.safetensors", "judge.json"


class AttributeJudge(nn.Module):
    """An image tower with a linear classifier for each attribute of the world.

    tower: a `target:` node of a module with attributes `width` and `size` that maps images [B, 3, size, size] in
        [-1, 1] to features [B, width].
    """

    def __init__(self, tower: Mapping[str, Any]) -> None:
        super().__init__()
        self.attributes = ATTRIBUTES
        node = OmegaConf.create(cast(dict[str, Any], tower))
        self.tower_node = OmegaConf.to_container(node, resolve=True)
        self.tower = instantiate_from_config(node)
        self.size: int = self.tower.size
        self.heads = nn.ModuleDict(
            {name: nn.Linear(self.tower.width, len(values)) for name, values in ATTRIBUTES.items()}
        )

    def logits(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return logits [B, values] by attribute, of images [B, 3, H, W] in [-1, 1]; other sizes are resized."""
        pixels = pixels.to(next(self.parameters()))
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(
                pixels, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False
            )
        features = self.tower(pixels)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def predict_indices(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the index of the most likely value [B] by attribute, of images [B, 3, H, W] in [-1, 1].

        The log-probabilities of the image and its mirror image are added: mirroring changes no attribute.
        """
        original, mirrored = self.logits(pixels), self.logits(kornia.geometry.hflip(pixels))
        return {
            name: (values.log_softmax(1) + mirrored[name].log_softmax(1)).argmax(1)
            for name, values in original.items()
        }

    def predict(self, pixels: Tensor) -> list[dict[str, Any]]:
        """Return the most likely value of each attribute, one dict per image of [B, 3, H, W] in [-1, 1]."""
        columns = {name: indices.tolist() for name, indices in self.predict_indices(pixels).items()}
        return [
            {name: ATTRIBUTES[name][indices[k]] for name, indices in columns.items()}
            for k in range(len(pixels))
        ]

    def save(self, folder: str | Path) -> None:
        """Write the weights in half precision, and the description; raises UserError if writing fails."""
        state = {key: value.detach().to("cpu", torch.float16) for key, value in self.state_dict().items()}
        data = save({key: value.contiguous() for key, value in state.items()}, {"format": "pt"})
        attributes = {name: list(values) for name, values in ATTRIBUTES.items()}
        description = {"tower": self.tower_node, "attributes": attributes}
        write_text(Path(folder) / _DESCRIPTION, json.dumps(description, indent=1) + "\n")
        atomic_write(Path(folder) / _WEIGHTS, lambda file: file.write(data))
        logger.info("judge written to %s", folder)

    @classmethod
    def load(cls, folder: str | Path) -> AttributeJudge:
        """Load a judge that `save` wrote, in evaluation mode and float32.

        Raises UserError if the folder has none, or if it was trained with other attribute values.
        """
        folder = Path(folder)
        try:
            description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
            state = load((folder / _WEIGHTS).read_bytes())
            _check_attributes(description["attributes"], folder)
            judge = cls(description["tower"])
            judge.load_state_dict({key: value.float() for key, value in state.items()})
        except OSError as error:
            raise UserError(f"no judge in '{folder}': {error.filename} cannot be read") from error
        except (SafetensorError, json.JSONDecodeError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the judge in '{folder}' is damaged ({reason}); train it again") from error
        return judge.eval()


def _check_attributes(attributes: Mapping[str, Sequence[Any]], folder: Path) -> None:
    for name, values in ATTRIBUTES.items():
        if list(attributes.get(name, ())) != list(values):
            raise UserError(
                f"the judge in '{folder}' was trained with other values of '{name}'; train it again"
            )


def visible_attributes(name: str, attributes: Tensor) -> Tensor:
    """Return which images can show an attribute at all, bool [B].

    attributes: int64 [B, 8], indices into the values of `ATTRIBUTES`, in its order. A plain creature has no second
        colour, and the neon style hides the background.
    """
    if name == "second":
        return attributes[:, _COLUMN["pattern"]] != _PLAIN
    if name == "background":
        return attributes[:, _COLUMN["style"]] != _NEON
    return torch.ones(len(attributes), dtype=torch.bool, device=attributes.device)
