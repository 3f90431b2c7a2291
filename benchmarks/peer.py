"""A training loop in the manner of diffusers' textual inversion example, on our weights.

Facts about that example: the whole token embedding table is the trained parameter, in float32; after each step every
row but the new word's is put back; pictures are encoded at every step; in half precision the denoiser and the first
stage are cast once, while the text encoder stays in float32 and runs under autocast; attention is torch's fused one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class DiffusersLoop:
    """Steps of such a loop; call it for one.

    Args:
        pipeline: a StableDiffusionPipeline; its parts are changed.
        tokens: captions to ids [B, L] in which the id after the last row of the table is the new word.
        first: the vector [d] that the new word begins at.
        batches: yields {"image": [B, H, W, 3], "caption": [B]} on `device`.
        precision: "float32" or "bfloat16", of the frozen parts.
    """

    def __init__(
        self,
        pipeline: Any,
        tokens: Callable[[Sequence[str]], Tensor],
        first: Tensor,
        batches: Iterator[Mapping[str, Any]],
        device: torch.device,
        precision: str,
        rate: float,
    ) -> None:
        self.dtype, self.device = PRECISIONS[precision], device
        self.tokens, self.batches = tokens, batches
        self.scheduler = pipeline.scheduler
        self.first_stage = pipeline.vae.requires_grad_(False).to(device, self.dtype).eval()
        self.denoiser = pipeline.unet.requires_grad_(False).to(device, self.dtype).eval()
        self.encoder = pipeline.text_encoder.float().requires_grad_(False).to(device).train()
        rows = self.encoder.get_input_embeddings().num_embeddings
        self.encoder.resize_token_embeddings(rows + 1, mean_resizing=False)
        self.table = self.encoder.get_input_embeddings().weight.requires_grad_(True)
        with torch.no_grad():
            self.table[rows] = first.to(self.table)
        self.before = self.table.detach().clone()
        self.others = torch.ones(rows + 1, dtype=torch.bool, device=device)
        self.others[rows] = False
        self.optimizer = torch.optim.AdamW([self.table], lr=rate, weight_decay=0.01)

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        pictures = batch["image"].movedim(-1, 1).to(self.dtype)
        latents = self.first_stage.encode(pictures).latent_dist.sample().detach()
        latents = latents * self.first_stage.config.scaling_factor
        count = self.scheduler.config.num_train_timesteps
        t = torch.randint(0, count, (len(latents),), device=self.device)
        noise = torch.randn_like(latents)
        noisy = self.scheduler.add_noise(latents, noise, t)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype != torch.float32):
            context = self.encoder(self.tokens(batch["caption"]).to(self.device))[0]
        predicted = self.denoiser(noisy, t, context.to(self.dtype)).sample
        target = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, t)
        return F.mse_loss(predicted.float(), target.float())

    def __call__(self) -> float:
        loss = self.loss(next(self.batches))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.table[self.others] = self.before[self.others]
        return float(loss.detach())
