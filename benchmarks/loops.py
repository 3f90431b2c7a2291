"""The loops that are timed against ours: the original's arithmetic and one like diffusers', on the same weights."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate


def batches(dataset: Any, size: int, device: torch.device, distinct: int = 8) -> Iterator[dict[str, Any]]:
    """Return an endless iterator of batches {"image": [B, H, W, 3], "caption": [B]}; they repeat after `distinct`.

    All are made in advance, so that no timing includes loading and decoding.
    """
    prepared = [
        default_collate([dataset[(number * size + i) % len(dataset)] for i in range(size)])
        for number in range(distinct)
    ]
    return itertools.cycle([{**batch, "image": batch["image"].to(device)} for batch in prepared])


def twin(model: nn.Module) -> nn.Module:
    """Copy a model: frozen parameters share memory with the original, trained ones are copied.

    Moving or casting one of the two gives it new memory and leaves the other as it is.
    """
    shared = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in model.parameters()
        if not parameter.requires_grad
    }
    with torch.no_grad():
        return copy.deepcopy(model, shared)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax attention by three operations: q [B, H, N, d], k and v [B, H, M, d] -> [B, H, N, d]."""
    b, h = q.shape[:2]
    q, k, v = (x.reshape(b * h, *x.shape[2:]) for x in (q, k, v))
    similarity = torch.einsum("bnd,bmd->bnm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bnm,bmd->bnd", similarity.softmax(dim=-1), v).unflatten(0, (b, h))


@cache
def _replacements() -> list[tuple[ModuleType, str, Callable[..., Any], Callable[..., Any]]]:
    """List (module, name, function, replacement) for every module of ldm that uses fused attention."""
    replaced = {"attend": plain_attention, "is_short": lambda queries, keys, device: True}
    modules = [module for name, module in sys.modules.items() if name.startswith("ldm.")]
    return [
        (module, name, getattr(module, name), replacement)
        for name, replacement in replaced.items()
        for module in modules
        if hasattr(module, name)
    ]


@contextmanager
def unfused() -> Iterator[None]:
    """Use `plain_attention` in denoisers and first stages, and the equivalent implementation in CLIP."""
    for module, name, _, replacement in _replacements():
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for module, name, function, _ in _replacements():
            setattr(module, name, function)


class OriginalLoop:
    """Training steps with the arithmetic of the original code, on our weights; a call runs one step.

    Facts about the original: float32; the first stage encodes the images at every step; attention is a product, a
    softmax and a product, in the denoiser, the first stage and CLIP; frozen parts have no gradients; nothing is
    recomputed, because the option for gradient checkpointing was never read; AdamW has torch's settings. Its Lightning
    loop is left out, which makes it faster.

    model: is copied, so that the loop trains vectors of its own.
    batches: yields {"image": [B, H, W, 3], "caption": [B]} on `device`.
    """

    def __init__(
        self, model: nn.Module, batches: Iterator[Mapping[str, Any]], device: torch.device, rate: float
    ) -> None:
        self.model = twin(model).float().to(device).train()
        self.batches = batches
        for part in self.model.modules():
            if getattr(part, "use_checkpoint", False):
                part.use_checkpoint = False
        self.vectors = list(self.model.embedding_manager.embedding_parameters())
        self.optimizer = torch.optim.AdamW(self.vectors, lr=rate)

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        with unfused():
            loss, _ = self.model.shared_step(batch)
        return loss

    def __call__(self) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(next(self.batches))
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class DiffusersLoop:
    """Training steps like those of diffusers' textual inversion example, on our weights; a call runs one step.

    Facts about that example: the trained parameter is the whole token embedding table in float32, and after each step
    every row except the new word's is restored; images are encoded at every step; in half precision the denoiser and
    the first stage are cast once, while the text encoder stays in float32 and runs under autocast; attention is
    torch's fused one.

    pipeline: a StableDiffusionPipeline, which is modified.
    tokens: maps captions to ids [B, L]; the new word has the first id after the table.
    first: initial vector [d] of the new word.
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
        images = batch["image"].movedim(-1, 1).to(self.dtype)
        latents = self.first_stage.encode(images).latent_dist.sample().detach()
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
