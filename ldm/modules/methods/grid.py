"""Vectors and output residuals for each stage of the denoising (ProSpect), for each layer (XTI), or for both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.embeddings.method_files import check_dial
from ldm.modules.methods.words import LearnedWords, Rows, check_layers
from ldm.modules.personalization import NO_DENOISER, DenoiserShape, TextEncoder
from ldm.util import UserError, check_integer, check_together


class Cells(nn.Module):
    """What is learned of a word: `vectors` before the text encoder, and what is added after it, the `residual`.

    Each is [S, K, N, d], without S if all stages have the same, without K if all layers have.
    """

    def __init__(self, vectors: tuple[int, ...], residual: tuple[int, ...], learn_input: bool) -> None:
        super().__init__()
        if learn_input:
            self.vectors = nn.Parameter(torch.zeros(vectors))
        else:
            self.register_buffer("vectors", torch.zeros(vectors))
        if residual:
            self.residual = nn.Parameter(torch.zeros(residual))


class Grid(LearnedWords):
    """Own vectors, and own residuals on the text encoder's output, for each stage and layer, or for one of the two.

    `ProSpect` and `OutputResidual` are cases of it, and so is what they are together: vectors for each stage, which
    cost nothing, and residuals for each layer, for which the text encoder need not run again.

    Args:
        stages: S, equal parts of the timesteps; None learns the same for all.
        layers: own vectors for each layer with cross-attention; the text encoder runs once for each of them.
        residual: also learn a residual on the encoder's output at the word, which begins at zero.
        residual_layers: an own residual for each layer.
        residual_keys: the residuals are for keys and values; if not, for values alone, as NeTI's bypass is, so that
            they do not change where an image attends to the word. They are then in units of the output's length over
            the root of the width, which is about 1 after a layer norm.
        learn_input: learn the vectors before the text encoder; if not, they stay the initializer's.
        residual_rate: the learning rate of the residuals; by default that of the run (`scale_lr`
            does not multiply it).
        strength: multiplies the residuals. A dial, if there are any.
        denoiser, words: see `LearnedWords`.
    Raises:
        UserError: nothing is learned, or a value is not possible; and what LearnedWords raises.
    """

    method = "grid"

    def __init__(
        self,
        embedder: TextEncoder,
        stages: int | None = None,
        layers: bool = False,
        residual: bool = False,
        residual_layers: bool = False,
        residual_keys: bool = True,
        learn_input: bool = True,
        residual_rate: float | None = None,
        strength: float = 1.0,
        denoiser: DenoiserShape = NO_DENOISER,
        **words: Any,
    ) -> None:
        if residual_rate is not None and not residual_rate > 0:
            raise UserError(
                f"personalization_config: residual_rate is {residual_rate}; it must be above 0, or null"
            )
        check_together(learn_input=learn_input, residual=residual, residual_layers=residual_layers)
        # Whole numbers, because a file has these as numbers; no stages are 0.
        self.stages = 0 if stages is None else check_integer(stages, "personalization_config: stages")
        self.layers, self.residual_layers = int(layers), int(residual_layers)
        self.residual, self.residual_keys = int(residual or residual_layers), int(residual_keys)
        self.learn_input, self.residual_rate = learn_input, residual_rate
        self._strength = 1.0
        super().__init__(embedder, denoiser=denoiser, **words)
        self._check()
        if self.residual:
            self.set_dial("strength", strength)

    def new_word(self, count: int) -> Cells:
        self._check()
        self.timed = self.stages > 0
        staged = (self.stages,) if self.stages else ()

        def shape(layers: int) -> tuple[int, ...]:
            return (*staged, *((len(self.denoiser.layers),) if layers else ()), count, self.width)

        return Cells(
            shape(self.layers), shape(self.residual_layers) if self.residual else (), self.learn_input
        )

    def begin(self, word: nn.Module, initial: Tensor, embedder: TextEncoder, seed: int) -> None:
        assert isinstance(word, Cells)
        word.vectors.copy_(initial.expand_as(word.vectors))
        if self.residual:
            word.residual.zero_()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The vectors if they are learned, and the residuals, with a rate of their own if there is one."""
        named = [(name.endswith(".residual"), value) for name, value in self.words.named_parameters()]
        groups: list[dict[str, Any]] = [
            {"params": [value for after, value in named if not after], "name": "vectors"},
            {"params": [value for after, value in named if after], "name": "residual"},
        ]
        if self.residual_rate is not None:
            groups[1]["lr"] = self.residual_rate
        return [group for group in groups if group["params"]]

    def input_vectors(self) -> list[nn.Parameter]:
        """The vectors, if they are learned."""
        return [value for name, value in self.words.named_parameters() if name.endswith(".vectors")]

    def options(self) -> dict[str, float | int]:
        names = ("stages", "layers", "residual", "residual_layers", "residual_keys")
        return {name: getattr(self, name) for name in names}

    def dials(self) -> dict[str, float | int]:
        """`strength`, which multiplies the residuals."""
        return {"strength": self._strength} if self.residual else {}

    def set_dial(self, name: str, value: float) -> None:
        if name not in self.dials():
            super().set_dial(name, value)
        check_dial(name, value, self.options())
        self._strength = float(value)

    def stage_of(self, times: Tensor) -> Tensor:
        """The number of the part that each timestep [B] is in, [B], 0 for the least noise."""
        share = times.float() / self.denoiser.timesteps
        return (share * self.stages).long().clamp(0, self.stages - 1)

    def rows_of(self, word: nn.Module, times: Tensor | None) -> Rows:
        assert isinstance(word, Cells)

        def cells(values: Tensor, layers: int) -> Tensor:
            if not self.stages:
                values = values[None]
            elif times is not None:
                values = values[self.stage_of(times)]
            return values if layers else values[:, None]

        vectors = cells(word.vectors, self.layers)
        if not self.residual:
            return Rows(vectors)
        residual = cells(word.residual, self.residual_layers) * self._strength
        return (
            Rows(vectors, residual)
            if self.residual_keys
            else Rows(vectors, bypass=residual * self.width**-0.5)
        )

    def _check(self) -> None:
        if self.stages > self.denoiser.timesteps:
            raise UserError(
                f"stages is {self.stages}, and the model has {self.denoiser.timesteps} timesteps; use fewer"
            )
        if self.layers or self.residual_layers:
            check_layers(self.denoiser, type(self).__name__)


