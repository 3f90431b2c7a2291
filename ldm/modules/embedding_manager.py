"""The learned vectors of placeholder words: where they begin, how they enter a prompt, how they are saved.

`EmbeddingManager` is the personalization of the original; `ldm.modules.personalization` describes the contract that it
fulfils.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.embeddings import Concept, LearnedEmbeddings, Progress, concepts_of, write
from ldm.embeddings.reader import chosen, read_to_begin
from ldm.modules.personalization import Personalization, TextEncoder
from ldm.modules.prompt_tokenizer import (
    Layout,
    PromptTokenizer,
    check_placeholders,
    check_room,
    insert_vectors,
)
from ldm.prompts import PER_IMAGE_TOKENS
from ldm.util import UserError, check_integer, pretrained_wanted
from ldm.words import check_text, paired, vector_counts

logger = logging.getLogger(__name__)

# Several vectors that begin at the same token would stay equal, because their gradients would be equal.
REPEAT_NOISE = 0.1
NORM_CONTROLS = (None, "fixed", "limited")
# Private characters, which no prompt contains.
_DOT, _ESCAPE = "\ue02e", "\ue000"
_RESERVED_NAMES = frozenset(dir(nn.ParameterDict())) | frozenset(dir(nn.Module()))


class EmbeddingManager(nn.Module, Personalization):
    """Replace each placeholder in an embedded prompt by its learned vectors (Gal et al. 2022, section 3).

    The state dict has the original's names: `string_to_param_dict.<placeholder>` [N, d], the trained vectors, and
    `initial_embeddings.<placeholder>` [N, d], where those with an initializer began.

    Args:
        embedder: the text encoder; it is read, not kept.
        placeholder_strings: the words to learn; any strings.
        initializer_words: a text for each placeholder, in order; the vectors begin at the embeddings of its tokens.
            Where it is None, empty or missing, they are drawn with the mean and deviation of the vocabulary.
        per_image_tokens: also learn one placeholder for each training image (ldm.prompts.PER_IMAGE_TOKENS).
        num_vectors_per_token: vectors per placeholder: one number, a list in order, or a mapping by placeholder.
        progressive_words: begin with one vector and add one every `progressive_scale` optimizer steps.
        embedding_manager_ckpt: an embedding file of any tool to begin from. It holds all placeholders by name, or it
            holds one word, which continues as the only placeholder; the numbers of vectors are the file's.
        norm_control: "fixed" keeps every vector at the mean norm of the vocabulary, "limited" keeps it from growing
            beyond that, None does neither. See `NormControl`.
        norm_ratio: multiplies that mean norm.
        seed: of the random initial vectors; the global generators are not used.
        cross_init: begin at what the text encoder makes of the initializer, see `encoded_tokens`.
    Raises:
        UserError: the arguments do not fit together or do not fit the encoder.
    """

    def __init__(
        self,
        embedder: TextEncoder,
        placeholder_strings: str | Sequence[str] | None = None,
        initializer_words: str | Sequence[str | None] | None = None,
        per_image_tokens: bool = False,
        num_vectors_per_token: int | Sequence[int] | Mapping[str, int] = 1,
        progressive_words: bool = False,
        progressive_scale: int = 2000,
        embedding_manager_ckpt: str | Path | None = None,
        norm_control: str | None = None,
        norm_ratio: float = 1.0,
        seed: int = 0,
        cross_init: bool = False,
    ) -> None:
        super().__init__()
        check_integer(progressive_scale, "progressive_scale")
        self.tokenizer, self.family = embedder.prompt_tokenizer, embedder.family
        self.width, self.max_vectors = embedder.width, embedder.max_length - 2
        self.progressive_step: int | None = 0 if progressive_words else None
        self.progressive_scale = progressive_scale
        self.seed, self.cross_init = seed, cross_init
        self.loaded = False
        self._stated: Mapping[str, str] = {}
        self.widths = embedder.widths
        self._norms = NormControl(norm_control, norm_ratio, self.widths)
        self._set_vectors({}, {})

        strings, self._counts, self._initializers = configured_words(
            self.tokenizer,
            placeholder_strings,
            initializer_words,
            num_vectors_per_token,
            self.max_vectors,
            PER_IMAGE_TOKENS if per_image_tokens else (),
        )
        self.reset(embedder)
        if embedding_manager_ckpt:
            self._begin_from(embedding_manager_ckpt, strings)

    # -- vectors and placeholders ----------------------------------------------------------------------------

    def vectors(self, placeholder: str) -> nn.Parameter:
        """All vectors [N, d] of a placeholder, in use or not yet."""
        return self.string_to_param_dict[parameter_key(placeholder)]

    def initial(self, placeholder: str) -> Tensor | None:
        """The initial vectors [N, d] of a placeholder; None without an initializer."""
        return dict(self.initial_embeddings.named_buffers()).get(parameter_key(placeholder))

    @property
    def placeholders(self) -> dict[str, int]:
        """Each placeholder with the number of its vectors in use."""
        limit = self.max_vectors
        if self.progressive_step is not None:
            limit = 1 + self.progressive_step // self.progressive_scale
        return {string: min(count, limit) for string, count in self.most_positions().items()}

    @property
    def initializers(self) -> dict[str, str]:
        """The text at which each placeholder began: that of the file that it comes from, or the configured one."""
        known = {**self._initializers, **self._stated}
        return {string: text for string, text in known.items() if string in self.string_to_token_dict}

    def most_positions(self) -> dict[str, int]:
        """Each placeholder with the number of all its vectors."""
        return {string: len(self.vectors(string)) for string in self.string_to_token_dict}

    def table(self) -> Tensor:
        """The vectors of all placeholders, in order: [sum of N, d]."""
        vectors: list[Tensor] = [self.vectors(string) for string in self.string_to_token_dict]
        return torch.cat(vectors) if vectors else torch.zeros(0, self.width)

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """The trained parameters: one [N, d] for each placeholder."""
        return self.string_to_param_dict.parameters()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trained parameters as torch's group; `parts` are the widths in it of an encoder of several towers."""
        parts = {"parts": self.widths} if len(self.widths) > 1 else {}
        return [{"params": list(self.embedding_parameters()), **parts}]

    def absent_parameters(self, captions: Iterable[str]) -> list[nn.Parameter]:
        """The vectors of the placeholders that no caption contains."""
        found = self.tokenizer.found(captions, self.string_to_token_dict)
        return [self.vectors(string) for string in self.string_to_token_dict if string not in found]

    def negative_prompt(self, negative: str, prompt: str) -> str:
        """The negative prompt with the word W-neg for each word W of the prompt, if it is learned and not there yet."""
        return self.tokenizer.negative_prompt(negative, prompt, self.string_to_token_dict)

    def export(self) -> dict[str, Tensor]:
        """Copies [n, d] of the vectors in use, float32 on the CPU."""
        return {
            string: self.vectors(string).detach()[:count].to("cpu", torch.float32, copy=True)
            for string, count in self.placeholders.items()
        }

    def take(self, vectors: Mapping[str, Tensor], source: str) -> None:
        """Hold these vectors [N, d] of these placeholders in place of the present ones.

        Raises:
            UserError: they do not fit the encoder; it names `source`.
        """
        check_placeholders(list(vectors), self.tokenizer)
        for string, value in vectors.items():
            if value.shape[-1] != self.width:
                raise UserError(
                    f"{source}: '{string}' has width {value.shape[-1]}, the text encoder has width "
                    f"{self.width}; use it with the kind of model it was trained for"
                )
        check_room({string: len(value) for string, value in vectors.items()}, self.max_vectors, source)
        device = next((p.device for p in self.embedding_parameters()), torch.device("cpu"))
        initial = {s: v for s in vectors if (v := self.initial(s)) is not None}
        taken = {string: value.detach().to(device) for string, value in vectors.items()}
        self._set_vectors(taken, _resampled(initial, taken))

    def _set_vectors(self, vectors: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> None:
        self.string_to_token_dict = self.tokenizer.placeholder_ids(vectors)
        self.string_to_param_dict = nn.ParameterDict()
        for string, value in vectors.items():  # one by one: a ParameterDict would sort the items of a dict
            self.string_to_param_dict[parameter_key(string)] = nn.Parameter(value.clone())
        self.initial_embeddings = nn.Module()
        for string, value in initial.items():
            self.initial_embeddings.register_buffer(parameter_key(string), value.clone())
        self._layouts: dict[torch.device, Layout] = {}

    # -- initialisation --------------------------------------------------------------------------------------

    def reset(self, embedder: TextEncoder) -> None:
        """Initialise the vectors from the present token embeddings of the encoder.

        Vectors that were loaded stay; only their initial vectors, for `embedding_to_coarse_loss`, are set.
        """
        table = embedder.token_embedding.weight
        self.measure(embedder)
        # The constructor may run before the encoder's weights are there; then this is called again.
        known = pretrained_wanted()
        vectors = {}
        for index, (string, count) in enumerate(self._counts.items()):
            tokens = self.tokenizer.token_ids(self._initializers.get(string, ""))
            rows = encoded_tokens(embedder, tokens) if self.cross_init and tokens and known else None
            first = initial_vectors(table, tokens, count, self.seed + index, rows)
            vectors[string] = self._norms.applied(first)
        initial = {string: vectors[string] for string in self._initializers}
        if self.loaded:
            vectors = {string: self.vectors(string).data for string in self.string_to_token_dict}
            initial = _resampled(initial, vectors)
        self._set_vectors(vectors, initial)

    def measure(self, embedder: TextEncoder) -> None:
        """Take the mean norm of the vocabulary from the present token embeddings of the encoder."""
        self._norms.measure(embedder.token_embedding.weight)

    # -- training --------------------------------------------------------------------------------------------

    def forward(self, tokenized_text: Tensor, embedded_text: Tensor) -> Tensor:
        """Replace placeholders by their vectors: ids [B, L], embeddings [B, L, d] -> a new [B, L, d]."""
        if not self.string_to_token_dict:
            return embedded_text
        layout = self._layout(tokenized_text.device)
        return insert_vectors(tokenized_text, embedded_text, self.table(), layout)

    def _layout(self, device: torch.device) -> Layout:
        """Where the vectors of each placeholder are in `table`; kept per device until the numbers change."""
        if device not in self._layouts:
            self._layouts[device] = Layout.build(
                [int(token) for token in self.string_to_token_dict.values()],
                list(self.placeholders.values()),
                list(self.most_positions().values()),
                device,
            )
        return self._layouts[device]

    @torch.no_grad()
    def on_optimizer_step(self, step: int) -> None:
        """Apply the norm control, and add progressive vectors; their number never decreases."""
        if self._norms.kind is not None:
            for vectors in self.embedding_parameters():
                vectors.copy_(self._norms.applied(vectors))
        if self.progressive_step is None or step <= self.progressive_step:
            return
        before = self.placeholders
        self.progressive_step = step
        if self.placeholders != before:
            self._layouts.clear()
            logger.info("progressive_words: vectors in use from step %d: %s", step, self.placeholders)

    def get_embedding_norms_squared(self) -> Tensor:
        """The squared norm of every vector: [sum of N]."""
        return self.table().square().sum(dim=-1)

    def embedding_to_coarse_loss(self) -> Tensor:
        """The mean squared distance of the vectors in use from their initial vectors: a scalar.

        With `cross_init` it is the mean distance, as in the paper of that.
        """
        squares = [
            (self.vectors(string)[:count] - initial[:count]).square().sum(dim=-1)
            for string, count in self.placeholders.items()
            if (initial := self.initial(string)) is not None
        ]
        if self.cross_init:  # the small number is for the gradient at the beginning
            squares = [(square + 1e-12).sqrt() for square in squares]
        return torch.stack([square.mean() for square in squares]).mean() if squares else torch.zeros(())

    # -- files and state -------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the original's file, vectors not yet in use included."""
        used, initializers = self.export(), self.initializers
        progress = None
        if self.progressive_step is not None:
            progress = Progress(self.progressive_step, self.progressive_scale)
        concepts: list[Concept] = []
        for (string, place), count in zip(
            self.string_to_token_dict.items(), self.most_positions().values(), strict=True
        ):
            token, vectors = int(place), used[string]
            concepts += concepts_of(
                string,
                vectors,
                self.family,
                token=token if token < self.tokenizer.vocab_size else None,
                unused=self.vectors(string)[len(vectors) :] if len(vectors) < count else None,
                initializer=initializers.get(string),
            )
        write(LearnedEmbeddings(tuple(concepts), progress=progress), path, "original")

    def load(self, path: str | Path) -> None:
        """Take placeholders and vectors from an embedding file of any format, in place of the present ones.

        All vectors of a file without progress are in use.

        Raises:
            UserError: the file cannot be read, or does not fit the encoder.
        """
        self._hold(read_to_begin(path), path, {})

    @classmethod
    def check_file(cls, path: str | Path, placeholders: Sequence[str]) -> None:
        """Raise UserError for a file that does not hold these words, nor one word for the only one."""
        chosen(read_to_begin(path), placeholders, str(path))

    def _begin_from(self, path: str | Path, strings: Sequence[str]) -> None:
        """Take the vectors of these placeholders from a file, see `chosen`; others stay where the file lacks them."""
        found = read_to_begin(path)
        others = [string for string in self.string_to_token_dict if string not in strings]
        learned = chosen(found, strings, str(path), optional=others)
        if unnamed := [word[:60] for word in found.triggers if word not in learned.triggers]:
            renamed = [string for string in strings if string not in found.triggers]
            fate = f"continues as '{renamed[0]}'" if renamed else "is no placeholder and is left out"
            more = f" and {len(unnamed) - 1} more" if len(unnamed) > 1 else ""
            logger.info("'%s'%s of '%s' %s", unnamed[0], more, path, fate)
        present = {s: self.vectors(s).data for s in self.string_to_token_dict}
        self._hold(learned, path, present)
        for string in strings:
            count, asked = len(self.vectors(string)), self._counts[string]
            if count != asked:
                level = logging.INFO if asked == 1 else logging.WARNING
                text = "'%s' has the %d vector%s of '%s'; num_vectors_per_token, which is %d, is not used"
                logger.log(level, text, string, count, "s" * (count != 1), path, asked)

    def _hold(self, learned: LearnedEmbeddings, path: str | Path, present: Mapping[str, Tensor]) -> None:
        """Take the vectors of a file, and those at present of the words that it lacks, in the present order."""
        whole = learned.vectors_for(self.width, self.family, unused=True)
        self.take({**present, **whole}, f"embedding file '{path}'")
        self.loaded, self._stated = True, learned.initializers
        if learned.progress is not None:
            self.progressive_step, self.progressive_scale = learned.progress.step, learned.progress.scale
        elif self.progressive_step is not None:
            self.progressive_step = (max(self.most_positions().values()) - 1) * self.progressive_scale
        self._layouts.clear()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.progressive_step is not None:
            destination[prefix + "progressive_step"] = torch.tensor(self.progressive_step)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Adopt the numbers of vectors and the progress of the state dict."""
        step = state_dict.pop(prefix + "progressive_step", None)
        present = {string: self.vectors(string) for string in self.string_to_token_dict}
        keys = {string: f"{prefix}string_to_param_dict.{parameter_key(string)}" for string in present}
        self.loaded |= any(key in state_dict for key in keys.values())
        given = {string: state_dict.get(keys[string], value) for string, value in present.items()}
        if any(len(given[string]) != len(value) for string, value in present.items()):
            self.take(given, "checkpoint")
        if step is not None:
            self.progressive_step = int(step)
            self._layouts.clear()
        super()._load_from_state_dict(state_dict, prefix, *rest)


# -- names and numbers from a YAML ---------------------------------------------------------------------------


def parameter_key(placeholder: str) -> str:
    """The name of a placeholder in a state dict: the placeholder, but without dots and names of attributes."""
    key = placeholder.replace(".", _DOT)
    return _ESCAPE + key if key in _RESERVED_NAMES else key


def configured_words(
    tokenizer: PromptTokenizer,
    placeholder_strings: Sequence[str] | str | None,
    initializer_words: Sequence[str | None] | str | None,
    num_vectors_per_token: int | Sequence[int] | Mapping[str, int],
    limit: int,
    further: Sequence[str] = (),
) -> tuple[list[str], dict[str, int], dict[str, str]]:
    """The words that a YAML configures: those it names, all with their numbers of vectors, and the initializers.

    `further` placeholders have one vector and no initializer. A placeholder that is an ordinary word is a warning.

    Raises:
        UserError: a word is not allowed, the lists do not fit together, or an initializer has no tokens.
    """
    strings, words = paired(placeholder_strings, initializer_words)
    placeholders = check_placeholders([*strings, *further], tokenizer)
    strings = placeholders[: len(strings)]
    for string in filter(tokenizer.is_word, strings):
        logger.warning("placeholder '%s' is an ordinary word, and prompts lose its ordinary meaning", string)
    counts = vector_counts(strings, placeholders, num_vectors_per_token, limit)
    initializers = {string: word for string, word in zip(strings, words, strict=False) if word}
    for string, word in initializers.items():
        check_initializer(tokenizer, word, counts[string])
    return strings, counts, initializers


# -- initial vectors and their norm --------------------------------------------------------------------------


def check_initializer(tokenizer: PromptTokenizer, word: str, count: int) -> None:
    """Warn of an initializer with more tokens than `count` vectors; UserError for one that has none."""
    tokens = tokenizer.token_ids(check_text(word, "initializer word"))
    if not tokens:
        raise UserError(f"initializer word '{word}' has no tokens; choose another word")
    if len(tokens) > count:
        logger.warning(
            "initializer '%s' is %d tokens for %d vector%s: not all of them are used",
            word,
            len(tokens),
            count,
            "s" * (count > 1),
        )


def initial_vectors(
    table: Tensor, tokens: Sequence[int], count: int, seed: int, rows: Tensor | None = None
) -> Tensor:
    """Initial vectors [count, d] from an embedding table [V, d]: float32, on its device, equal for equal seeds.

    `tokens` are distributed over the vectors in order; where a token is used again, noise of REPEAT_NOISE times the
    table's deviation is added. Without tokens, vectors are normally distributed with the mean and deviation of each
    dimension of the table. `rows` [n, d] are what is taken in place of the table's rows of the n tokens; the noise is
    then relative to the root mean square of a row.
    """
    table = table.detach().float()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = torch.randn(count, table.shape[1], generator=generator, device="cpu").to(table.device)
    if not tokens:
        return table.mean(dim=0) + noise * table.std(dim=0)
    places = evenly_spaced(len(tokens), count)
    used = [tokens[place] for place in places]
    repeated = [[float(token in used[:i])] for i, token in enumerate(used)]
    if rows is None:
        vectors, unit = table[torch.tensor(used, device=table.device)], table.std(dim=0)
    else:
        vectors = rows.to(table)[places]
        unit = vectors.square().mean(dim=1, keepdim=True).sqrt()
    return vectors + REPEAT_NOISE * noise * unit * torch.tensor(repeated, device=table.device)


@torch.no_grad()
def encoded_tokens(embedder: TextEncoder, tokens: Sequence[int]) -> Tensor:
    """The encoder's output [n, d] at the n tokens of a prompt that is nothing else.

    Cross Initialization (Pang et al., CVPR 2024) begins there, because learned vectors end near such outputs, far from
    the vocabulary. It takes the place of more than ten times as many steps in the paper.

    Raises:
        UserError: its output has another width than its token embeddings.
    """
    tokenizer = embedder.prompt_tokenizer
    ids = torch.tensor([tokenizer.row(tokens)], device=embedder.token_embedding.weight.device)
    output = embedder.embed_ids(ids, None)
    states = output["c_crossattn"][0] if isinstance(output, dict) else output
    encoded: Tensor = states[0, 1 : 1 + len(tokens)].float()
    if encoded.shape[-1] != embedder.width:
        raise UserError(
            f"cross_init: the text encoder's output is {encoded.shape[-1]} wide and its embeddings {embedder.width}; "
            "set it to false"
        )
    return encoded


def evenly_spaced(length: int, count: int) -> list[int]:
    """`count` indices into a list of `length`, increasing and evenly spaced; with repeats if `count` is larger."""
    return [i * length // count for i in range(count)]


def _resampled(initial: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The initial vectors of the placeholders in `vectors`, as many for each as there are vectors."""
    return {s: v[evenly_spaced(len(v), len(vectors[s]))] for s, v in initial.items() if s in vectors}


class NormControl:
    """Keep vectors at `ratio` times the mean norm of a vocabulary.

    In textual inversion norms grow to many times those of words, and the model then follows prompts badly.
    Directional Textual Inversion (Kim et al., ICLR 2026) writes a vector as m v, with m the vocabulary's mean norm,
    and learns only the direction v on the unit sphere. `fixed` projects to that norm after each optimizer step, which
    works with any optimizer; the paper's own step along the sphere (`ldm.models.optimizers.SphereSGD`) is better still
    (its ablation: text .463 and likeness .335 with AdamW and projection, .522 and .450 with its step). `limited`
    projects only vectors that are longer, because words differ in norm. `widths` are the parts of the vectors for the
    towers of an encoder; each part has the norm of its own vocabulary.

    Raises:
        UserError: an unknown kind, or a ratio that is not above 0.
    """

    def __init__(self, kind: str | None, ratio: float = 1.0, widths: Sequence[int] | None = None) -> None:
        if kind not in NORM_CONTROLS:
            raise UserError(f"norm_control is '{kind}'; use fixed, limited or null")
        if not ratio > 0:
            raise UserError(f"norm_ratio is {ratio}; it must be above 0")
        self.kind = kind
        self.ratio = float(ratio)
        self.widths = widths
        self.norms = [1.0]

    def measure(self, table: Tensor) -> None:
        """Take the mean norm, of each part, from an embedding table [V, d]."""
        if self.kind is not None:
            self.norms = [
                self.ratio * float(part.norm(dim=1).mean()) for part in self._parts(table.detach().float())
            ]

    def applied(self, vectors: Tensor) -> Tensor:
        """The vectors [N, d] with the norms that are allowed; a zero vector has no direction and stays zero."""
        if self.kind is None:
            return vectors
        parts = zip(self._parts(vectors), self.norms, strict=True)
        return torch.cat([self._scaled(part, norm) for part, norm in parts], dim=1)

    def _scaled(self, vectors: Tensor, norm: float) -> Tensor:
        factor = norm / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return vectors * (factor.clamp(max=1.0) if self.kind == "limited" else factor)

    def _parts(self, vectors: Tensor) -> Sequence[Tensor]:
        return vectors.split(list(self.widths), dim=1) if self.widths else (vectors,)
