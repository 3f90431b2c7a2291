"""A residual on the text encoder's output at the word."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.methods.words import LearnedWords, Rows
from ldm.modules.personalization import TextEncoder
from ldm.util import UserError


class Residual(nn.Module):
    """The vectors [N, d] of a word before the text encoder, and what is added after it, [N, d]."""

    def __init__(self, count: int, width: int, learn_input: bool) -> None:
        super().__init__()
        if learn_input:
            self.vectors = nn.Parameter(torch.zeros(count, width))
        else:
            self.register_buffer("vectors", torch.zeros(count, width))
        self.residual = nn.Parameter(torch.zeros(count, width))


class OutputResidual(LearnedWords):
    """A residual on the output of the text encoder at the word, after HiPer (Han et al. 2023, arXiv 2303.08767).

    HiPer replaces the last five positions of an encoded prompt; here the residual is where the word is, so that several
    words can stand in a prompt. The word itself stays the initializer unless `learn_input`; then no gradient passes
    through the text encoder. OneTrainer calls this an output embedding.

    Args:
        learn_input: learn the vectors before the text encoder too.
        residual_rate: the learning rate of the residual; by default that of the run.
        strength: multiplies the residual. A dial; HiPer generates with 0.8.
        words: see `LearnedWords`.
    Raises:
        UserError: a value is not possible; and what LearnedWords raises.
    """

    method = "output"

    def __init__(
        self,
        embedder: TextEncoder,
        learn_input: bool = False,
        residual_rate: float | None = None,
        strength: float = 1.0,
        **words: Any,
    ) -> None:
        if residual_rate is not None and not residual_rate > 0:
            raise UserError(
                f"personalization_config: residual_rate is {residual_rate}; it must be above 0, or null"
            )
        self.learn_input, self.residual_rate = learn_input, residual_rate
        self._dials: dict[str, float | int] = {}
        self.set_dial("strength", strength)
        super().__init__(embedder, **words)

    def new_word(self, count: int) -> Residual:
        return Residual(count, self.width, self.learn_input)

    def begin(self, word: nn.Module, initial: Tensor, embedder: TextEncoder, seed: int) -> None:
        assert isinstance(word, Residual)
        word.vectors.copy_(initial)
        word.residual.zero_()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The residuals, with a rate of their own if there is one, and the vectors if they are learned."""
        named = [(name.endswith(".residual"), value) for name, value in self.words.named_parameters()]
        residuals: dict[str, Any] = {"params": [value for after, value in named if after], "name": "residual"}
        if self.residual_rate is not None:
            residuals["lr"] = self.residual_rate
        vectors = [value for after, value in named if not after]
        return [*([{"params": vectors, "name": "vectors"}] if vectors else []), residuals]

    def dials(self) -> dict[str, float | int]:
        """`strength`, which multiplies the residual."""
        return dict(self._dials)

    def set_dial(self, name: str, value: float) -> None:
        if name != "strength":
            super().set_dial(name, value)
        if not 0 <= value <= 2:
            raise UserError(f"the dial strength is {value:g}; use 0 to 2")
        self._dials[name] = float(value)

    def rows_of(self, word: nn.Module, times: Tensor | None) -> Rows:
        assert isinstance(word, Residual)
        residual = word.residual * self._dials["strength"]
        return Rows(word.vectors[None, None], residual=residual[None, None])
