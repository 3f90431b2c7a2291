"""Half precision for what is frozen, float32 for what is learned."""

from __future__ import annotations

import logging
from typing import Any

import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn

logger = logging.getLogger(__name__)

# What `lightning.trainer.precision` says, by the arithmetic of matrix products and convolutions.
_KINDS = {
    "16": "16-mixed",
    "16-mixed": "16-mixed",
    "16-true": "16-mixed",
    "bf16": "bf16-mixed",
    "bf16-mixed": "bf16-mixed",
    "bf16-true": "bf16-mixed",
}
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)


class FrozenHalf(MixedPrecision):
    """Autocast over weights that lie in half precision already.

    Autocast alone converts every weight at every use, for its cache is for trained weights only: a tenth of a step
    of a denoiser of 220 million parameters at 32x32 latents on a CPU. Here the frozen
    linear and convolutional layers of the denoiser and the text encoder are converted once, with the very same
    numbers; norms, embeddings, the first stage and all that is trained stay in float32, and so do the optimiser and
    the loss. After the run the layers are float32 again, with the precision of the half.
    """

    def __init__(self, precision: str, device: str) -> None:
        super().__init__(precision, device)  # type: ignore[arg-type]
        self.dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
        self._converted: list[nn.Module] = []

    def convert_module(self, module: nn.Module) -> nn.Module:
        for name in ("model", "cond_stage_model"):
            for layer in getattr(module, name, None).modules() if hasattr(module, name) else ():
                if isinstance(layer, _WEIGHTED) and not any(p.requires_grad for p in layer.parameters()):
                    self._converted.append(layer.to(self.dtype))
        return module

    def teardown(self) -> None:
        while self._converted:
            self._converted.pop().float()


def plugin_for(precision: Any, accelerator: str) -> FrozenHalf | None:
    """What takes the place of Lightning's own plugin for a precision, if that is a half one.

    Lightning's "true" precisions would convert the vectors and the optimiser too, and steps of 1e-3 are lost in the
    8 bits of a bfloat16; they mean the same as "mixed" here.
    """
    kind = _KINDS.get(str(precision))
    if kind is None:
        return None
    device = {"gpu": "cuda", "auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(
        accelerator, accelerator
    )
    if device == "cpu" and kind == "16-mixed":
        logger.info("lightning.trainer.precision: %s is not for the CPU; using bf16-mixed", precision)
        kind = "bf16-mixed"
    if device == "cuda" and kind == "bf16-mixed" and _emulates_bfloat16():
        logger.info("lightning.trainer.precision: this GPU has no bfloat16; using 16-mixed")
        kind = "16-mixed"
    return FrozenHalf(kind, device)


def _emulates_bfloat16() -> bool:
    """GPUs before Ampere take it, but slowly and with more memory."""
    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
