"""The base of learned words that are more than one table of vectors, and words of several methods together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.embeddings import LearnedEmbeddings, encoder_kind
from ldm.embeddings.method_files import MethodFile, check_distinct, words_to_begin, write_method_file
from ldm.modules.embedding_manager import configured_words, initial_vectors, parameter_key
from ldm.modules.personalization import NO_DENOISER, DenoiserShape, Personalization, TextEncoder
from ldm.modules.prompt_tokenizer import Layout, check_placeholders, check_room, insert_vectors
from ldm.util import UserError, check_integer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """What stands for R vectors of words, for T prompts (or 1 for all) and K layers (or 1 for all); [T, K, R, d] each.

    Attributes:
        vectors: in place of the placeholders, before the text encoder.
        residual: added to the encoder's output at the placeholders, for keys and values.
        bypass: added for the values only, times the length of the output there.
    """

    vectors: Tensor
    residual: Tensor | None = None
    bypass: Tensor | None = None


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several words, in order; a part without residual or bypass has none in what is joined."""

    def join(values: Sequence[Tensor | None]) -> Tensor | None:
        if all(value is None for value in values):
            return None
        filled = [
            torch.zeros_like(part.vectors) if value is None else value
            for value, part in zip(values, parts, strict=True)
        ]
        shape = [max(value.shape[axis] for value in filled) for axis in (0, 1)]
        return torch.cat([value.expand(*shape, -1, -1) for value in filled], dim=2)

    vectors = join([part.vectors for part in parts])
    assert vectors is not None
    return Rows(vectors, join([part.residual for part in parts]), join([part.bypass for part in parts]))


