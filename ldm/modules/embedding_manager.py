"""The learned vectors of placeholder words, and their way into the text encoder.

`personalization_config.target` may name any nn.Module with this interface:

* `__init__(embedder, **params)`: `embedder` is the text encoder, with `token_embedding` (nn.Embedding), `width`,
  `max_length` and `prompt_tokenizer`; params come from the YAML.
* `string_to_token_dict`: placeholder -> the id (0-dim int64 on the CPU) under which `forward` will see it.
* `forward(tokenized_text [B, L], embedded_text [B, L, d]) -> [B, L, d]`: the token embeddings to go on with.
* `placeholders`: placeholder -> number of vectors in use.
* `embedding_parameters()`: what is trained. `save(path)`, `load(path)`: its file. `export()`: its vectors.
* `embedding_to_coarse_loss()`: what `embedding_reg_weight` multiplies.
* `on_optimizer_step(step)`: told after each optimizer step how many there were.
* `reset(embedder)`: told when the encoder's weights arrived after the constructor.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.embedding_pickle import EmbeddingFile, read_embeddings, write_embeddings
from ldm.modules.initial_vectors import initial_vectors, spread
from ldm.modules.insertion import Layout, insert_vectors
from ldm.modules.placeholders import as_list, check_placeholders, parameter_key, vector_counts
from ldm.prompts import PER_IMAGE_TOKENS
from ldm.util import UserError

logger = logging.getLogger(__name__)

# Written in place of the id of a placeholder that is no single token: it equals no reader's token.
NO_TOKEN = -1


class EmbeddingManager(nn.Module):
    """Replaces each placeholder in an embedded prompt by its vectors.

    Args:
        embedder: the text encoder (see the module's docstring); it is read, not kept.
        placeholder_strings: the words to learn; any strings.
        initializer_words: a text for each placeholder, in order, whose token embeddings its vectors begin at;
            where it is None, empty or missing, they are drawn from the vocabulary's statistics.
        per_image_tokens: also learn one placeholder for each training image (ldm.prompts.PER_IMAGE_TOKENS).
        num_vectors_per_token: vectors for each placeholder: a number, a list in order, or a mapping.
        progressive_words: begin with one vector and add one every `progressive_scale` optimizer steps.
        embedding_manager_ckpt: a file to begin from; it must hold all placeholders.
        seed: of the draws; the global generators are not touched.

    Raises UserError for what does not fit together.
    """

    def __init__(
        self,
        embedder: Any,
        placeholder_strings: Sequence[str] | None = None,
        initializer_words: Sequence[str | None] | None = None,
        per_image_tokens: bool = False,
        num_vectors_per_token: int | Sequence[int] | Mapping[str, int] = 1,
        progressive_words: bool = False,
        progressive_scale: int = 2000,
        embedding_manager_ckpt: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if progressive_scale < 1:
            raise UserError(f"progressive_scale is {progressive_scale}; use 1 or more optimizer steps")
        self.tokenizer = embedder.prompt_tokenizer
        self.width, self.max_vectors = embedder.width, embedder.max_length - 2
        self.progressive_scale = progressive_scale
        self.progressive_step: int | None = 0 if progressive_words else None
        self.seed = seed
        self.string_to_token_dict: dict[str, Tensor] = {}
        self.string_to_param_dict = nn.ParameterDict()
        self.initial_embeddings = nn.Module()

        strings, words = as_list(placeholder_strings), as_list(initializer_words)
        if len(words) > len(strings):
            raise UserError(
                f"{len(words)} initializer_words for {len(strings)} placeholder_strings; give one for each"
            )
        every = [*strings, *(PER_IMAGE_TOKENS if per_image_tokens else ())]
        check_placeholders(every, self.tokenizer)
        for string in filter(self.tokenizer.is_word, strings):
            logger.warning("placeholder '%s' is an ordinary word, which prompts can then not mean", string)
        self._counts = vector_counts(strings, every, num_vectors_per_token, self.max_vectors)
        self._initializers = {
            string: self._initializer_tokens(word, self._counts[string])
            for string, word in zip(strings, words, strict=False)
            if word
        }
        self.reset(embedder)
        if embedding_manager_ckpt:
            self.load(embedding_manager_ckpt, require=every)

    def reset(self, embedder: Any) -> None:
        """Draw the vectors anew from the embedder's token embeddings as they are now; not those of a file."""
        if not self._counts:
            return
        table = embedder.token_embedding.weight
        vectors = {
            string: initial_vectors(table, self._initializers.get(string, ()), count, self.seed + index)
            for index, (string, count) in enumerate(self._counts.items())
        }
        self._hold(vectors, {string: vectors[string] for string in self._initializers})

    def forward(self, tokenized_text: Tensor, embedded_text: Tensor) -> Tensor:
        """Replace placeholders by their vectors: ids [B, L] and embeddings [B, L, d] -> a new [B, L, d]."""
        if not self.string_to_token_dict:
            return embedded_text
        layout = self._layout(tokenized_text.device)
        return insert_vectors(tokenized_text, embedded_text, self._table(), layout)

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

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """What is trained: one [N, d] for each placeholder."""
        return self.string_to_param_dict.parameters()

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

    def get_embedding_norms_squared(self) -> Tensor:
        """The squared norm of every vector: [sum of N]."""
        return self._table().square().sum(dim=-1)

    def embedding_to_coarse_loss(self) -> Tensor:
        """The mean squared distance of the vectors in use from where their initializer put them: a scalar."""
        initial = dict(self.initial_embeddings.named_buffers())
        losses = [
            (self.vectors(string)[:count] - initial[parameter_key(string)][:count])
            .square()
            .sum(dim=-1)
            .mean()
            for string, count in self.placeholders.items()
            if parameter_key(string) in initial
        ]
        return torch.stack(losses).mean() if losses else torch.zeros(())

    def save(self, path: str | Path) -> None:
        """Write the original's file, all vectors included; a progressive run adds its step and scale."""
        vectors = {string: self.vectors(string) for string in self.string_to_token_dict}
        scale = None if self.progressive_step is None else self.progressive_scale
        ids = {string: int(token) for string, token in self.string_to_token_dict.items()}
        known = {
            string: token if token < self.tokenizer.vocab_size else NO_TOKEN for string, token in ids.items()
        }
        write_embeddings(path, EmbeddingFile(vectors, self.progressive_step, scale), known)

    def load(self, path: str | Path, require: Sequence[str] = ()) -> None:
        """Take the placeholders and vectors of a file in place of those held; ids come from the encoder.

        A file without progressive step has all its vectors in use. Raises UserError if a placeholder of
        `require` is absent or the vectors do not fit the encoder.
        """
        file = read_embeddings(path)
        absent = [string for string in require if string not in file.vectors]
        if absent:
            held = "', '".join(file.vectors)
            raise UserError(
                f"embedding file '{path}' holds no '{absent[0]}', only '{held}'; "
                f"name another file or another placeholder"
            )
        self.take(file.vectors, f"embedding file '{path}'")
        if file.progressive_step is not None:
            self.progressive_step, self.progressive_scale = file.progressive_step, file.progressive_scale
        elif self.progressive_step is not None:
            most = max(len(vectors) for vectors in file.vectors.values())
            self.progressive_step = (most - 1) * self.progressive_scale

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
        initial = dict(self.initial_embeddings.named_buffers())
        kept = {
            string: spread(initial[parameter_key(string)], len(value))
            for string, value in vectors.items()
            if parameter_key(string) in initial
        }
        device = next((p.device for p in self.embedding_parameters()), torch.device("cpu"))
        self._hold({string: value.detach().to(device) for string, value in vectors.items()}, kept)
        self._counts = {}

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

    def _table(self) -> Tensor:
        vectors = [self.vectors(string) for string in self.string_to_token_dict]
        return torch.cat(vectors) if vectors else torch.zeros(0, self.width)

    def _layout(self, device: torch.device) -> Layout:
        if device not in self._layouts:
            in_use = self.placeholders
            self._layouts[device] = Layout.build(
                [int(token) for token in self.string_to_token_dict.values()],
                list(in_use.values()),
                [len(self.vectors(string)) for string in in_use],
                device,
            )
        return self._layouts[device]

    def _initializer_tokens(self, word: str, count: int) -> list[int]:
        tokens = self.tokenizer.token_ids(word)
        if not tokens:
            raise UserError(f"initializer word '{word}' has no tokens; choose another word")
        if len(tokens) > count:
            logger.warning(
                "initializer '%s' is %d tokens for %d vectors: only some begin one", word, len(tokens), count
            )
        return tokens

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.progressive_step is not None:
            destination[prefix + "progressive_step"] = torch.tensor(self.progressive_step)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Let the vector counts and the progress be those of the state dict."""
        step = state_dict.pop(prefix + "progressive_step", None)
        brought = {
            string: state_dict.get(f"{prefix}string_to_param_dict.{parameter_key(string)}")
            for string in self.string_to_token_dict
        }
        if any(new is not None and len(new) != len(self.vectors(string)) for string, new in brought.items()):
            self.take(
                {string: self.vectors(string) if new is None else new for string, new in brought.items()},
                "checkpoint",
            )
        if step is not None:
            self.progressive_step = int(step)
            self._layouts.clear()
        super()._load_from_state_dict(state_dict, prefix, *rest)