class ProSpect(Grid):
    """Own vectors for each of `stages` equal parts of the timesteps (Zhang et al. 2023, arXiv 2305.16225).

    The paper learns ten, here four are the default: on the embedded model they do as well, in a file of half the size
    (benchmarks/results/methods_table.md). The early steps, of the most noise, decide layout and colour, the late ones
    texture. The authors' code makes the vectors by an attention block from the initializer; here they are learned
    themselves.

    Args:
        stages: S, the number of parts.
        words: see `LearnedWords`.
    Raises:
        UserError: `stages` is not between 1 and the number of timesteps; and what LearnedWords raises.
    """

    method = "prospect"

    def __init__(self, embedder: TextEncoder, stages: int = 4, **words: Any) -> None:
        super().__init__(embedder, stages=check_integer(stages, "personalization_config: stages"), **words)


class OutputResidual(Grid):
    """A residual on the output of the text encoder at the word, after HiPer (Han et al. 2023, arXiv 2303.08767).

    HiPer replaces the last five positions of an encoded prompt; here the residual is where the word is, so that several
    words can stand in a prompt. The word itself stays the initializer unless `learn_input`; then no gradient passes
    through the text encoder. OneTrainer calls this an output embedding.

    Args:
        learn_input: learn the vectors before the text encoder too.
        residual_rate: the learning rate of the residual; by default that of the run (`scale_lr`
            does not multiply it).
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
        super().__init__(
            embedder,
            residual=True,
            learn_input=learn_input,
            residual_rate=residual_rate,
            strength=strength,
            **words,
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
        check_layers(denoiser, "XTI")
        super().__init__(embedder, denoiser=denoiser, **words)

    def new_word(self, count: int) -> Layers:
        return Layers(self.denoiser.layers, count, self.width)

    def begin(self, word: nn.Module, initial: Tensor, embedder: TextEncoder, seed: int) -> None:
        for vectors in word.parameters():
            vectors.copy_(initial)

    def rows_of(self, word: nn.Module, times: Tensor | None) -> Rows:
        return Rows(torch.stack([word.get_parameter(name) for name in self.denoiser.layers])[None])
