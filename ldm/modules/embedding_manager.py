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
* `absent_parameters(captions)`, optional: the parameters of words that are in none of the captions; the optimiser
  leaves them alone in a step of these. `measure(embedder)`, optional: told instead of `reset` when the vectors came
  with the weights. `loaded`, optional: whether they came from a file or with weights, and are to begin as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.modules.embedding_pickle import EmbeddingFile, read_embeddings, write_embeddings
from ldm.modules.initial_vectors import initial_vectors
from ldm.modules.insertion import insert_vectors
from ldm.modules.learned_vectors import LearnedVectors, stretched
from ldm.modules.norm_control import NormControl
from ldm.modules.placeholders import as_list, check_placeholders, vector_counts
from ldm.prompts import PER_IMAGE_TOKENS
from ldm.util import UserError

logger = logging.getLogger(__name__)

# Written in place of the id of a placeholder that is no single token: it equals no reader's token.
NO_TOKEN = -1


class EmbeddingManager(LearnedVectors):
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
        norm_control: "fixed" keeps every vector at the vocabulary's mean norm, "limited" lets none grow beyond it;
            None leaves them alone (see ldm.modules.norm_control). `norm_ratio` multiplies that norm.
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
        norm_control: str | None = None,
        norm_ratio: float = 1.0,
        seed: int = 0,
    ) -> None:
        if progressive_scale < 1:
            raise UserError(f"progressive_scale is {progressive_scale}; use 1 or more optimizer steps")
        super().__init__(
            tokenizer=embedder.prompt_tokenizer,
            width=embedder.width,
            max_vectors=embedder.max_length - 2,
            progressive_step=0 if progressive_words else None,
            progressive_scale=progressive_scale,
        )
        self.seed = seed
        self._norms = NormControl(norm_control, norm_ratio)
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
        """Draw the vectors anew from the embedder's token embeddings as they are now.

        Vectors of a file stay; what `embedding_to_coarse_loss` measures from is drawn for them too.
        """
        table = embedder.token_embedding.weight
        self.measure(embedder)
        drawn = {
            string: self._norms.applied(
                initial_vectors(table, self._initializers.get(string, ()), count, self.seed + index)
            )
            for index, (string, count) in enumerate(self._counts.items())
        }
        initial = {string: drawn[string] for string in self._initializers}
        if self.loaded:
            drawn = {string: self.vectors(string) for string in self.string_to_token_dict}
            initial = stretched(initial, drawn)
        self._hold(drawn, initial)

    def measure(self, embedder: Any) -> None:
        """Take the vocabulary's mean norm from the embedder's token embeddings as they are now."""
        self._norms.measure(embedder.token_embedding.weight)

    @torch.no_grad()
    def on_optimizer_step(self, step: int) -> None:
        super().on_optimizer_step(step)
        if self._norms.kind is not None:
            for vectors in self.embedding_parameters():
                vectors.copy_(self._norms.applied(vectors))

    def forward(self, tokenized_text: Tensor, embedded_text: Tensor) -> Tensor:
        """Replace placeholders by their vectors: ids [B, L] and embeddings [B, L, d] -> a new [B, L, d]."""
        if not self.string_to_token_dict:
            return embedded_text
        layout = self.layout(tokenized_text.device)
        return insert_vectors(tokenized_text, embedded_text, self.table(), layout)

    def get_embedding_norms_squared(self) -> Tensor:
        """The squared norm of every vector: [sum of N]."""
        return self.table().square().sum(dim=-1)

    def embedding_to_coarse_loss(self) -> Tensor:
        """The mean squared distance of the vectors in use from where their initializer put them: a scalar."""
        losses = [
            (self.vectors(string)[:count] - initial[:count]).square().sum(dim=-1).mean()
            for string, count in self.placeholders.items()
            if (initial := self.initial(string)) is not None
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
        self.loaded = True
        if file.progressive_step is not None:
            self.progressive_step, self.progressive_scale = file.progressive_step, file.progressive_scale
        elif self.progressive_step is not None:
            most = max(len(vectors) for vectors in file.vectors.values())
            self.progressive_step = (most - 1) * self.progressive_scale

    def _initializer_tokens(self, word: str, count: int) -> list[int]:
        tokens = self.tokenizer.token_ids(word)
        if not tokens:
            raise UserError(f"initializer word '{word}' has no tokens; choose another word")
        if len(tokens) > count:
            logger.warning(
                "initializer '%s' is %d tokens for %d vectors: only some begin one", word, len(tokens), count
            )
        return tokens
