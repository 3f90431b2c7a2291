"""LPIPS (Zhang et al. 2018): distance between VGG-16 features, with weights from a local file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ldm import pickles
from ldm.util import ConfigError, pretrained_wanted

# Convolutions of VGG-16 by slice: (index in torchvision's `features`, in channels, out channels).
_SLICES = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)


class LPIPS(nn.Module):
    """Perceptual distance of two pictures [B, 3, H, W] in [-1, 1], as [B, 1, 1, 1].

    `ckpt` is a state dict that holds VGG-16 in torchvision's naming (`features.0.weight` or
    `net.slice1.0.weight`) and the heads as `lin0.model.1.weight`. Raises ConfigError if weights are missing.
    """

    def __init__(self, ckpt: str | None) -> None:
        super().__init__()
        self.register_buffer(
            "shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None], persistent=False
        )
        self.register_buffer(
            "scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None], persistent=False
        )
        self.features = nn.ModuleDict(
            {str(index): nn.Conv2d(cin, cout, 3, padding=1) for part in _SLICES for index, cin, cout in part}
        )
        self.heads = nn.ModuleList(nn.Conv2d(part[-1][2], 1, 1, bias=False) for part in _SLICES)
        if pretrained_wanted():
            self._read(ckpt)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = x.new_zeros(x.shape[0], 1, 1, 1)
        a, b = ((image - self.shift) / self.scale for image in (x, y))
        for level, (part, head) in enumerate(zip(_SLICES, self.heads, strict=True)):
            if level:
                a, b = nn.functional.max_pool2d(a, 2), nn.functional.max_pool2d(b, 2)
            for index, _, _ in part:
                conv = self.features[str(index)]
                a, b = conv(a).relu(), conv(b).relu()
            difference = (nn.functional.normalize(a, dim=1) - nn.functional.normalize(b, dim=1)) ** 2
            total = total + head(difference).mean(dim=(2, 3), keepdim=True)
        return total

    def _read(self, ckpt: str | None) -> None:
        if ckpt is None or not Path(ckpt).is_file():
            raise ConfigError(
                f"the perceptual loss needs VGG-16 and LPIPS weights, 'perceptual_ckpt' is {ckpt!r}; "
                "name the file or set perceptual_weight: 0"
            )
        state = pickles.load(ckpt)
        own = {}
        for key, value in state.items():
            parts = key.split(".")
            if parts[0].startswith("lin"):
                own[f"heads.{parts[0][3:]}.weight"] = value
            elif parts[-1] in ("weight", "bias") and parts[-2].isdigit() and parts[-2] in self.features:
                own[f"features.{parts[-2]}.{parts[-1]}"] = value
        missing = self.state_dict().keys() - own.keys()
        if missing:
            raise ConfigError(f"'{ckpt}' lacks {len(missing)} LPIPS weights, such as '{min(missing)}'")
        self.load_state_dict(own)
