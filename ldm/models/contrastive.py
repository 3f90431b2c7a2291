"""Training of a small CLIP, whose text tower then conditions a latent diffusion model as FrozenCLIPEmbedder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.optim import build_optimizer
from ldm.models.two_towers import TwoTowers

_LARGEST_SCALE = math.log(100.0)


class ContrastiveCLIP(pl.LightningModule):
    """Two towers that learn which caption belongs to which picture (symmetric InfoNCE, learnt temperature).

    A batch is {"image": [B, H, W, 3] in [-1, 1], "caption": list[str]}. `text_encoder` and `image_tower` are those
    of `TwoTowers`. `attributes` maps names to numbers of values: batches then also carry "attributes" [B, A] in that
    order, and linear heads on the image tower, used in training only, learn them with weight `attribute_weight`.
    A batch that carries "foil", list[str], makes each picture tell its caption from its foil too.
    When training ends the towers are saved in `export_to`, if it is given.
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
        """Unit features of pictures [B, H, W, 3] and captions, [B, d] each, and the image tower's states [B, width]."""
        states = self.towers.image_states(images.movedim(-1, 1).to(self.device, torch.float32))
        pictures = F.normalize(self.towers.image_projection(states), dim=-1)
        return pictures, self.towers.text_features(captions), states

    def contrastive_loss(
        self, images: Tensor, texts: Tensor, wrong: Tensor | None = None, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """InfoNCE both ways of unit features [B, d], and the share of captions whose own picture is nearest.

        `wrong` [B, d] are the features of each picture's foil: one more caption that it must not be taken for,
        where `counts` [B] (bool) says so.
        """
        scale, images, texts = self.towers.logit_scale.exp(), images.float(), texts.float()
        logits = scale * texts @ images.t()
        target = torch.arange(len(logits), device=logits.device)
        of_image = logits.t()
        if wrong is not None:
            confusion = scale * (images * wrong.float()).sum(1)
            of_image = torch.cat([of_image, confusion.masked_fill(~counts, -torch.inf)[:, None]], 1)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(of_image, target)) / 2
        return loss, (logits.argmax(1) == target).float().mean()

    def shared_step(self, batch: Mapping[str, Any], stage: str) -> Tensor:
        """The batch's loss, its parts logged under `stage`."""
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
        """Step, and hold the temperature in its bounds before any callback can save it."""
        super().optimizer_step(*arguments, **keywords)
        with torch.no_grad():
            self.towers.logit_scale.clamp_(0.0, _LARGEST_SCALE)

    def configure_optimizers(self) -> Any:
        """The YAML's optimiser and schedule; biases, norms and the temperature are never decayed."""
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        return build_optimizer(groups, self.learning_rate, self.optimizer_config, self.scheduler_config)

    def on_fit_end(self) -> None:
        if self.export_to is not None and self.trainer.is_global_zero:
            self.towers.save(self.export_to)
