"""What an embedding file holds: triggers with their vectors, their text encoder, and metadata."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ldm import words
from ldm.outlines import Unread, is_tensor
from ldm.util import UserError, shown

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncoderKind:
    """A text encoder: its width, the models that use it, and their ModelSpec architecture and resolution."""

    width: int
    models: str
    architecture: str
    resolution: int


ENCODER_KINDS = {
    "clip_l": EncoderKind(
        768, "Stable Diffusion 1.x, or the first encoder of SDXL", "stable-diffusion-v1", 512
    ),
    "clip_h": EncoderKind(1024, "Stable Diffusion 2.x", "stable-diffusion-v2-512", 512),
    "clip_g": EncoderKind(1280, "the second encoder of SDXL", "stable-diffusion-xl-v1-base", 1024),
    "bert": EncoderKind(1280, "latent diffusion text2img-large (BERT)", "latent-diffusion-bert", 256),
    "t5": EncoderKind(4096, "the T5-XXL encoder of SD3 and Flux", "t5-xxl", 1024),
}

# The ModelSpec architecture for text encoders of a family whose width no published model has.
FAMILIES = {
    "clip": "latent-diffusion-clip",
    "bert": "latent-diffusion-bert",
    "sdxl": "latent-diffusion-clip-pair",
}
# The two kinds that an encoder of family "sdxl" consists of; its vectors are theirs side by side.
PAIR = ("clip_l", "clip_g")
PAIR_WIDTHS = tuple(ENCODER_KINDS[kind].width for kind in PAIR)


def encoder_kind(family: str, width: int) -> str:
    """Return the kind of a text encoder, such as "clip_l" for family "clip" and width 768.

    `family` is `TextEncoder.family` ("clip", "bert" or "sdxl"), or already a kind. A width that no published model has
    gives the family itself.
    """
    exact = [name for name, kind in ENCODER_KINDS.items() if kind.width == width and name.startswith(family)]
    return exact[0] if exact else family


def only_kind_of_width(width: int) -> str | None:
    """Return the kind of this width; None if there is none, or several (1280: BERT of LDM, clip_g of SDXL)."""
    names = [name for name, kind in ENCODER_KINDS.items() if kind.width == width]
    return names[0] if len(names) == 1 else None


def is_possible_width(encoder: str, width: int) -> bool:
    """Return whether an encoder of this kind can have this width."""
    if encoder in FAMILIES:
        return True
    return encoder in ENCODER_KINDS and ENCODER_KINDS[encoder].width == width


def is_ambiguous_width(encoder: str | None, width: int) -> bool:
    """Return whether the encoder is not known and several kinds have this width."""
    return encoder is None and sum(kind.width == width for kind in ENCODER_KINDS.values()) > 1


def model_names(encoder: str | None, width: int) -> str:
    """Return, for messages, the models that vectors of this width (and encoder kind, if known) are for."""
    if encoder in ENCODER_KINDS and ENCODER_KINDS[encoder].width == width:
        return ENCODER_KINDS[encoder].models
    fitting = [kind.models for kind in ENCODER_KINDS.values() if kind.width == width]
    if fitting and encoder is None:
        return " or ".join(fitting)
    if encoder == "sdxl" and width == sum(PAIR_WIDTHS):
        return "Stable Diffusion XL"
    family = {"clip": "CLIP ", "bert": "BERT ", "sdxl": "two-tower CLIP "}.get(encoder or "", "")
    return f"a model whose {family}text encoder has width {width}"


def architecture_of(encoder: str | None, width: int) -> str:
    """Return the ModelSpec architecture of an embedding for this encoder."""
    if encoder in ENCODER_KINDS and ENCODER_KINDS[encoder].width == width:
        return f"{ENCODER_KINDS[encoder].architecture}/textual-inversion"
    return f"{FAMILIES.get(encoder or '', 'latent-diffusion')}/textual-inversion"


def kind_of_architecture(architecture: str, width: int) -> str | None:
    """Return the encoder kind for a ModelSpec architecture and width; None if they do not determine it."""
    model = architecture.split("/")[0]
    for family, name in FAMILIES.items():
        if model == name:
            return family
    if model.startswith("stable-diffusion-xl"):
        return {768: "clip_l", 1280: "clip_g"}.get(width)
    return only_kind_of_width(width)


_MAX_TEXT = 800


@dataclass(frozen=True)
class Metadata:
    """How vectors were trained; a field that is not known is None."""

    base_model: str | None = None
    base_model_hash: str | None = None
    steps: int | None = None
    seed: int | None = None
    initializer: str | None = None
    learning_rate: float | None = None
    images: int | None = None
    images_fingerprint: str | None = None
    resolution: int | None = None
    tool: str | None = None
    date: str | None = None
    transferred_from: str | None = None

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Metadata:
        """Build metadata from values of a file: wrong types become None, texts are truncated and cleaned."""
        # Annotations are texts here: "int | None".
        casts = {f.name: _CASTS[str(f.type).split(" ")[0]] for f in dataclasses.fields(cls)}
        known: dict[str, Any] = {name: cast(values.get(name)) for name, cast in casts.items()}
        return cls(**known)

    def known(self) -> dict[str, Any]:
        """Return the fields that are not None."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def noted_text(value: Any) -> str | None:
    """Return a text of a file, truncated and cleaned; None for anything else."""
    if not isinstance(value, str):
        return None
    return "".join(c if c.isprintable() else " " for c in value[:_MAX_TEXT]).strip() or None


