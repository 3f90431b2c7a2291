"""A vector for each stage of the denoising (ProSpect) or for each layer (XTI)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.methods.words import LearnedWords, Rows
from ldm.modules.personalization import NO_DENOISER, DenoiserShape, TextEncoder
from ldm.util import UserError, check_integer


class Stages(nn.Module):
    """The vectors [S, N, d] of a word, one after the other from the least noise to the most."""

    def __init__(self, stages: int, count: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(stages, count, width))


class ProSpect(LearnedWords):
    """Own vectors for each of `stages` equal parts of the timesteps (Zhang et al. 2023, arXiv 2305.16225).

    The paper learns ten, here four are the default: of the variants tried on the embedded model four gained most over
    one vector at the same time. The early steps, of the most noise, decide layout and colour, the late ones texture.

    Args:
        stages: S, the number of parts.
        words: see `LearnedWords`.
    Raises:
        UserError: `stages` is not between 1 and the number of timesteps; and what LearnedWords raises.
    """

    method = "prospect"
    timed = True

    def __init__(self, embedder: TextEncoder, stages: int = 4, **words: Any) -> None:
        check_integer(stages, "personalization_config: stages")
        self.stages = stages
        super().__init__(embedder, **words)
        self._check_stages()

    def new_word(self, count: int) -> Stages:
        self._check_stages()
        return Stages(self.stages, count, self.width)

    def begin(self, word: nn.Module, initial: Tensor, embedder: TextEncoder, seed: int) -> None:
        word.get_parameter("vectors").copy_(initial.expand_as(word.get_parameter("vectors")))

    def options(self) -> dict[str, float | int]:
        return {"stages": self.stages}

    def stage_of(self, times: Tensor) -> Tensor:
        """The number of the part that each timestep [B] is in, [B], 0 for the least noise."""
        share = times.float() / self.denoiser.timesteps
        return (share * self.stages).long().clamp(0, self.stages - 1)

    def rows_of(self, word: nn.Module, times: Tensor | None) -> Rows:
        vectors = word.get_parameter("vectors")
        return Rows((vectors if times is None else vectors[self.stage_of(times)])[:, None])

    def _check_stages(self) -> None:
        if self.stages > self.denoiser.timesteps:
            raise UserError(
                f"stages is {self.stages}, and the model has {self.denoiser.timesteps} timesteps; use fewer"
            )


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
        if not denoiser.layers:
            raise UserError(
                "XTI needs a denoiser whose cross-attention layers are known, such as a UNetModel"
            )
        super().__init__(embedder, denoiser=denoiser, **words)

    def new_word(self, count: int) -> Layers:
        return Layers(self.denoiser.layers, count, self.width)

    def begin(self, word: nn.Module, initial: Tensor, embedder: TextEncoder, seed: int) -> None:
        for vectors in word.parameters():
            vectors.copy_(initial)

    def rows_of(self, word: nn.Module, times: Tensor | None) -> Rows:
        return Rows(torch.stack([word.get_parameter(name) for name in self.denoiser.layers])[None])
