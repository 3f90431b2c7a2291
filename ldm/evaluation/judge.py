"""What a picture of a creature shows, read by classifiers that share nothing with the model that is judged."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    """One tower over pictures and a linear classifier for each attribute of the world.

    `tower` is a `target:` node of a module with `.width` and `.size` that maps pictures [B, 3, size, size] in [-1, 1]
    to states [B, width].
    """

    def __init__(self, tower: Mapping[str, Any]) -> None:
        super().__init__()
        self.attributes = ATTRIBUTES
        node = OmegaConf.create(tower)
        self.tower_node = OmegaConf.to_container(node, resolve=True)
        self.tower = instantiate_from_config(node)
        self.size: int = self.tower.size
        self.heads = nn.ModuleDict(
            {name: nn.Linear(self.tower.width, len(values)) for name, values in ATTRIBUTES.items()}
        )

    def logits(self, pixels: Tensor) -> dict[str, Tensor]:
        """For each attribute [B, values], of pictures [B, 3, H, W] in [-1, 1], resized where they need it."""
        pixels = pixels.to(next(self.parameters()))
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(
                pixels, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False
            )
        states = self.tower(pixels)
        return {name: head(states) for name, head in self.heads.items()}

    @torch.no_grad()
    def likeliest(self, pixels: Tensor) -> dict[str, Tensor]:
        """For each attribute the index of its likeliest value [B], of pictures [B, 3, H, W] in [-1, 1].

        A creature has the same attributes in a mirror, so it is read there too.
        """
        seen, mirrored = self.logits(pixels), self.logits(pixels.flip(-1))
        return {
            name: (values.log_softmax(1) + mirrored[name].log_softmax(1)).argmax(1)
            for name, values in seen.items()
        }

    def read(self, pixels: Tensor) -> list[dict[str, Any]]:
        """The likeliest value of each attribute, one dict per picture [B, 3, H, W] in [-1, 1]."""
        found = {name: indices.tolist() for name, indices in self.likeliest(pixels).items()}
        return [
            {name: ATTRIBUTES[name][indices[k]] for name, indices in found.items()}
            for k in range(len(pixels))
        ]

    def save(self, folder: str | Path) -> None:
        """Writes weights, in half precision, and description; raises UserError when that fails."""
        state = {key: value.detach().to("cpu", torch.float16) for key, value in self.state_dict().items()}
        data = save({key: value.contiguous() for key, value in state.items()}, {"format": "pt"})
        attributes = {name: list(values) for name, values in ATTRIBUTES.items()}
        described = {"tower": self.tower_node, "attributes": attributes}
        write_text(Path(folder) / _DESCRIPTION, json.dumps(described, indent=1) + "\n")
        atomic_write(Path(folder) / _WEIGHTS, lambda file: file.write(data))
        logger.info("judge written to %s", folder)

    @classmethod
    def load(cls, folder: str | Path) -> AttributeJudge:
        """The judge that `save` wrote, in evaluation mode and float32.

        Raises UserError for a folder without one, and for one that was trained on another world.
        """
        folder = Path(folder)
        try:
            described = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
            state = load((folder / _WEIGHTS).read_bytes())
            _check_world(described["attributes"], folder)
            judge = cls(described["tower"])
            judge.load_state_dict({key: value.float() for key, value in state.items()})
        except OSError as error:
            raise UserError(f"no judge in '{folder}': {error.filename} cannot be read") from error
        except (SafetensorError, json.JSONDecodeError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the judge in '{folder}' is damaged ({reason}); train it again") from error
        return judge.eval()


def _check_world(attributes: Mapping[str, Sequence[Any]], folder: Path) -> None:
    for name, values in ATTRIBUTES.items():
        if list(attributes.get(name, ())) != list(values):
            raise UserError(f"the judge in '{folder}' knows other values of '{name}'; train it again")


def visible_attributes(name: str, attributes: Tensor) -> Tensor:
    """Which pictures, bool [B], can show an attribute at all: attributes int64 [B, 8] in the world's order.

    A plain creature has no second colour, and neon is dark whatever stands behind.
    """
    if name == "second":
        return attributes[:, _COLUMN["pattern"]] != _PLAIN
    if name == "background":
        return attributes[:, _COLUMN["style"]] != _NEON
    return torch.ones(len(attributes), dtype=torch.bool, device=attributes.device)