class ShapedWords(nn.Module, Personalization):
    """Words whose `Rows` may depend on timestep and layer, put into prompts and their encodings.

    A subclass sets `string_to_token_dict` and defines `placeholders` and `rows`.
    """

    shapes_context = True

    def __init__(self, embedder: TextEncoder) -> None:
        super().__init__()
        self.tokenizer, self.loaded = embedder.prompt_tokenizer, False
        self._layouts: dict[torch.device, Layout] = {}

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""
        return self.parameters()

    def save(self, path: str | Path) -> None:
        """Raise UserError: words of several files stay in their files."""
        raise UserError("words of several files are not saved as one; keep the files")

    def load(self, path: str | Path) -> None:
        """Raise UserError: words of several files are loaded together."""
        raise UserError("words of several files are not replaced by one; load the files again")

    def negative_prompt(self, negative: str, prompt: str) -> str:
        """The negative prompt with the word W-neg for each word W of the prompt, if it is held and not there yet."""
        return self.tokenizer.negative_prompt(negative, prompt, self.string_to_token_dict)

    def rows(self, times: Tensor | None) -> Rows:
        """The rows of all words in order, at timesteps [T]; None for those that stand for all timesteps."""
        raise NotImplementedError

    def forward(self, tokenized_text: Tensor, embedded_text: Tensor) -> Tensor:
        """Replace placeholders by the means over timesteps and layers; ids [B, L], embeddings [B, L, d] -> [B, L, d].

        That is what the text encoder alone can have of these words, as for a warm start.
        """
        if not self.string_to_token_dict:
            return embedded_text
        vectors = self.rows(None).vectors.mean(dim=(0, 1))
        return insert_vectors(tokenized_text, embedded_text, vectors, self._layout(tokenized_text.device))

    def encode(self, embedder: TextEncoder, ids: Tensor, times: Tensor | None = None) -> Tensor:
        """Token ids [B, L] at timesteps [B] as a context [B, L, d], or layered [B, K, 1 or 2, L, d]."""
        if not self.string_to_token_dict:
            return embedder.embed_ids(ids, None)
        rows, layout = self.rows(times), self._layout(ids.device)

        def put(values: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
            """The ids for each of the K layers of `values`, [B K, L], and the replacement that puts these in."""
            own = values.expand(len(ids), -1, -1, -1)  # (B, K, R, d)
            repeated = ids.repeat_interleave(own.shape[1], dim=0)
            return repeated, lambda tokens, embedded: insert_vectors(
                tokens, embedded, own.flatten(0, 1), layout
            )

        def by_layer(values: Tensor) -> Tensor:
            return rearrange(values, "(b k) l d -> b k l d", b=len(ids))

        def at_words(values: Tensor) -> Tensor:
            """The values where the words are and zero elsewhere, [B, K, L, d]."""
            repeated, replaced = put(values)
            nothing = encoded.new_zeros(*repeated.shape, encoded.shape[-1])
            return by_layer(replaced(repeated, nothing))

        encoded = by_layer(embedder.embed_ids(*put(rows.vectors)))
        if (
            rows.residual is not None
        ):  # for more layers perhaps, and the encoder need not run for each of these
            encoded = encoded + at_words(rows.residual)
        if rows.bypass is None:
            return encoded[:, 0] if encoded.shape[1] == 1 else encoded[:, :, None]
        values = encoded + at_words(rows.bypass) * encoded.norm(dim=-1, keepdim=True)
        return torch.stack(torch.broadcast_tensors(encoded, values), dim=2)

    def _layout(self, device: torch.device) -> Layout:
        if device not in self._layouts:
            counts = list(self.placeholders.values())
            ids = [int(token) for token in self.string_to_token_dict.values()]
            self._layouts[device] = Layout.build(ids, counts, counts, device)
        return self._layouts[device]


def check_layers(denoiser: DenoiserShape, name: str) -> None:
    """Raise UserError, which names the method, for a denoiser whose layers are not known."""
    if not denoiser.layers:
        raise UserError(
            f"{name} needs a denoiser whose cross-attention layers are known, such as a UNetModel"
        )


class LearnedWords(ShapedWords):
    """The base of a method: each word has a module `words.<placeholder>`, from which `rows_of` makes its rows.

    Arguments up to `seed` are those of `EmbeddingManager`; `denoiser` is what the words are learned for.

    A subclass sets `method`, and defines `new_word`, `begin` and `rows_of`.
    """

    def __init__(
        self,
        embedder: TextEncoder,
        placeholder_strings: Sequence[str] | None = None,
        initializer_words: Sequence[str | None] | None = None,
        num_vectors_per_token: int | Sequence[int] | Mapping[str, int] = 1,
        embedding_manager_ckpt: str | Path | None = None,
        seed: int = 0,
        denoiser: DenoiserShape = NO_DENOISER,
    ) -> None:
        super().__init__(embedder)
        self.family = embedder.family
        self.width, self.max_vectors = embedder.width, embedder.max_length - 2
        self.denoiser, self.seed = denoiser, seed
        self._stated: dict[str, str] = {}
        strings, counts, self._initializers = configured_words(
            self.tokenizer, placeholder_strings, initializer_words, num_vectors_per_token, self.max_vectors
        )
        self._set_words(counts)
        self.reset(embedder)
        if embedding_manager_ckpt:
            asked = self._described()
            self._adopt(self._of_file(embedding_manager_ckpt, strings))
            for name, value in self._described().items():
                if asked.get(name, value) != value:
                    text = "%s is %g, as in '%s'; the configured %g is not used"
                    logger.warning(text, name, value, embedding_manager_ckpt, asked[name])

    @classmethod
    def from_file(cls, content: MethodFile, embedder: TextEncoder, denoiser: DenoiserShape) -> LearnedWords:
        """The words of a file, for this encoder and denoiser; UserError if it does not fit."""
        words = cls(embedder, denoiser=denoiser)
        words._adopt(content)
        return words

    # -- what a method defines -------------------------------------------------------------------------------

    def new_word(self, count: int) -> nn.Module:
        """The module of a word with `count` vectors, its values not yet set; all of its parameters are trained."""
        raise NotImplementedError

    def begin(self, word: nn.Module, initial: Tensor, embedder: TextEncoder, seed: int) -> None:
        """Set the values of a word that begins at vectors [N, d]; called without gradient."""
        raise NotImplementedError

    def rows_of(self, word: nn.Module, times: Tensor | None) -> Rows:
        """The rows of one word at timesteps [T]; None for those that stand for all timesteps."""
        raise NotImplementedError

    def options(self) -> dict[str, float | int]:
        """Attributes of this class that a file states, because the tensors depend on them."""
        return {}

    # -- words -----------------------------------------------------------------------------------------------

    @property
    def placeholders(self) -> dict[str, int]:
        """Each placeholder with its number of vectors."""
        return dict(self._counts)

    @property
    def initializers(self) -> dict[str, str]:
        """The text at which each placeholder began: that of the file that it comes from, or the configured one."""
        known = {**self._initializers, **self._stated}
        return {string: text for string, text in known.items() if string in self._counts}

    def word(self, placeholder: str) -> nn.Module:
        """The module of a placeholder."""
        return self.words[parameter_key(placeholder)]

    def rows(self, times: Tensor | None) -> Rows:
        return joined([self.rows_of(word, times) for word in self.words.values()])

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """The trained parameters of all words."""
        return self.words.parameters()

    def absent_parameters(self, captions: Iterable[str]) -> list[nn.Parameter]:
        """The parameters of the placeholders that no caption contains."""
        found = self.tokenizer.found(captions, self.string_to_token_dict)
        return [p for string in self._counts if string not in found for p in self.word(string).parameters()]

    @torch.no_grad()
    def reset(self, embedder: TextEncoder) -> None:
        """Begin at the initializers' present token embeddings, unless the words were loaded."""
        if self.loaded:
            return
        table = embedder.token_embedding.weight
        for index, (string, count) in enumerate(self._counts.items()):
            tokens = self.tokenizer.token_ids(self._initializers.get(string, ""))
            initial = initial_vectors(table, tokens, count, self.seed + index)
            self.begin(self.word(string), initial, embedder, self.seed + index)

    def _set_words(self, counts: Mapping[str, int]) -> None:
        self._counts = dict(counts)
        self._layouts.clear()
        self.string_to_token_dict = self.tokenizer.placeholder_ids(counts)
        self.words = nn.ModuleDict()
        for string, count in counts.items():  # one by one: a ModuleDict would sort the items of a dict
            self.words[parameter_key(string)] = self.new_word(count)

    # -- files and state -------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write all words to one file with the method's name, options and dials."""
        encoder = encoder_kind(self.family, self.width)
        content = MethodFile(
            self.method,
            self._counts,
            self._tensors(),
            self.options(),
            self.dials(),
            encoder,
            self.width,
            initializers=self.initializers,
        )
        write_method_file(content, path)

    def load(self, path: str | Path) -> None:
        """Take the words of a file of this method in place of the present ones.

        Raises:
            UserError: the file cannot be read, or is of another method, text encoder or denoiser.
        """
        self._adopt(self._of_file(path))

    @classmethod
    def check_file(cls, path: str | Path, placeholders: Sequence[str]) -> None:
        """Raise UserError for a file of another method or with other words, unless both have one word."""
        cls._of_file(path, placeholders)

    @classmethod
    def _of_file(cls, path: str | Path, placeholders: Sequence[str] | None = None) -> MethodFile:
        return words_to_begin(path, cls.method, cls.__name__, placeholders)

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of all words by their names in a file; those of a single word have no number."""
        return _named_tensors(list(self.words.values()))

    @torch.no_grad()
    def _adopt(self, content: MethodFile) -> None:
        """Hold the words of a file; the options are the file's."""
        content.check_encoder(encoder_kind(self.family, self.width), self.width)
        for name, value in content.options.items():
            if name in self.options():
                check_integer(value, f"'{content.source}': {name}", minimum=0)
                setattr(self, name, value)
        check_placeholders(list(content.words), self.tokenizer)
        check_room(content.words, self.max_vectors, f"'{content.source}'")
        # Compared without memory first: a small file may ask for words of any size.
        with torch.device("meta"):
            needed = _named_tensors([self.new_word(count) for count in content.words.values()])
        for name in {**needed, **content.tensors}:
            have, need = (held[name].shape if name in held else None for held in (content.tensors, needed))
            if have != need:
                raise UserError(
                    f"'{content.source}' was learned for another model: its '{name}' is {_shape(have)} and would be "
                    f"{_shape(need)} for this one; use the model that it was learned on"
                )
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        self._set_words(content.words)
        for name, tensor in self._tensors().items():
            tensor.copy_(content.tensors[name])
        for name, value in content.dials.items():
            if name in self.dials():
                self.set_dial(name, value)
        self.to(device)
        self.loaded, self._stated = True, dict(content.initializers)

    def _described(self) -> dict[str, float | int]:
        """What a file decides, by name."""
        counts = {f"the number of vectors of '{word[:60]}'": count for word, count in self._counts.items()}
        return {**counts, **self.options(), **self.dials()}

    def _settings(self) -> dict[str, list[float | int]]:
        """What a state has besides the tensors, because a run may have it from the file that it began from."""
        return {
            "settings.counts": list(self._counts.values()),
            "settings.options": list(self.options().values()),
            "settings.dials": list(self.dials().values()),
        }

    def adopt_settings(self, state: Mapping[str, Tensor]) -> None:
        """Take numbers of vectors, options and dials from a state of words of these names."""
        present = self._settings()
        given = {name: state[name].tolist() if name in state else [] for name in present}
        if any(len(given[name]) != len(present[name]) for name in ("settings.counts", "settings.options")):
            return  # the state of other words or of another method, which its names show
        counts, options, dials = given.values()
        if (counts, options) != (present["settings.counts"], present["settings.options"]):
            device = next((p.device for p in self.parameters()), torch.device("cpu"))
            for name, value in zip(self.options(), options, strict=True):
                setattr(self, name, int(value))
            self._set_words({word: int(count) for word, count in zip(self._counts, counts, strict=True)})
            self.to(device)
        for name, value in zip(self.dials(), dials, strict=False):
            self.set_dial(name, value)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, values in self._settings().items():
            destination[prefix + name] = torch.tensor(values, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        self.adopt_settings(own)
        for name in self._settings():
            state_dict.pop(prefix + name, None)
        self.loaded |= any(key.startswith("words.") for key in own)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _named_tensors(words: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The tensors of words by their names in a file; those of a single word have no number."""
    return {
        name if len(words) == 1 else f"{index}.{name}": value
        for index, word in enumerate(words)
        for name, value in word.state_dict().items()
    }


def _shape(size: torch.Size | None) -> str:
    return "absent" if size is None else "x".join(map(str, size))


class PlainWords(ShapedWords):
    """Vectors of any tool beside words of a method: the same at every timestep and layer."""

    def __init__(self, learned: LearnedEmbeddings, embedder: TextEncoder) -> None:
        super().__init__(embedder)
        vectors = learned.vectors_for(embedder.width, embedder.family)
        check_placeholders(list(vectors), self.tokenizer)
        self._counts = {word: len(value) for word, value in vectors.items()}
        self.string_to_token_dict = self.tokenizer.placeholder_ids(vectors)
        self.register_buffer("vectors", torch.cat(list(vectors.values()))[None, None])

    @property
    def placeholders(self) -> dict[str, int]:
        return dict(self._counts)

    def rows(self, times: Tensor | None) -> Rows:
        return Rows(self.get_buffer("vectors"))


class Together(ShapedWords):
    """The words of several files in one prompt, of one method or of several, for generation.

    Raises:
        UserError: two files hold the same word.
    """

    method = "together"

    def __init__(self, members: Sequence[ShapedWords], embedder: TextEncoder) -> None:
        super().__init__(embedder)
        self.members = nn.ModuleList(members)
        self.timed = any(member.timed for member in members)
        self.loaded = True
        words = [word for member in members for word in member.placeholders]
        check_distinct(words, self.tokenizer.folded)
        self.string_to_token_dict = self.tokenizer.placeholder_ids(words)

    @property
    def _parts(self) -> list[ShapedWords]:
        return [part for part in self.members if isinstance(part, ShapedWords)]

    @property
    def placeholders(self) -> dict[str, int]:
        return {word: count for part in self._parts for word, count in part.placeholders.items()}

    def rows(self, times: Tensor | None) -> Rows:
        return joined([part.rows(times) for part in self._parts])

    def stage_of(self, times: Tensor) -> Tensor:
        """The stages of all members that have any, [B, members]."""
        return torch.stack([part.stage_of(times) for part in self._parts if part.timed], dim=1)

    def dials(self) -> dict[str, float | int]:
        return {name: value for part in self._parts for name, value in part.dials().items()}

    def set_dial(self, name: str, value: float) -> None:
        """Set the dial of every word that has it."""
        holders = [part for part in self._parts if name in part.dials()]
        for part in holders or self._parts[:1]:
            part.set_dial(name, value)
