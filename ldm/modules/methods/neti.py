"""A small network of timestep and layer in place of a vector (NeTI)."""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.embeddings.method_files import check_dial
from ldm.modules.methods.words import LearnedWords, Rows, check_layers
from ldm.modules.personalization import NO_DENOISER, DenoiserShape, TextEncoder
from ldm.util import UserError, check_integer

# Deviations of the random angles per timestep (of 1000) and per layer, in turns; the paper's 0.03 and 2 are radians.
SIGMAS = (0.03 / (2 * math.pi), 2.0 / (2 * math.pi))
# The first layer begins as the likeness to points on a grid: so many timesteps, from 0 on, and all layers.
ANCHOR_TIMES = 10
_TIMESTEPS = 1000
# Of the sizes in a file.
_LARGEST = 4096


class Mapper(nn.Module):
    """Timestep and layer [..., 2] to the vectors [..., N, d] of a word and their bypass [..., N, d].

    Random Fourier features (Tancik et al. 2020), two hidden layers, and a last one whose bias is where it begins.

    Args:
        layers: K, the number of layers with cross-attention.
        count, width: N and d.
        features, hidden: numbers of frequencies and of hidden units.
    """

    def __init__(self, layers: int, count: int, width: int, features: int, hidden: int) -> None:
        super().__init__()
        anchors = ANCHOR_TIMES * layers
        self.layers, self.count = layers, count
        self.register_buffer("frequencies", torch.zeros(features, 2))
        self.register_buffer("norm", torch.ones(count, 1))
        self.likeness = nn.Linear(2 * features, anchors)
        self.hidden = nn.Sequential(
            nn.Linear(anchors, hidden),
            nn.LayerNorm(hidden),
            nn.LeakyReLU(),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
            nn.LeakyReLU(),
        )
        self.out = nn.Linear(hidden, 2 * count * width)

    def begin(self, initial: Tensor, seed: int) -> None:
        """Draw the weights, so that the vectors are near `initial` [N, d], whose norms they keep."""
        generator = torch.Generator(device="cpu").manual_seed(seed)

        def draw(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, device="cpu").to(like)

        self.get_buffer("frequencies").copy_(
            draw(self.get_buffer("frequencies")) * torch.tensor(SIGMAS, device=initial.device)
        )
        for layer in (self.likeness, *self.hidden, self.out):
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(draw(layer.weight) * layer.in_features**-0.5)
                layer.bias.zero_()
        self.likeness.weight.copy_(self.encoded(self._anchors(initial.device)))
        self.get_buffer("norm").copy_(initial.norm(dim=-1, keepdim=True))
        # Near the initial direction: the sum of the hidden units is about a fifth of it.
        self.out.weight.mul_(0.2 * initial.shape[-1] ** -0.5)
        directions = F.normalize(initial, dim=-1)
        self.out.bias.copy_(torch.stack([directions, 0.1 * draw(directions)]).flatten())

    def encoded(self, points: Tensor) -> Tensor:
        """Fourier features [..., 2 F] of unit length of points [..., 2]."""
        frequencies = self.get_buffer("frequencies")
        angles = 2 * math.pi * (points @ frequencies.T)
        return torch.cat([angles.cos(), angles.sin()], dim=-1) * len(frequencies) ** -0.5

    def _anchors(self, device: torch.device) -> Tensor:
        times = torch.arange(ANCHOR_TIMES, device=device) * (_TIMESTEPS / ANCHOR_TIMES)
        layers = torch.arange(self.layers, device=device, dtype=times.dtype)
        return torch.cartesian_prod(times, layers)

    def forward(self, points: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Use only the first hidden units, as many as `kept` [...] says for each of the points."""
        hidden = self.hidden(self.likeness(self.encoded(points)))
        values = self.out(hidden * (torch.arange(hidden.shape[-1], device=kept.device) < kept[..., None]))
        vectors, bypass = rearrange(values, "... (kind n d) -> kind ... n d", kind=2, n=self.count)
        return F.normalize(vectors, dim=-1) * self.get_buffer("norm"), F.normalize(bypass, dim=-1)


class NeTI(LearnedWords):
    """Vectors from a network of timestep and layer, and a bypass to the values (Alaluf et al. 2023, arXiv 2305.15391).

    The vectors keep the length of the initializer's. The bypass is added to the text encoder's output at the word, for
    values only, with the length `bypass` times that of the output. For half of the images of a training step only the
    first k hidden units are used, k random (nested dropout), so that `truncation` is a dial: in the paper fewer units
    follow the prompt more and the images less, on the embedded model they do less of both. The text encoder runs for
    each layer and timestep.

    Sizes, deviations and anchors are those of the authors' code. It differs in three things: it adds the bypass before
    the encoder's last norm and not after it; its network begins anywhere, this one near the initializer; and it draws
    k anew for each layer, here all layers of an image have the same.

    Args:
        features, hidden: sizes of the network; see `Mapper`.
        nested_dropout: the share of images in training with nested dropout.
        bypass: length of the bypass; 0 is none. A dial.
        denoiser, words: see `LearnedWords`.
    Raises:
        UserError: the denoiser has no cross-attention, or a value is not possible; and what LearnedWords raises.
    """

    method = "neti"
    timed = True

    def __init__(
        self,
        embedder: TextEncoder,
        features: int = 1024,
        hidden: int = 128,
        nested_dropout: float = 0.5,
        bypass: float = 0.2,
        denoiser: DenoiserShape = NO_DENOISER,
        **words: Any,
    ) -> None:
        check_layers(denoiser, "NeTI")
        if not 0 <= nested_dropout <= 1:
            raise UserError(f"personalization_config: nested_dropout is {nested_dropout}; use 0 to 1")
        self.features, self.hidden, self.nested_dropout = features, hidden, nested_dropout
        self._dials: dict[str, float | int] = {"truncation": hidden, "bypass": bypass}
        super().__init__(embedder, denoiser=denoiser, **words)
        self.set_dial("bypass", bypass)

    def new_word(self, count: int) -> Mapper:
        for name in ("features", "hidden"):
            check_integer(getattr(self, name), f"NeTI: {name}")
            if getattr(self, name) > _LARGEST:
                raise UserError(f"NeTI: {name} is {getattr(self, name)}; use at most {_LARGEST}")
        self._dials["truncation"] = self.hidden
        return Mapper(len(self.denoiser.layers), count, self.width, self.features, self.hidden)

    def begin(self, word: nn.Module, initial: Tensor, embedder: TextEncoder, seed: int) -> None:
        assert isinstance(word, Mapper)
        word.begin(initial, seed)

    def input_vectors(self) -> tuple[()]:
        """None: the parameters are a network's."""
        return ()

    def options(self) -> dict[str, float | int]:
        return {"features": self.features, "hidden": self.hidden}

    def dials(self) -> dict[str, float | int]:
        """`truncation`, the number of hidden units in use, and `bypass`, its length relative to the output."""
        return dict(self._dials)

    def set_dial(self, name: str, value: float) -> None:
        if name not in self._dials:
            super().set_dial(name, value)
        check_dial(name, value, self.options())
        self._dials[name] = int(value) if name == "truncation" else float(value)

    def rows_of(self, word: nn.Module, times: Tensor | None) -> Rows:
        first = next(word.parameters())
        if times is None:
            times = torch.tensor([self.denoiser.timesteps / 2], device=first.device)
        times = times.to(first.dtype) * (_TIMESTEPS / self.denoiser.timesteps)
        layers = torch.arange(len(self.denoiser.layers), device=first.device, dtype=first.dtype)
        grid = torch.stack(torch.broadcast_tensors(times[:, None], layers), dim=-1)  # (T, K, 2)
        vectors, bypass = word(grid, self._kept(len(times)).to(first.device, non_blocking=True)[:, None])
        return Rows(vectors, bypass=bypass * self._dials["bypass"] if self._dials["bypass"] else None)

    def _kept(self, count: int) -> Tensor:
        """Numbers [T] of hidden units to use: drawn anew at each call in training, as the dial says otherwise.

        They are on the CPU, where nothing waits for a device.
        """
        if not self.training:
            return torch.full((count,), int(self._dials["truncation"]), device="cpu")
        dropped = torch.rand(count, device="cpu") < self.nested_dropout
        return torch.where(dropped, torch.randint(self.hidden, (count,), device="cpu"), self.hidden)
