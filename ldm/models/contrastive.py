"""Training of a small CLIP, whose text tower then conditions a latent diffusion model as FrozenCLIPEmbedder."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizerFast, CLIPVisionConfig

from ldm.files import write_text, write_whole
from ldm.util import UserError

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
_LARGEST_SCALE = math.log(100.0)


class ContrastiveCLIP(pl.LightningModule):
    """Two CLIP towers that learn which caption belongs to which picture (symmetric InfoNCE, learnt temperature).

    A batch is {"image": [B, H, W, 3] in [-1, 1], "caption": list[str]}. `text_encoder` is a folder with
    tokenizer files and the text tower's config.json; `vision` holds parameters of transformers' CLIPVisionModel.
    `attributes` maps names to numbers of values: batches then also carry "attributes" [B, A] in that order, and
    linear heads on the image tower, used in training only, learn them with weight `attribute_weight`.
    When training ends the towers are written to `export_to` (see `export`), if it is given.
    """

    def __init__(
        self,
        text_encoder: str,
        vision: Mapping[str, Any],
        attributes: Mapping[str, int] | None = None,
        attribute_weight: float = 1.0,
        total_steps: int = 1000,
        warmup_steps: int = 50,
        weight_decay: float = 0.05,
        image_key: str = "image",
        caption_key: str = "caption",
        export_to: str | None = None,
        monitor: str | None = None,
    ) -> None:
        super().__init__()
        self.text_encoder, self.export_to, self.monitor = Path(text_encoder), export_to, monitor
        self.image_key, self.caption_key = image_key, caption_key
        self.attribute_weight, self.weight_decay = attribute_weight, weight_decay
        self.total_steps, self.warmup_steps = total_steps, warmup_steps
        self.learning_rate = 1e-3
        for name in (*_TOKENIZER_FILES, "config.json"):
            if not (self.text_encoder / name).is_file():
                raise UserError(f"text encoder folder {text_encoder} lacks {name}")
        self.tokenizer = CLIPTokenizerFast.from_pretrained(text_encoder)
        text = CLIPTextConfig.from_pretrained(text_encoder)
        width = text.projection_dim
        config = CLIPConfig(
            text_config=text.to_dict(),
            vision_config=CLIPVisionConfig(projection_dim=width, **vision).to_dict(),
            projection_dim=width,
            # Sequences this short are faster without the fused kernel, forward and backward, on a CPU.
            attn_implementation="eager",
        )
        self.clip = CLIPModel(config)
        hidden = config.vision_config.hidden_size
        self.heads = nn.ModuleDict(
            {name: nn.Linear(hidden, count) for name, count in (attributes or {}).items()}
        )

    def tokenize(self, captions: list[str]) -> Tensor:
        """Token ids [B, L], padded and cut to the text tower's positions."""
        length = self.clip.config.text_config.max_position_embeddings
        ids = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        longest = int((ids != self.tokenizer.pad_token_id).sum(1).max()) + 1
        return ids[:, :longest].to(self.device)  # what follows the end token changes nothing before it

    def forward(self, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Unit features of pictures [B, H, W, 3] and of captions, [B, d] each, and the image tower's state [B, h]."""
        pixels = images.movedim(-1, 1).to(self.device, torch.float32)
        state = self.clip.vision_model(pixel_values=pixels).pooler_output
        ends = self.clip.text_model(input_ids=self.tokenize(captions)).pooler_output
        images, texts = self.clip.visual_projection(state), self.clip.text_projection(ends)
        return F.normalize(images, dim=-1), F.normalize(texts, dim=-1), state

    def contrastive_loss(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """InfoNCE both ways of unit features [B, d], and the share of captions whose own picture is nearest."""
        logits = self.clip.logit_scale.exp() * texts.float() @ images.float().t()
        target = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
        return loss, (logits.argmax(1) == target).float().mean()

    def shared_step(self, batch: Mapping[str, Any], stage: str) -> Tensor:
        """The batch's loss, its parts logged under `stage`."""
        images, texts, state = self(batch[self.image_key], list(batch[self.caption_key]))
        loss, recall = self.contrastive_loss(images, texts)
        log = {f"{stage}/contrastive": loss.detach(), f"{stage}/recall": recall}
        if self.heads:
            wanted = batch["attributes"].to(self.device).unbind(1)
            errors = [
                F.cross_entropy(head(state), values)
                for head, values in zip(self.heads.values(), wanted, strict=True)
            ]
            attribute_loss = torch.stack(errors).mean()
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

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            self.clip.logit_scale.clamp_(0.0, _LARGEST_SCALE)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW at `learning_rate`, warmed up, then along a cosine to zero after `total_steps`."""
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.98))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rate(self, step: int) -> float:
        progress = min(1.0, step / max(1, self.total_steps))
        return min(1.0, (step + 1) / max(1, self.warmup_steps)) * 0.5 * (1 + math.cos(math.pi * progress))

    def on_fit_end(self) -> None:
        if self.export_to is not None and self.trainer.is_global_zero:
            self.export(self.export_to)

    def export(self, folder: str | Path) -> None:
        """Writes `text_encoder/` (for FrozenCLIPEmbedder) and `clip/` (both towers, for transformers' CLIPModel).

        Both hold configuration, tokenizer and float32 weights. Raises UserError when `folder` cannot be written.
        """
        folder = Path(folder)
        state = {
            key: value.detach().float().cpu().contiguous() for key, value in self.clip.state_dict().items()
        }
        text = {key: value for key, value in state.items() if key.startswith("text_model.")}
        for name, weights in (("text_encoder", text), ("clip", state)):
            target = folder / name
            for file in _TOKENIZER_FILES:
                write_text(target / file, (self.text_encoder / file).read_text(encoding="utf-8"))
            data = save(weights, metadata={"format": "pt"})
            write_whole(target / "model.safetensors", lambda file, data=data: file.write(data))
        write_text(
            folder / "text_encoder" / "config.json",
            (self.text_encoder / "config.json").read_text(encoding="utf-8"),
        )
        write_text(folder / "clip" / "config.json", self.clip.config.to_json_string())
        write_text(
            folder / "clip" / "preprocessor_config.json", json.dumps(self._preprocessing(), indent=1) + "\n"
        )
        logger.info("CLIP written to %s", folder)

    def _preprocessing(self) -> dict[str, Any]:
        size = self.clip.config.vision_config.image_size
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"height": size, "width": size},
            "do_center_crop": False,
            "do_rescale": True,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
