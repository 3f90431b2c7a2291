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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.embedding_pickle import EmbeddingFile, read_embeddings, write_embeddings
from ldm.modules.prompt_tokenizer import (
    PromptTokenizer,
    as_list,
    check_placeholders,
    parameter_key,
    vector_counts,
)
from ldm.prompts import PER_IMAGE_TOKENS
from ldm.util import UserError

logger = logging.getLogger(__name__)

# Vectors that begin at one token would have equal gradients if they were equal: this sets them apart.
REPEAT_NOISE = 0.1


def initial_vectors(table: Tensor, tokens: Sequence[int], count: int, seed: int) -> Tensor:
    """Draw [count, d] from an embedding table [V, d] in float32, on its device, the same for the same seed.

    `tokens` are spread over the vectors in order; a token used again is moved by REPEAT_NOISE of the table's
    deviation. Without tokens, vectors follow the mean and deviation of each dimension.
    """
    table = table.detach().float()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = torch.randn(count, table.shape[1], generator=generator, device="cpu").to(table.device)
    noise = noise * table.std(dim=0)
    if not tokens:
        return table.mean(dim=0) + noise
    rows = [tokens[place] for place in evenly_spaced(len(tokens), count)]
    repeated = [[float(row in rows[:i])] for i, row in enumerate(rows)]
    vectors = table[torch.tensor(rows, device=table.device)]
    return vectors + REPEAT_NOISE * noise * torch.tensor(repeated, device=table.device)


def evenly_spaced(length: int, count: int) -> list[int]:
    """`count` places in a list of `length`, in order and evenly: each of them if they are as many."""
    return [i * length // count for i in range(count)]


@dataclass(frozen=True)
class Layout:
    """For each of P placeholders its id, how many vectors it shows, and the row of its first one: all [P]."""

    ids: Tensor
    widths: Tensor
    offsets: Tensor

    @classmethod
    def build(
        cls, ids: Sequence[int], widths: Sequence[int], rows: Sequence[int], device: torch.device
    ) -> Layout:
        """Lay out placeholders whose vectors follow one another in one table, `rows` of it for each."""
        offsets = [sum(rows[:i]) for i in range(len(rows))]
        return cls(*(torch.tensor(values, device=device) for values in (ids, widths, offsets)))


def insert_vectors(tokens: Tensor, embedded: Tensor, vectors: Tensor, layout: Layout) -> Tensor:
    """Show vectors [R, d] in place of the placeholders among tokens [B, L], embedded [B, L, d].

    A placeholder of several vectors pushes what follows to the right; what passes L falls off. Returns a new
    [B, L, d]; nothing is read back from the device.
    """
    matches = tokens.unsqueeze(-1) == layout.ids  # [B, L, P]
    found, which = matches.any(dim=-1), matches.int().argmax(dim=-1)  # [B, L]
    spans = torch.where(found, layout.widths[which], 1)
    ends = spans.cumsum(dim=1)
    places = torch.arange(ends.shape[1], device=ends.device).repeat(ends.shape[0], 1)
    source = torch.searchsorted(ends, places, right=True)  # the token that each place of the result shows
    nth = places - (ends - spans).gather(1, source)
    found = found.gather(1, source)
    rows = torch.where(found, layout.offsets[which].gather(1, source) + nth, 0)
    shifted = embedded.gather(1, source.unsqueeze(-1).expand_as(embedded))
    return torch.where(found.unsqueeze(-1), vectors.to(embedded.dtype)[rows], shifted)


def place_after_insertion(tokens: Tensor, places: Tensor, widths: Mapping[int, int]) -> Tensor:
    """Where the tokens at places [B] of prompts [B, L] stand once placeholders show their vectors.

    `widths` says how many vectors each placeholder's id shows. What passes L is given as if there were room.
    """
    before = torch.arange(tokens.shape[1], device=tokens.device) < places.unsqueeze(-1)
    for token, width in widths.items():
        places = places + (width - 1) * ((tokens == token) & before).sum(dim=-1)
    return places


KINDS = (None, "fixed", "limited")


class NormControl:
    """Holds vectors to `ratio` times the mean norm of a vocabulary.

    Textual inversion lets norms grow to many times those of words, and prompts are then followed badly; Directional
    Textual Inversion (Kim et al., ICLR 2026) writes a vector as m v with m the vocabulary's mean norm and learns only
    the direction v on the unit sphere. `fixed` is that as a projection after each optimizer step, which works with
    any optimiser; the paper finds its own step along the sphere better still (its ablation: text .463 and likeness
    .335 with AdamW and projection, .522 and .450 with its step). `limited` projects only what is longer, for words
    differ in length.
    """

    def __init__(self, kind: str | None, ratio: float = 1.0) -> None:
        if kind not in KINDS:
            raise UserError(f"norm_control is '{kind}'; use fixed, limited or null")
        if not ratio > 0:
            raise UserError(f"norm_ratio is {ratio}; it must be above 0")
        self.kind = kind
        self.ratio = float(ratio)
        self.norm = 1.0

    def measure(self, table: Tensor) -> None:
        """Take the mean norm from an embedding table [V, d]."""
        if self.kind is not None:
            self.norm = self.ratio * float(table.detach().float().norm(dim=1).mean())

    def applied(self, vectors: Tensor) -> Tensor:
        """The vectors [N, d] at the length that is allowed; a vector of zeros has no direction and stays."""
        if self.kind is None:
            return vectors
        factor = self.norm / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return vectors * (factor.clamp(max=1.0) if self.kind == "limited" else factor)


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

    def most_positions(self) -> dict[str, int]:
        """Each placeholder with the number of all its vectors, in use or not yet."""
        return {string: len(self.vectors(string)) for string in self.string_to_token_dict}

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
    return {s: v[evenly_spaced(len(v), len(vectors[s]))] for s, v in initial.items() if s in vectors}


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
            None leaves them alone (see ldm.modules.embedding_manager). `norm_ratio` multiplies that norm.
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