def _integer(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number == int(number) else None


def _number(value: Any) -> float | None:
    """Return a finite number, from a number or its text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        whole = int(str(value)[:40])
        if abs(whole) < 2**64:
            return whole
    except ValueError:
        pass
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


_CASTS: dict[str, Callable[[Any], Any]] = {"str": noted_text, "int": _integer, "float": _number}


MAX_VECTORS = 1024
MAX_WIDTH = 16384
_FLOATS = ("float32", "float16", "bfloat16", "float64")


class EmbeddingError(UserError):
    """An embedding file that cannot be read, or an operation on embeddings that is not possible."""


@dataclass(frozen=True, eq=False)
class Concept:
    """A trigger and its vectors.

    Attributes:
        trigger: the word that stands for the vectors in a prompt; kept as `ldm.words.cleaned` returns it.
        vectors: [N, d] float32 on the CPU; given as [d] or [N, d] of any floating type and device, and copied. Those of
            a file of which only the words were asked for are `ldm.outlines.Unread`.
        encoder: the kind of text encoder, a key of `ENCODER_KINDS` or "clip"; None if it is not known.
        part: "" for ordinary vectors, "negative" for those of a DreamArtist pair, "output" for vectors that are
            added after the encoder.
        token: the tokenizer's id of the trigger, where the file states it.
        initializer: the text at which the vectors began, where the file states it.
        unused: [M, d] vectors that a progressive run has not added yet; no prompt uses them.

    Raises:
        EmbeddingError: a trigger that is no text, a bad shape or type, or NaN or infinity in the vectors.
    """

    trigger: str
    vectors: Tensor
    encoder: str | None = None
    part: str = ""
    token: int | None = None
    unused: Tensor | None = None
    initializer: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "trigger", _kept_trigger(self.trigger))
        name = f"'{shown(self.trigger)}'"
        vectors = check_vectors(self.vectors, name)
        if self.unused is not None:
            unused = check_vectors(self.unused, f"{name}, vectors not in use,")
            if unused.shape[1] != vectors.shape[1]:
                raise EmbeddingError(
                    f"{name}: the width is {vectors.shape[1]} for vectors in use and {unused.shape[1]} for "
                    "those not in use; all must have the same width"
                )
            check_shape((len(vectors) + len(unused), vectors.shape[1]), name)
            object.__setattr__(self, "unused", unused)
        encoder = self.encoder or only_kind_of_width(vectors.shape[1])
        if encoder is not None and not is_possible_width(encoder, vectors.shape[1]):
            raise EmbeddingError(
                f"{name}: vectors of width {vectors.shape[1]} do not fit the encoder '{shown(encoder)}'; known are "
                f"{', '.join(f'{kind} ({known.width})' for kind, known in ENCODER_KINDS.items())}, clip and bert"
            )
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(self, "encoder", encoder)

    @property
    def width(self) -> int:
        return self.vectors.shape[1]

    @property
    def whole(self) -> Tensor:
        """All vectors [N + M, d]: those in use, then those that are not."""
        return self.vectors if self.unused is None else _cat([self.vectors, self.unused], 0)

    @property
    def models(self) -> str:
        return model_names(self.encoder, self.width)


@dataclass(frozen=True)
class Progress:
    """How far a run with progressive vectors is: it starts with one vector and adds one every `scale` steps.

    `step` is the number of optimizer steps done. Raises EmbeddingError for values that no run can have.
    """

    step: int
    scale: int

    def __post_init__(self) -> None:
        for name, value, least in (("step", self.step, 0), ("scale", self.scale, 1)):
            if type(value) is not int or not least <= value < 2**31:
                long = isinstance(value, int) and abs(value) >= 2**64  # Python may refuse to write it out
                raise EmbeddingError(
                    f"the progress has the {name} {'of many digits' if long else shown(value)}; it must be an integer "
                    f"from {least}"
                )

    @classmethod
    def from_values(cls, step: Any, scale: Any) -> Progress | None:
        """Build the progress from values of a file; None if they are missing or no run can have them."""
        try:
            return cls(step, scale)
        except EmbeddingError:
            return None

    def in_use(self, count: int) -> int:
        """Return how many of `count` vectors are in use."""
        return min(count, 1 + self.step // self.scale)


@dataclass(frozen=True, eq=False)
class LearnedEmbeddings:
    """The concepts of one file, or of several merged files.

    Attributes:
        concepts: at least one; each trigger at most once for each encoder and part.
        metadata: how the vectors were trained. Its initializers become those of the concepts, where these state none.
        format: the name of the format that they were read from.
        source: the name of the file that they were read from.
        progress: set for a run with progressive vectors. Only then concepts may have `unused` vectors, and the
            number of their `vectors` must be `progress.in_use(total)`.

    Raises:
        EmbeddingError: these conditions do not hold.
    """

    concepts: tuple[Concept, ...]
    metadata: Metadata = field(default_factory=Metadata)
    format: str = ""
    source: str = ""
    progress: Progress | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", tuple(self.concepts))
        if not self.concepts:
            raise EmbeddingError("it holds no concept")
        seen = set()
        for concept in self.concepts:
            total = len(concept.vectors) + (0 if concept.unused is None else len(concept.unused))
            expected = total if self.progress is None else self.progress.in_use(total)
            if len(concept.vectors) != expected:
                raise EmbeddingError(
                    f"'{shown(concept.trigger)}': {len(concept.vectors)} of {total} vectors are in use; "
                    f"its progress ({self.progress}) gives {expected}"
                )
            key = (concept.trigger, concept.encoder, concept.part)
            if key in seen:
                raise EmbeddingError(
                    f"the trigger '{shown(concept.trigger)}' occurs twice; rename one of them"
                )
            seen.add(key)
        object.__setattr__(self, "concepts", self._with_initializers())

    def _with_initializers(self) -> tuple[Concept, ...]:
        """The concepts with the initializers of a file that states them in one line, in the order of the words."""
        line = self.metadata.initializer
        words = list(dict.fromkeys(c.trigger for c in self.concepts if c.part != "negative"))
        several = [line] if len(words) == 1 else (line or "").split(", ")
        if not line or len(several) != len(words) or any(c.initializer for c in self.concepts):
            return self.concepts
        stated = dict(zip(words, several, strict=True))
        return tuple(
            concept
            if concept.part == "negative"
            else dataclasses.replace(concept, initializer=stated[concept.trigger])
            for concept in self.concepts
        )

    @property
    def triggers(self) -> list[str]:
        return list(dict.fromkeys(concept.trigger for concept in self.concepts))

    @property
    def initializers(self) -> dict[str, str]:
        """The text at which each trigger began, as far as it is known."""
        return {concept.trigger: concept.initializer for concept in self.concepts if concept.initializer}

    def only(self, trigger: str) -> LearnedEmbeddings:
        """Return the embeddings of one trigger; raises EmbeddingError if there is no such trigger."""
        kept = [concept for concept in self.concepts if concept.trigger == trigger]
        if not kept:
            raise EmbeddingError(f"there is no trigger '{shown(trigger)}'; there is {quoted(self.triggers)}")
        return dataclasses.replace(self, concepts=tuple(kept))

    def without_progress(self) -> LearnedEmbeddings:
        """Return the vectors in use, without the unused ones and the progress."""
        concepts = tuple(dataclasses.replace(concept, unused=None) for concept in self.concepts)
        return dataclasses.replace(self, concepts=concepts, progress=None)

    def with_encoder(self, encoder: str) -> LearnedEmbeddings:
        """Return the same vectors for this encoder (family or kind); raises EmbeddingError if the width differs."""
        concepts = tuple(
            dataclasses.replace(c, encoder=encoder_kind(encoder, c.width)) for c in self.concepts
        )
        return dataclasses.replace(self, concepts=concepts)

    def renamed(self, names: Mapping[str, str]) -> LearnedEmbeddings:
        """Return the same vectors with new triggers, `names` by old trigger; unknown ones raise EmbeddingError.

        The negative of a renamed word (see `ldm.words.NEGATIVE`) is renamed with it.
        """
        names = {words.cleaned(old): words.check_word(new, "trigger") for old, new in names.items()}
        for name in names:
            self.only(name)
        names = words.with_negatives(names, self.triggers)
        # A new trigger has another token id, which only a tokenizer knows.
        concepts = tuple(
            dataclasses.replace(c, trigger=names[c.trigger], token=None)
            if names.get(c.trigger, c.trigger) != c.trigger
            else c
            for c in self.concepts
        )
        return dataclasses.replace(self, concepts=concepts)

    def with_tokens(self, ids: Mapping[str, int]) -> LearnedEmbeddings:
        """Return the same vectors with the token ids of some triggers, by trigger."""
        concepts = tuple(dataclasses.replace(c, token=ids.get(c.trigger, c.token)) for c in self.concepts)
        return dataclasses.replace(self, concepts=concepts)

    def vectors_for(self, width: int, encoder: str | None = None, unused: bool = False) -> dict[str, Tensor]:
        """Return the vectors [N, width] in use, by trigger, that a text encoder of this width can use.

        Those of both encoders of Stable Diffusion XL are side by side, where `encoder` is "sdxl".

        Args:
            encoder: its family or kind, if the caller knows it.
            unused: return the vectors that are not in use after those in use.
        Raises:
            EmbeddingError: a trigger has no such vectors, or the file does not state for which of two encoders of this
                width it was made.
        """
        if encoder == "sdxl" and width == sum(PAIR_WIDTHS):
            return self._pairs(unused)
        kind = encoder and encoder_kind(encoder, width)
        usable = [c for c in self.concepts if c.width == width and c.part in ("", "negative")]
        usable = [c for c in usable if kind is None or c.encoder in (kind, None)]
        missing = [trigger for trigger in self.triggers if trigger not in {c.trigger for c in usable}]
        name = f"'{shown(self.source)}': " if self.source else ""
        if missing:
            one = next(c for c in self.concepts if c.trigger == missing[0])
            made_for = (
                f"holds {one.part} vectors, not those of a word" if one.part else f"is for {one.models}"
            )
            known = kind is not None and kind in ENCODER_KINDS
            raise EmbeddingError(
                f"{name}'{shown(one.trigger, 30)}' (width {one.width}) {made_for}; this model's text encoder "
                f"has width {width}{f', {model_names(kind, width)}' if known else ''}; use the model that it was "
                "trained on"
            )
        if kind is not None and any(is_ambiguous_width(c.encoder, c.width) for c in usable):
            raise EmbeddingError(
                f"{name}vectors of width {width} are for {model_names(None, width)} and the file does not say which; "
                "state it once with: scripts/embeddings.py convert FILE --to safetensors --encoder bert (or clip_g)"
            )
        return {concept.trigger: concept.whole if unused else concept.vectors for concept in usable}

    def _pairs(self, unused: bool) -> dict[str, Tensor]:
        """The vectors of both encoders of Stable Diffusion XL side by side, by trigger."""
        name = f"'{shown(self.source)}': " if self.source else ""
        pairs: dict[str, Tensor] = {}
        for trigger in self.triggers:
            own = [c for c in self.concepts if c.trigger == trigger and c.part in ("", "negative")]
            parts = [next((c for c in own if _is_kind(c, kind)), None) for kind in PAIR]
            lacking = [kind for kind, part in zip(PAIR, parts, strict=True) if part is None]
            if lacking:
                one = own[0] if own else self.concepts[0]
                other = (
                    "" if len(lacking) > 1 else f", without vectors for {ENCODER_KINDS[lacking[0]].models}"
                )
                raise EmbeddingError(
                    f"{name}'{shown(trigger, 30)}' (width {one.width}) is for {one.models}{other}; Stable Diffusion XL "
                    "needs vectors of both its text encoders (clip_l and clip_g): use a word that was trained on it"
                )
            rows = [part.whole if unused else part.vectors for part in parts if part is not None]
            if len(rows[0]) != len(rows[1]):
                raise EmbeddingError(
                    f"{name}'{shown(trigger, 30)}' has {len(rows[0])} vectors for the first text encoder of Stable "
                    f"Diffusion XL and {len(rows[1])} for the second; both must have as many"
                )
            pairs[trigger] = _cat(rows, 1)
        return pairs


def _is_kind(concept: Concept, kind: str) -> bool:
    return concept.encoder in (kind, None) and concept.width == ENCODER_KINDS[kind].width


def concepts_of(
    trigger: str,
    vectors: Tensor,
    family: str,
    token: int | None = None,
    unused: Tensor | None = None,
    initializer: str | None = None,
) -> tuple[Concept, ...]:
    """Return the vectors [N, d] of a word in a text encoder of a family as they are kept in files.

    It is one concept, or two for Stable Diffusion XL: one for each text encoder.
    """
    width = vectors.shape[1]
    if family != "sdxl" or width != sum(PAIR_WIDTHS):
        kind = encoder_kind(family, width)
        return (Concept(trigger, vectors, kind, token=token, unused=unused, initializer=initializer),)
    rows = vectors.split(PAIR_WIDTHS, dim=1)
    left = [None, None] if unused is None else unused.split(PAIR_WIDTHS, dim=1)
    return tuple(
        Concept(trigger, own, kind, token=token, unused=rest, initializer=initializer)
        for kind, own, rest in zip(PAIR, rows, left, strict=True)
    )


# More than any word has; Unicode's composed form takes quadratic time for some texts.
_MOST_READ = 10 * words.MAX_LENGTH


def _kept_trigger(trigger: Any) -> str:
    """Return the trigger of a file as a word that works in prompts and files, with a log line if it differs."""
    if not isinstance(trigger, str):
        raise EmbeddingError(f"the trigger is a {type(trigger).__name__}; name a word")
    trigger = trigger[:_MOST_READ]
    kept = words.cleaned(trigger)
    if words.folded(kept) != words.folded(trigger):
        _log_once(shown(trigger), shown(kept, 120))
    return kept


@lru_cache(maxsize=256)
def _log_once(trigger: str, kept: str) -> None:
    logger.warning("the word '%s' of a file cannot be used in prompts: write '%s' instead", trigger, kept)


def _cat(parts: Sequence[Tensor], dim: int) -> Tensor:
    if any(isinstance(part, Unread) for part in parts):
        shape = list(parts[0].shape)
        shape[dim] = sum(part.shape[dim] for part in parts)
        joined: Any = Unread(tuple(shape))
        return joined

    import torch

    return torch.cat(list(parts), dim=dim)


def check_vectors(vectors: Any, name: str) -> Tensor:
    """Return a [N, d] float32 copy on the CPU, of what is unread an unread [N, d].

    Raises EmbeddingError, naming `name`, if they cannot be vectors.
    """
    if not is_tensor(vectors):
        raise EmbeddingError(f"{name} is not a tensor but {type(vectors).__name__}")
    unread = isinstance(vectors, Unread)
    if not unread and (str(vectors.layout) != "torch.strided" or vectors.is_quantized or vectors.is_meta):
        raise EmbeddingError(f"{name} is a sparse, quantized or meta tensor; save ordinary vectors")
    check_shape(tuple(vectors.shape), name)
    type_name = str(vectors.dtype).removeprefix("torch.")
    if type_name not in (*_FLOATS, *([""] if unread else [])):
        raise EmbeddingError(f"{name} has the type {type_name}; vectors are floating-point numbers")
    if unread:
        if not vectors.is_finite():
            raise _not_finite(name)
        rows: Any = dataclasses.replace(vectors, shape=(math.prod(vectors.shape[:-1]), vectors.shape[-1]))
        return rows

    import torch

    vectors = vectors.detach().to("cpu", torch.float32, copy=True).reshape(-1, vectors.shape[-1]).contiguous()
    if not torch.isfinite(vectors).all():
        raise _not_finite(name)
    return vectors


def _not_finite(name: str) -> EmbeddingError:
    return EmbeddingError(f"{name} contains NaN or infinity; its training failed, so train it again")


def check_shape(shape: tuple[int, ...], name: str) -> None:
    """Raise EmbeddingError, naming `name`, unless it is [d] or [N, d]; further axes of length 1 are allowed."""
    rows = [size for size in shape[:-1] if size != 1]
    if not 1 <= len(shape) <= 4 or 0 in shape or len(rows) > 1:
        raise EmbeddingError(f"{name} has the shape {list(shape)[:6]}; vectors are [d] or [N, d]")
    if math.prod(rows) > MAX_VECTORS or shape[-1] > MAX_WIDTH:
        raise EmbeddingError(
            f"{name} is {math.prod(rows)} x {shape[-1]}; at most {MAX_VECTORS} x {MAX_WIDTH} is allowed"
        )


def quoted(names: list[str]) -> str:
    """Return names in quotes, as many as fit into a line, and how many more there are."""
    line = ""
    for count, name in enumerate(names):
        following = f"{', ' if line else ''}'{shown(name, 40)}'"
        if len(line) + len(following) > 110:
            return f"{line} and {len(names) - count} more"
        line += following
    return line
