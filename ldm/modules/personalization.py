"""The plug-in contract: what a personalization must offer, and what the text encoder offers to it.

`personalization_config.target` of a YAML may name any class that fulfils `Personalization`. The rest of the code
never asks which class it is. Derive from `torch.nn.Module` and from `Personalization`, in this order: the five members
that every personalization decides for itself have no default; all others do.

    class Word(nn.Module, Personalization):
        def __init__(self, embedder: TextEncoder, word: str = "*") -> None: ...

The constructor is called as `target(embedder=TextEncoder, **params)` with the `params` of the YAML, before the
weights of a checkpoint are read; one with a parameter `denoiser` is given a `DenoiserShape` too. Parameters are trained
by the model that holds the personalization; they are float32 and saved in the run's state through `state_dict`, as
those of any module.

Contexts. A prompt becomes the context of the denoiser by `Personalization.encode`: by default [B, M, d], the output of
the text encoder, in which `__call__` replaced token embeddings. A personalization that sets `shapes_context` overrides
`encode`, and may return a layered context [B, layers, 1 or 2, M, d]: a row for each of `DenoiserShape.layers`, or one
for all; and in dimension 2 what keys and values are made of, or one for both. It passes through batching, guidance and
prompt weights like a plain one, and can be guided against a plain one. A personalization that sets `timed` is asked to
encode when the denoiser is asked at a timestep, with the timestep of each row. Prompts without a learned word are
encoded plainly in any case. `ldm.modules.methods` has such personalizations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from ldm.modules.prompt_tokenizer import PromptTokenizer
from ldm.util import UserError

# (token ids [B, L], token embeddings [B, L, d]) -> token embeddings [B, L, d]
Replacement: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DenoiserShape:
    """What a personalization may know of the denoiser that it is learned for.

    Attributes:
        layers: the names of its layers with cross-attention, in forward order (`UNetModel.layer_names`).
        timesteps: T, the number of its timesteps.
    """

    layers: tuple[str, ...] = ()
    timesteps: int = 1000


NO_DENOISER = DenoiserShape()


@runtime_checkable
class TextEncoder(Protocol):
    """What a frozen text encoder offers to models, personalizations and training.

    Attributes:
        family: "clip", "bert" or "sdxl"; with the width it says which models can use learned vectors.
        max_length: L, the number of tokens of an encoded prompt, start and end included.
        prompt_tokenizer: text to token ids, placeholders included.
    """

    family: str
    max_length: int
    prompt_tokenizer: PromptTokenizer

    @property
    def token_embedding(self) -> nn.Embedding:
        """The vocabulary's vectors, [V, d]."""
        ...

    @property
    def width(self) -> int:
        """The width d of a token embedding."""
        ...

    @property
    def widths(self) -> tuple[int, ...]:
        """The parts of d: one for each text tower that the encoder consists of, such as (768, 1280)."""
        return (self.width,)

    @property
    def device(self) -> torch.device:
        """Where the vocabulary's vectors are."""
        return self.token_embedding.weight.device

    def token_ids(
        self, text: str | Sequence[str], embedding_manager: Personalization | None = None
    ) -> Tensor:
        """Token ids [B, L] on the encoder's device, with the personalization's placeholders found in the text."""
        ...

    def embed_ids(self, ids: Tensor, embedding_manager: Replacement | None = None) -> Any:
        """Token ids [B, L] as the condition of the denoiser: a context [B, L, d], or a mapping that holds one."""
        ...

    def encode(self, text: str | Sequence[str], embedding_manager: Personalization | None = None) -> Any:
        """Prompts as the condition of the denoiser; the personalization replaces token embeddings."""
        ...


