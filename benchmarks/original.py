"""The training step with the arithmetic of the original code, on our weights.

Facts about the original: float32; the first stage encodes the pictures at every step; attention is a product, a
softmax and a product, in the denoiser, the first stage and CLIP alike; the frozen parts have no gradients and
nothing is computed twice, because the switch for checkpointing was never read; AdamW with torch's settings moves the
vectors. Its Lightning loop is left out, to its advantage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.twin import twin
from ldm.modules import attention
from ldm.modules.diffusionmodules import model as first_stage
from ldm.modules.diffusionmodules import openaimodel
from ldm.modules.encoders import modules

_USERS = (attention, openaimodel, first_stage)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention as three operations: q [B, H, N, d], k and v [B, H, M, d] -> [B, H, N, d]."""
    b, h = q.shape[:2]
    q, k, v = (x.reshape(b * h, *x.shape[2:]) for x in (q, k, v))
    similarity = torch.einsum("bnd,bmd->bnm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bnm,bmd->bnd", similarity.softmax(dim=-1), v).unflatten(0, (b, h))


@contextmanager
def unfused() -> Iterator[None]:
    """Within this block denoisers and first stages attend by `plain_attention`, and CLIP in its way of that."""
    ours = {module: module.attend for module in _USERS}
    is_short = modules.is_short
    for module in _USERS:
        module.attend = plain_attention
    modules.is_short = lambda queries, keys, device: True
    try:
        yield
    finally:
        for module, attend in ours.items():
            module.attend = attend
        modules.is_short = is_short


class OriginalLoop:
    """Steps of the original's arithmetic with vectors of its own; call it for one.

    `batches` yields {"image": [B, H, W, 3], "caption": [B]} on `device`.
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
