"""Training of the attribute judge, on images of seeds that no model is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kornia.augmentation as K
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.creatures.world import ATTRIBUTES
from ldm.evaluation.judge import AttributeJudge, visible_attributes
from ldm.models.optimizers import build_optimizer

_COLUMN = {name: column for column, name in enumerate(ATTRIBUTES)}


class JudgeTraining(pl.LightningModule):
    """Training with the cross-entropy of every attribute that an image shows.

    A batch is {"image": [B, H, W, 3] in [-1, 1], "attributes": int64 [B, 8]}, as from `Creatures(attributes=True)`.

    roughen: probability of each of shift, blur and noise, so that the judge also suits generated images, which are
        less clean than rendered ones.
    export_to: folder in which the judge is saved after training.
    """

    def __init__(
        self,
        tower: Mapping[str, Any],
        roughen: float = 0.5,
        export_to: str | None = None,
        monitor: str | None = None,
        optimizer_config: Mapping[str, Any] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.export_to, self.monitor = export_to, monitor
        self.optimizer_config, self.scheduler_config = optimizer_config, scheduler_config
        self.learning_rate = 1e-3
        self.judge = AttributeJudge(tower)
        self.augment = K.AugmentationSequential(
            K.RandomHorizontalFlip(p=0.5),
            K.RandomAffine(degrees=4.0, translate=(0.05, 0.05), padding_mode="border", p=roughen),
            K.RandomGaussianBlur((3, 3), (0.3, 0.9), p=roughen),
            K.RandomGaussianNoise(std=0.06, p=roughen),
            data_keys=["input"],
        )

    def shared_step(self, batch: Mapping[str, Any], stage: str) -> Tensor:
        """Return the mean loss over attributes, and log the accuracy of each attribute under `stage`."""
        pixels = batch["image"].movedim(-1, 1).to(self.device, torch.float32)
        if stage == "train":
            with torch.no_grad():
                pixels = self.augment(pixels)
        attributes = batch["attributes"].to(self.device)
        losses, log = [], {}
        for name, logits in self.judge.logits(pixels).items():
            visible, target = visible_attributes(name, attributes), attributes[:, _COLUMN[name]]
            weight = visible.float() / visible.sum().clamp(min=1)
            losses.append((F.cross_entropy(logits.float(), target, reduction="none") * weight).sum())
            log[f"{stage}/{name}"] = ((logits.argmax(1) == target) * weight).sum().detach()
        loss = torch.stack(losses).mean()
        log[f"{stage}/loss"] = loss.detach()
        self.log_dict(
            log, prog_bar=True, batch_size=len(pixels), on_step=stage == "train", on_epoch=stage != "train"
        )
        return loss

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.shared_step(batch, "train")

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.shared_step(batch, "val")

    def configure_optimizers(self) -> Any:
        return build_optimizer(
            [{"params": list(self.judge.parameters())}],
            self.learning_rate,
            self.optimizer_config,
            self.scheduler_config,
        )

    def on_fit_end(self) -> None:
        if self.export_to is not None and self.trainer.is_global_zero:
            self.judge.save(self.export_to)
