"""How a condition enters the denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.util import ConfigError, instantiate_from_config

Condition = Tensor | Sequence[Tensor] | Mapping[str, Sequence[Tensor]]

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm")


class DiffusionWrapper(nn.Module):
    """Hands a condition to the UNet: as channels (concat), context (crossattn), both (hybrid) or class (adm)."""

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            raise ConfigError(
                f"conditioning_key '{conditioning_key}' is unknown; use one of "
                f"{', '.join(str(key) for key in CONDITIONING_KEYS)}"
            )
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """x: [B, C, H, W]; t: [B]; c_concat: [B, C', H, W] each; c_crossattn: [B, M, d] each (adm: ids [B])."""
        if self.conditioning_key in ("concat", "hybrid"):
            x = torch.cat([x, *c_concat], dim=1)
        if self.conditioning_key in ("crossattn", "hybrid"):
            return self.diffusion_model(x, t, context=torch.cat(list(c_crossattn), dim=1))
        if self.conditioning_key == "adm":
            return self.diffusion_model(x, t, y=c_crossattn[0])
        return self.diffusion_model(x, t)

    def keywords(self, condition: Condition | None) -> dict[str, Sequence[Tensor]]:
        """A condition in any of its forms, as the keywords of `forward`."""
        if condition is None:
            return {}
        if isinstance(condition, Mapping):
            return dict(condition)
        parts = [condition] if isinstance(condition, Tensor) else list(condition)
        return {"c_concat" if self.conditioning_key == "concat" else "c_crossattn": parts}
