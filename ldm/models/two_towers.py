"""A small CLIP: an image tower and a text tower with one feature space, and their contrastive training."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from einops import rearrange
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast  # type: ignore[attr-defined]  # isort: skip

from ldm.checkpoint import uninitialised
from ldm.files import TOWERS, atomic_write, write_text
from ldm.models.optimizers import build_optimizer
from ldm.util import UserError, instantiate_from_config

logger = logging.getLogger(__name__)

TEXT_FILES = ("config.json", "vocab.json", "merges.txt", "tokenizer_config.json")
_WEIGHTS, _TEXT_FOLDER = "model.safetensors", "text_encoder"


class ResidualTower(nn.Module):
    """A residual CNN from images [B, 3, size, size] in [-1, 1] to states [B, width].

    There is one level for each entry of `channels`; the first has half the size of the images, and each of the others
    half the size of the one before. On small, simple images it trains several times faster than a vision transformer.

    Raises:
        UserError: `size` cannot be halved so often.
    """

    def __init__(self, size: int = 32, channels: Sequence[int] = (64, 128, 192), width: int = 256) -> None:
        super().__init__()
        if size % 2 ** len(channels):
            raise UserError(f"size {size} cannot be halved {len(channels)} times; use fewer channels")
        self.size, self.width = size, width
        first = channels[0]
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, first, 3, padding=1), _Residual(first)]
        for before, after in zip(channels, channels[1:], strict=False):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), _Residual(after)]
        side = size // 2 ** len(channels)
        layers += [
            nn.GroupNorm(8, channels[-1]),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(channels[-1] * side * side, width),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels.contiguous(memory_format=torch.channels_last))


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(self.norm(x))))


class TwoTowers(nn.Module):
    """An image tower and a text tower, whose features are similar where image and caption match.

    Args:
        text_encoder: folder with the files of a CLIP tokenizer and the text tower's config.json; weights are random.
        image_tower: node of a module with attributes `width` and `size` that maps images [B, 3, size, size] in
            [-1, 1] to states [B, width].
    Raises:
        UserError: the folder lacks a file.
    """

    image_tower: ResidualTower  # or any module with the same attributes

    def __init__(self, text_encoder: str | Path, image_tower: Mapping[str, Any]) -> None:
        super().__init__()
        self.text_folder = Path(text_encoder)
        self.image_node = OmegaConf.to_container(OmegaConf.create(dict(image_tower)), resolve=True)
        for name in TEXT_FILES:
            if not (self.text_folder / name).is_file():
                raise UserError(f"text encoder folder '{text_encoder}' lacks {name}")
        self.tokenizer = CLIPTokenizerFast.from_pretrained(self.text_folder)
        # On a CPU, sequences this short are faster without the fused kernel, forward and backward.
        config = CLIPTextConfig.from_pretrained(self.text_folder, attn_implementation="eager")
        self.max_length = config.max_position_embeddings
        self.text_tower = CLIPTextModel(config)
        self.image_tower = instantiate_from_config(image_tower)
        assert config.hidden_size is not None and config.projection_dim is not None  # both have defaults
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.image_projection = nn.Linear(self.image_tower.width, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Return token ids [B, L] on the model's device, as long as the longest caption; longer text is truncated."""
        ids = self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).input_ids
        longest = int((ids != self.tokenizer.pad_token_id).sum(1).max()) + 1
        return ids[:, :longest].to(self.logit_scale.device)  # padding changes nothing before it

    def image_states(self, pixels: Tensor) -> Tensor:
        """Return the image tower's states [B, width] of images [B, 3, H, W] in [-1, 1]; resizes them to its size."""
        size = self.image_tower.size
        if pixels.shape[-2:] != (size, size):
            from kornia.geometry import resize  # takes a second to import, and images mostly have the size

            pixels = resize(
                pixels, (size, size), interpolation="bicubic", antialias=True, align_corners=False
            )
        return self.image_tower(pixels)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return features [B, d] of length 1 of images [B, 3, H, W] in [-1, 1]."""
        return F.normalize(self.image_projection(self.image_states(pixels)), dim=-1)

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Return features [B, d] of length 1 of captions."""
        ends = self.text_tower(input_ids=self.tokenize(captions)).pooler_output
        return F.normalize(self.text_projection(ends), dim=-1)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the towers to a folder, weights as `dtype`; FrozenCLIPEmbedder reads its sub-folder text_encoder.

        Raises:
            UserError: the folder cannot be written.
        """
        folder, text, rest = Path(folder), {}, {}
        for key, value in self.state_dict().items():
            value = value.detach().to("cpu", dtype).contiguous()
            if key.startswith("text_tower."):
                text["text_model." + key.removeprefix("text_tower.").removeprefix("text_model.")] = value
            else:
                rest[key] = value
        texts = {name: (self.text_folder / name).read_text(encoding="utf-8") for name in TEXT_FILES}
        for name, content in texts.items():
            write_text(folder / _TEXT_FOLDER / name, content)
        write_text(folder / TOWERS, json.dumps({"image_tower": self.image_node}, indent=1) + "\n")
        for target, weights in ((folder / _TEXT_FOLDER / _WEIGHTS, text), (folder / _WEIGHTS, rest)):
            _write_bytes(target, save(weights, {"format": "pt"}))
        logger.info("CLIP towers written to %s", folder)

    @classmethod
    def load(cls, folder: str | Path) -> TwoTowers:
        """Return the towers that `save` wrote, in eval mode.

        Raises:
            UserError: a file is absent or damaged, or does not fit.
        """
        folder = Path(folder)
        try:
            node = json.loads((folder / TOWERS).read_text(encoding="utf-8"))["image_tower"]
            with uninitialised():
                towers = cls(folder / _TEXT_FOLDER, node)
            text = load((folder / _TEXT_FOLDER / _WEIGHTS).read_bytes())
            state = load((folder / _WEIGHTS).read_bytes())
        except OSError as error:
            raise UserError(f"no CLIP towers in '{folder}': {error.filename} cannot be read") from error
        except (SafetensorError, ValueError, KeyError) as error:
            raise UserError(
                f"the CLIP towers in '{folder}' are damaged ({error}); make them again"
            ) from error
        nested = any(key.startswith("text_model.") for key in towers.text_tower.state_dict())
        for key, value in text.items():
            state["text_tower." + (key if nested else key.removeprefix("text_model."))] = value
        try:
            towers.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"the weights in '{folder}' do not fit its description: {error}".splitlines()[0]
            ) from error
        return towers.eval()


def _write_bytes(path: Path, data: bytes) -> None:
    atomic_write(path, lambda file: file.write(data))


_MAX_LOG_SCALE = math.log(100.0)


class ContrastiveCLIP(pl.LightningModule):
    """Contrastive training of `TwoTowers` (symmetric InfoNCE with a trained temperature).

    A batch is {"image": [B, H, W, 3] in [-1, 1], "caption": list[str]}. It may hold a "foil", list[str], for each
    image: a wrong caption, which the loss sets against the right one.

    Args:
        text_encoder, image_tower: those of `TwoTowers`.
        attributes: names with their numbers of values. Batches then hold "attributes" [B, A] in this order, and
            linear heads on the image tower, which only training uses, classify them with weight `attribute_weight`.
        optimizer_config, scheduler_config: nodes, see `ldm.models.optimizers`.
        image_key, caption_key: the batch's keys.
        export_to: folder in which the towers are saved at the end of training.
        monitor: the logged value by which checkpoints are compared.
    """

    def __init__(
        self,
        text_encoder: str,
        image_tower: Mapping[str, Any],
        attributes: Mapping[str, int] | None = None,
        attribute_weight: float = 1.0,
        optimizer_config: Mapping[str, Any] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        image_key: str = "image",
        caption_key: str = "caption",
        export_to: str | None = None,
        monitor: str | None = None,
    ) -> None:
        super().__init__()
        self.export_to, self.monitor = export_to, monitor
        self.image_key, self.caption_key = image_key, caption_key
        self.attribute_weight = attribute_weight
        self.optimizer_config, self.scheduler_config = optimizer_config, scheduler_config
        self.learning_rate = 1e-3
        self.towers = TwoTowers(text_encoder, image_tower)
        width = self.towers.image_tower.width
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, count) for name, count in (attributes or {}).items()}
        )

    def forward(self, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return features [B, d] of images [B, H, W, 3] and of captions, and the image tower's states [B, width]."""
        pixels = rearrange(images, "b h w c -> b c h w").to(self.device, torch.float32)
        states = self.towers.image_states(pixels)
        image_features = F.normalize(self.towers.image_projection(states), dim=-1)
        return image_features, self.towers.text_features(captions), states

    def contrastive_loss(
        self, images: Tensor, texts: Tensor, wrong: Tensor | None = None, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return InfoNCE in both directions, and the share of captions whose own image is nearest.

        Args:
            images, texts: features [B, d] of length 1.
            wrong: features [B, d] of each image's foil, one more wrong caption of it.
            counts: [B], bool; which foils differ from the caption. Needed with `wrong`.
        """
        scale, images, texts = self.towers.logit_scale.exp(), images.float(), texts.float()
        logits = scale * texts @ images.t()
        target = torch.arange(len(logits), device=logits.device)
        of_image = logits.t()
        if wrong is not None and counts is not None:
            confusion = scale * (images * wrong.float()).sum(1)
            of_image = torch.cat([of_image, confusion.masked_fill(~counts, -torch.inf)[:, None]], 1)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(of_image, target)) / 2
        return loss, (logits.argmax(1) == target).float().mean()

    def shared_step(self, batch: Mapping[str, Any], stage: str) -> Tensor:
        """Return the loss of a batch, and log its parts under `stage`."""
        captions, foils = list(batch[self.caption_key]), list(batch.get("foil", ()))
        images, texts, states = self(batch[self.image_key], captions + foils)
        texts, wrong = texts[: len(captions)], texts[len(captions) :]
        log = {}
        if foils:
            counts = torch.tensor([one != other for one, other in zip(captions, foils, strict=True)])
            loss, recall = self.contrastive_loss(images, texts, wrong, counts.to(images.device))
            log[f"{stage}/foiled"] = ((images * (texts - wrong)).sum(1) < 0).float().mean()
        else:
            loss, recall = self.contrastive_loss(images, texts)
        log |= {f"{stage}/contrastive": loss.detach(), f"{stage}/recall": recall}
        if self.heads:
            wanted = batch["attributes"].to(self.device).unbind(1)
            heads = zip(self.heads.values(), wanted, strict=True)
            attribute_loss = torch.stack(
                [F.cross_entropy(head(states), values) for head, values in heads]
            ).mean()
            loss = loss + self.attribute_weight * attribute_loss
            log[f"{stage}/attributes"] = attribute_loss.detach()
        log[f"{stage}/loss"] = loss.detach()
        self.log_dict(
            log, prog_bar=True, batch_size=len(images), on_step=stage == "train", on_epoch=stage != "train"
        )
        return loss

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.shared_step(batch, "train")

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.shared_step(batch, "val")

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        """Step, and clamp the temperature before any callback can save it."""
        super().optimizer_step(*arguments, **keywords)
        with torch.no_grad():
            self.towers.logit_scale.clamp_(0.0, _MAX_LOG_SCALE)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and the schedule of the YAML; biases, norms and the temperature have no weight decay."""
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        return build_optimizer(groups, self.learning_rate, self.optimizer_config, self.scheduler_config)

    def on_fit_end(self) -> None:
        if self.export_to is not None and self.trainer.is_global_zero:
            self.towers.save(self.export_to)
