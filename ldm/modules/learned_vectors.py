"""Placeholders and their vectors as a module holds them: ids, parameters, how many are in use, state dict."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.initial_vectors import spread
from ldm.modules.insertion import Layout
from ldm.modules.placeholders import check_placeholders, parameter_key
from ldm.modules.tokens import PromptTokenizer
from ldm.util import UserError

logger = logging.getLogger(__name__)


class LearnedVectors(nn.Module):
    """One parameter [N, d] for each placeholder.

    `string_to_token_dict` holds the ids (0-dim int64, on the CPU), `string_to_param_dict` the parameters and
    `initial_embeddings`, as buffers, where those with an initializer began; the names are the checkpoints'. With
    `progressive_step`, a number of optimizer steps, only the first vectors are in use. `loaded` tells vectors of a
    file or a state dict from fresh ones.
    """

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        width: int,
        max_vectors: int,
        progressive_step: int | None,
        progressive_scale: int,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.width, self.max_vectors = width, max_vectors
        self.progressive_step, self.progressive_scale = progressive_step, progressive_scale
        self.loaded = False
        self._hold({}, {})

    @property
    def placeholders(self) -> dict[str, int]:
        """Each placeholder with the number of its vectors in use."""
        limit = self.max_vectors
        if self.progressive_step is not None:
            limit = 1 + self.progressive_step // self.progressive_scale
        return {string: min(len(self.vectors(string)), limit) for string in self.string_to_token_dict}

    def vectors(self, placeholder: str) -> nn.Parameter:
        """All vectors [N, d] of a placeholder, in use or not yet."""
        return self.string_to_param_dict[parameter_key(placeholder)]

    def initial(self, placeholder: str) -> Tensor | None:
        """What the vectors [N, d] were at first, for a placeholder that had an initializer."""
        return dict(self.initial_embeddings.named_buffers()).get(parameter_key(placeholder))

    def table(self) -> Tensor:
        """The vectors of all placeholders, one after the other."""
        vectors = [self.vectors(string) for string in self.string_to_token_dict]
        return torch.cat(vectors) if vectors else torch.zeros(0, self.width)

    def layout(self, device: torch.device) -> Layout:
        """Where each placeholder's vectors lie in `table`; made once for each device and state."""
        if device not in self._layouts:
            in_use = self.placeholders
            self._layouts[device] = Layout.build(
                [int(token) for token in self.string_to_token_dict.values()],
                list(in_use.values()),
                [len(self.vectors(string)) for string in in_use],
                device,
            )
        return self._layouts[device]

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """What is trained: one [N, d] for each placeholder."""
        return self.string_to_param_dict.parameters()

    def absent_parameters(self, captions: Iterable[str]) -> list[nn.Parameter]:
        """The vectors of those placeholders that none of the captions holds."""
        found = self.tokenizer.found(captions, self.string_to_token_dict)
        return [self.vectors(string) for string in self.string_to_token_dict if string not in found]

    def export(self) -> dict[str, Tensor]:
        """Copies [n, d] of the vectors in use, in float32 on the CPU."""
        return {
            string: self.vectors(string).detach()[:count].to("cpu", torch.float32, copy=True)
            for string, count in self.placeholders.items()
        }

    def on_optimizer_step(self, step: int) -> None:
        """Let progressive vectors follow the number of optimizer steps done; it never goes back."""
        if self.progressive_step is None or step <= self.progressive_step:
            return
        before = self.placeholders
        self.progressive_step = step
        if self.placeholders != before:
            self._layouts.clear()
            logger.info("progressive_words: vectors in use from step %d: %s", step, self.placeholders)

    def take(self, vectors: Mapping[str, Tensor], source: str) -> None:
        """Hold these vectors [N, d] of these placeholders in place of the present ones.

        Raises UserError that names `source` if they do not fit the encoder.
        """
        check_placeholders(list(vectors), self.tokenizer)
        for string, value in vectors.items():
            if value.shape[-1] != self.width:
                raise UserError(
                    f"{source}: '{string}' has width {value.shape[-1]}, the text encoder has width "
                    f"{self.width}; use it with the kind of model it was trained for"
                )
            if len(value) > self.max_vectors:
                raise UserError(
                    f"{source}: '{string}' has {len(value)} vectors, a prompt has room for {self.max_vectors}"
                )
        device = next((p.device for p in self.embedding_parameters()), torch.device("cpu"))
        initial = {s: v for s in vectors if (v := self.initial(s)) is not None}
        taken = {string: value.detach().to(device) for string, value in vectors.items()}
        self._hold(taken, stretched(initial, taken))

    def _hold(self, vectors: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> None:
        self.string_to_token_dict = {
            string: torch.tensor(self.tokenizer.placeholder_id(string, index), device="cpu")
            for index, string in enumerate(vectors)
        }
        self.string_to_param_dict = nn.ParameterDict()
        for string, value in vectors.items():  # one by one, because a dict's items would be sorted
            self.string_to_param_dict[parameter_key(string)] = nn.Parameter(value.clone())
        self.initial_embeddings = nn.Module()
        for string, value in initial.items():
            self.initial_embeddings.register_buffer(parameter_key(string), value.clone())
        self._layouts: dict[torch.device, Layout] = {}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.progressive_step is not None:
            destination[prefix + "progressive_step"] = torch.tensor(self.progressive_step)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Let the vector counts and the progress be those of the state dict."""
        step = state_dict.pop(prefix + "progressive_step", None)
        present = {string: self.vectors(string) for string in self.string_to_token_dict}
        keys = {string: f"{prefix}string_to_param_dict.{parameter_key(string)}" for string in present}
        self.loaded |= any(key in state_dict for key in keys.values())
        brought = {string: state_dict.get(keys[string], value) for string, value in present.items()}
        if any(len(brought[string]) != len(value) for string, value in present.items()):
            self.take(brought, "checkpoint")
        if step is not None:
            self.progressive_step = int(step)
            self._layouts.clear()
        super()._load_from_state_dict(state_dict, prefix, *rest)


def stretched(initial: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The initial vectors of those placeholders that are held, as many as there are of each."""
    return {s: v[spread(len(v), len(vectors[s]))] for s, v in initial.items() if s in vectors}
