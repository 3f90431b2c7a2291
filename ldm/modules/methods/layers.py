"""A vector for each layer with cross-attention (XTI)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.methods.words import LearnedWords, Rows, check_layers
from ldm.modules.personalization import NO_DENOISER, DenoiserShape, TextEncoder


class Layers(nn.Module):
    """The vectors of a word, one parameter [N, d] for each layer under the layer's name."""

    def __init__(self, names: tuple[str, ...], count: int, width: int) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(count, width)))


class XTI(LearnedWords):
    """Own vectors for each layer with cross-attention: extended textual inversion, P+ (Voynov et al. 2023, 2303.09522).

    The inner layers carry shape, the outer ones appearance. The text encoder runs once for each layer. A file of one
    word is what the tools of XTI read and write: a tensor for each layer, named IN01, ..., MID, ..., OUT11.

    Args:
        words: see `LearnedWords`.
    Raises:
        UserError: the denoiser has no cross-attention; and what LearnedWords raises.
    """

    method = "xti"

    def __init__(self, embedder: TextEncoder, denoiser: DenoiserShape = NO_DENOISER, **words: Any) -> None:
        check_layers(denoiser, "XTI")
        super().__init__(embedder, denoiser=denoiser, **words)

    def new_word(self, count: int) -> Layers:
        return Layers(self.denoiser.layers, count, self.width)

    def begin(self, word: nn.Module, initial: Tensor, embedder: TextEncoder, seed: int) -> None:
        for vectors in word.parameters():
            vectors.copy_(initial)

    def rows_of(self, word: nn.Module, times: Tensor | None) -> Rows:
        return Rows(torch.stack([word.get_parameter(name) for name in self.denoiser.layers])[None])
