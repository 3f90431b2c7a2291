"""Half precision for frozen weights, float32 for trained ones."""

from __future__ import annotations

import logging
from typing import Any

import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn

from ldm.checkpoint import WEIGHTED
from ldm.util import UserError, best_device

logger = logging.getLogger(__name__)

# `lightning.trainer.precision` -> the precision of matrix products and convolutions.
_KINDS = {
    "16": "16-mixed",
    "16-mixed": "16-mixed",
    "16-true": "16-mixed",
    "bf16": "bf16-mixed",
    "bf16-mixed": "bf16-mixed",
    "bf16-true": "bf16-mixed",
}


class FrozenHalf(MixedPrecision):
    """Autocast with frozen weights that are stored in half precision.

    Autocast caches converted weights only if they are trained, so it converts frozen weights at every use: a tenth of
    the step of a denoiser of 220 million parameters with 32x32 latents on a CPU. This plugin converts the frozen
    linear and convolutional layers of the denoiser and the text encoder once; results are identical. Norms,
    embeddings, the first stage, trained weights, the optimizer and the loss stay in float32. After the run the layers
    are float32 again, with values rounded to half precision.
    """

    def __init__(self, precision: str, device: str) -> None:
        super().__init__(precision, device)  # type: ignore[arg-type]
        self.dtype = _TYPES[precision]
        self._converted: list[nn.Module] = []

    def convert_module(self, module: nn.Module) -> nn.Module:
        parts = [getattr(module, name, None) for name in ("model", "cond_stage_model")]
        for part in [part for part in parts if isinstance(part, nn.Module)]:
            for layer in part.modules():
                if isinstance(layer, WEIGHTED) and not any(p.requires_grad for p in layer.parameters()):
                    self._converted.append(layer.to(self.dtype))
        return module

    def teardown(self) -> None:
        while self._converted:
            self._converted.pop().float()


def plugin_for(precision: Any, accelerator: str) -> FrozenHalf | None:
    """The plugin for a half precision; None for any other, which is left to Lightning.

    Lightning's "true" precisions would also convert the vectors and the optimizer. A bfloat16 has 8 significant bits,
    in which updates of 1e-3 are lost, so here "true" means the same as "mixed".
    """
    kind, device, note = _resolved(precision, accelerator)
    if note:
        logger.info("lightning.trainer.precision: %s; using %s", note, kind or FULL)
    return None if kind is None else FrozenHalf(kind, device)


def half_for(precision: Any, accelerator: str) -> torch.dtype | None:
    """The type that `plugin_for` keeps frozen layers in; None if it leaves them in float32."""
    kind, _, _ = _resolved(precision, accelerator)
    return None if kind is None else _TYPES[kind]


def possible_precision(precision: Any, accelerator: str) -> Any:
    """The precision for Lightning's Trainer: the one asked for, or full precision where the device has no half one.

    Raises:
        UserError: float64 on an Apple GPU, which has none.
    """
    kind, device, _ = _resolved(precision, accelerator)
    if device == "mps" and kind is None and str(precision) in _KINDS:
        return FULL
    return precision


FULL = "32-true"
_TYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


def _resolved(precision: Any, accelerator: str) -> tuple[str | None, str, str]:
    """The half precision that is possible on a device, the device, and why it is not the one asked for."""
    kind = _KINDS.get(str(precision))
    device = {"gpu": "cuda", "auto": best_device()}.get(accelerator, accelerator)
    if device == "cpu" and kind == "16-mixed":
        return "bf16-mixed", device, f"{precision} is not supported on a CPU"
    if device == "cuda" and kind == "bf16-mixed" and _emulates_bfloat16():
        return "16-mixed", device, "this GPU has no bfloat16"
    if device == "mps" and str(precision) in ("64", "64-true"):
        raise UserError(
            f"lightning.trainer.precision is {precision}, but an Apple GPU has no float64; use 32-true"
        )
    if device == "mps" and kind is not None and not torch.backends.mps.is_macos_or_newer(14, 0):
        return None, device, "half precision on an Apple GPU needs macOS 14"
    if device == "mps" and kind == "16-mixed":  # which would need gradients to be scaled
        return "bf16-mixed", device, f"{precision} is not supported on an Apple GPU"
    return kind, device, ""


def _emulates_bfloat16() -> bool:
    """Whether the GPU only emulates bfloat16 (before Ampere), which is slow and needs more memory."""
    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