@runtime_checkable
class Personalization(Protocol):
    """Learned words: what is trained, how it enters the text encoder, and how it is saved.

    Attributes:
        string_to_token_dict: placeholder -> the token id (0-dim int64 on the CPU) that stands for it in
            `tokenized_text`. Use `embedder.prompt_tokenizer.placeholder_id(word, index)` for it.
        loaded: whether the vectors come from a file or a checkpoint, and must not be initialised anew.
        method: the name of the method in files of its own; "" for one whose files are vectors of any tool.
        shapes_context: whether `encode` does more than replace token embeddings.
        timed: whether `encode` depends on the timestep.
        adds_loss: whether a training step adds `context_loss` to its loss.
        training_guidance: the scale at which a training step is guided against the negative prompt; 1 is no guidance.
    """

    string_to_token_dict: dict[str, Tensor]
    loaded: bool = False
    method: str = ""
    shapes_context: bool = False
    timed: bool = False
    adds_loss: bool = False
    training_guidance: float = 1.0

    # Without default: what makes a personalization.

    def __call__(self, tokenized_text: Tensor, embedded_text: Tensor) -> Tensor:
        """Token embeddings to go on with: ids [B, L], embeddings [B, L, d] -> a new [B, L, d].

        Called before position embeddings are added; neither input may be changed. An `nn.Module` defines it by
        `forward`.
        """
        ...

    def embedding_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that are trained."""
        ...

    def save(self, path: str | Path) -> None:
        """Write what was learned to a file, whole or not at all."""
        ...

    def load(self, path: str | Path) -> None:
        """Read a file of `save`; UserError for one that does not fit."""
        ...

    # With default: override what applies.

    @property
    def placeholders(self) -> dict[str, int]:
        """Each placeholder with the number of token positions that it takes up in a prompt at present."""
        return dict.fromkeys(self.string_to_token_dict, 1)

    @property
    def initializers(self) -> dict[str, str]:
        """The text at which each placeholder began, as far as it is known; files state it."""
        return {}

    @classmethod
    def check_file(cls, path: str | Path, placeholders: Sequence[str]) -> None:
        """Raise UserError for a file that words of these names cannot begin from; called before a model is read."""
        return None

    def most_positions(self) -> dict[str, int]:
        """Each placeholder with the most positions that it will take up, for the check of the token limit."""
        return self.placeholders

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser trains, as torch's parameter groups; a group with "lr" has a rate of its own."""
        return [{"params": list(self.embedding_parameters())}]

    def input_vectors(self) -> Iterable[nn.Parameter]:
        """The trained vectors [..., d] in place of token embeddings, which a warm start moves; by default all."""
        return self.embedding_parameters()

    def encode(self, embedder: TextEncoder, ids: Tensor, times: Tensor | None = None) -> Tensor:
        """Token ids [B, L] as a context, plain or layered, at timesteps [B], whole or fractional.

        `times` is None where no timestep is known, and always for a personalization that is not `timed`.
        """
        return embedder.embed_ids(ids, self)

    def stage_of(self, times: Tensor) -> Tensor:
        """A number, or a row of numbers, for each of the timesteps [B], equal where `encode` gives the same.

        By default the timestep.
        """
        return times

    def negative_prompt(self, negative: str, prompt: str) -> str:
        """What guidance steers away from under `prompt`, where the user wrote `negative`, which may be empty."""
        return negative

    def context_loss(self, embedder: TextEncoder) -> Tensor:
        """A scalar, weight included, that a training step adds to its loss; asked for with `adds_loss`."""
        return torch.zeros(())

    def dials(self) -> dict[str, float | int]:
        """What can be set when generating, by name, with the present values."""
        return {}

    def set_dial(self, name: str, value: float) -> None:
        """Set one of `dials`; UserError for an unknown name or a value that is not possible."""
        known = ", ".join(self.dials()) or "none"
        raise UserError(f"there is no dial '{name}' of {type(self).__name__}; known are: {known}")

    def absent_parameters(self, captions: Iterable[str]) -> list[nn.Parameter]:
        """Parameters of words that none of the captions holds; the optimiser leaves them alone in that step."""
        return []

    def adopt_settings(self, state: Mapping[str, Tensor]) -> None:
        """Take what decides the names and shapes of tensors from a state dict that is loaded next, if it has such."""
        return None

    def embedding_to_coarse_loss(self) -> Tensor:
        """The distance from the initializers that `embedding_reg_weight` multiplies: a scalar."""
        return torch.zeros(())

    def on_optimizer_step(self, step: int) -> None:
        """Called after each optimizer step with the number of steps done."""
        return None

    def reset(self, embedder: TextEncoder) -> None:
        """Called when the encoder's weights have been read and the vectors did not come with them."""
        return None

    def measure(self, embedder: TextEncoder) -> None:
        """Called when the encoder's weights have been read and the vectors came with them."""
        return None

    def export(self) -> dict[str, Tensor]:
        """Copies [N, d] of the vectors in use by placeholder, float32 on the CPU; empty if there are none to share."""
        return {}

    def take(self, vectors: Mapping[str, Tensor], source: str) -> None:
        """Hold these vectors [N, d] of these placeholders in place of the present ones.

        Raises:
            UserError: they do not fit, or this personalization is not made of such vectors.
        """
        raise UserError(
            f"{source}: {type(self).__name__} cannot use vectors of another tool; load a file of its own"
        )
