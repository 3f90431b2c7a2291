"""What an embedding file holds: triggers with their vectors, and the text encoder that they belong to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.util import UserError


@dataclass(frozen=True)
class Kind:
    """A text encoder: its width, the models that have it, and what ModelSpec calls such a model."""

    width: int
    models: str
    architecture: str
    resolution: int


KINDS = {
    "clip_l": Kind(768, "Stable Diffusion 1.x, or the first encoder of SDXL", "stable-diffusion-v1", 512),
    "clip_h": Kind(1024, "Stable Diffusion 2.x", "stable-diffusion-v2-512", 512),
    "clip_g": Kind(1280, "the second encoder of SDXL", "stable-diffusion-xl-v1-base", 1024),
    "bert": Kind(1280, "latent diffusion text2img-large (BERT)", "latent-diffusion-bert", 256),
    "t5": Kind(4096, "the T5-XXL encoder of SD3 and Flux", "t5-xxl", 1024),
}

# A CLIP or BERT text encoder of a width that no published model has, such as that of the embedded model.
FAMILIES = {"clip": "latent-diffusion-clip", "bert": "latent-diffusion-bert"}


def encoder_kind(family: str, width: int) -> str:
    """The kind of an encoder of this family ("clip" or "bert") and width: 768 of clip is "clip_l"."""
    exact = [name for name, kind in KINDS.items() if kind.width == width and name.startswith(family)]
    return exact[0] if exact else family


def known_kind(width: int) -> str | None:
    """The only kind of this width; None if there is none, or several (1280: BERT of LDM, clip_g of SDXL)."""
    names = [name for name, kind in KINDS.items() if kind.width == width]
    return names[0] if len(names) == 1 else None


def fits(encoder: str, width: int) -> bool:
    """Whether vectors of this width can belong to this kind of encoder."""
    if encoder in FAMILIES:
        return True
    return encoder in KINDS and KINDS[encoder].width == width


def is_ambiguous(encoder: str | None, width: int) -> bool:
    return encoder is None and sum(kind.width == width for kind in KINDS.values()) > 1


def models_of(encoder: str | None, width: int) -> str:
    """In words, the models that vectors of this width (and kind, if it is known) were made for."""
    if encoder in KINDS and KINDS[encoder].width == width:
        return KINDS[encoder].models
    fitting = [kind.models for kind in KINDS.values() if kind.width == width]
    if fitting and encoder is None:
        return " or ".join(fitting)
    family = {"clip": "CLIP ", "bert": "BERT "}.get(encoder or "", "")
    return f"a model whose {family}text encoder is {width} wide"


def architecture_of(encoder: str | None, width: int) -> str:
    """The ModelSpec architecture of an embedding for this encoder."""
    if encoder in KINDS and KINDS[encoder].width == width:
        return f"{KINDS[encoder].architecture}/textual-inversion"
    return f"{FAMILIES.get(encoder or '', 'latent-diffusion')}/textual-inversion"


def kind_of_architecture(architecture: str, width: int) -> str | None:
    """The kind that a ModelSpec architecture names, if the width agrees."""
    model = architecture.split("/")[0]
    if model == FAMILIES["bert"]:
        return "bert"
    if model == FAMILIES["clip"]:
        return "clip"
    if model.startswith("stable-diffusion-xl"):
        return {768: "clip_l", 1280: "clip_g"}.get(width)
    return known_kind(width)


_MAX_TEXT = 800


@dataclass(frozen=True)
class Metadata:
    """Where vectors come from; every field is None when it is not known."""

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

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Metadata:
        """Metadata from whatever a file says: values of a wrong type are dropped, texts cut and cleaned."""
        casts = {f.name: _CASTS[str(f.type).split(" ")[0]] for f in dataclasses.fields(cls)}
        return cls(**{name: cast(values.get(name)) for name, cast in casts.items()})

    def known(self) -> dict[str, Any]:
        """The fields that are known."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def _text(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    return "".join(c if c.isprintable() else " " for c in value[:_MAX_TEXT]).strip() or None


def _integer(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number == int(number) else None


def _number(value: Any) -> float | None:
    """A finite number; files keep some of them as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        if abs(number := int(str(value)[:40])) < 2**64:
            return number
    except ValueError:
        pass
    try:
        return number if math.isfinite(number := float(value)) else None
    except (ValueError, OverflowError):
        return None


_CASTS = {"str": _text, "int": _integer, "float": _number}


MAX_VECTORS = 1024
MAX_WIDTH = 16384
MAX_TRIGGER = 200
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class EmbeddingError(UserError):
    """An embedding file, or a wish about one, that cannot be fulfilled."""


@dataclass(frozen=True, eq=False)
class Concept:
    """A trigger and its vectors.

    `vectors` may be given as [d] or [N, d] of any floating type on any device; it is kept as a [N, d] float32
    CPU copy. `unused` [M, d] are further vectors that a progressive run has not added yet: no prompt uses them.
    `encoder` is a kind of `ldm.embeddings.concept` or None when it is not known. `part` is "" for
    ordinary vectors; else "negative" (of a DreamArtist pair), "output" (added after the encoder), or the
    layer's name in a per-layer (XTI) file. `token` is the tokenizer's id of the trigger where the file says it.
    Raises EmbeddingError for a bad trigger, shape or type, and for NaN and infinity.
    """

    trigger: str
    vectors: Tensor
    encoder: str | None = None
    part: str = ""
    token: int | None = None
    unused: Tensor | None = None

    def __post_init__(self) -> None:
        check_trigger(self.trigger)
        vectors = check_vectors(self.vectors, f"'{self.trigger}'")
        if self.unused is not None:
            unused = check_vectors(self.unused, f"'{self.trigger}', vectors not in use,")
            if unused.shape[1] != vectors.shape[1]:
                raise EmbeddingError(
                    f"'{self.trigger}': vectors in use are {vectors.shape[1]} wide, those not in use "
                    f"{unused.shape[1]}; all must have the same width"
                )
            check_shape((len(vectors) + len(unused), vectors.shape[1]), f"'{self.trigger}'")
            object.__setattr__(self, "unused", unused)
        encoder = self.encoder or known_kind(vectors.shape[1])
        if encoder is not None and not fits(encoder, vectors.shape[1]):
            raise EmbeddingError(
                f"'{self.trigger}': vectors {vectors.shape[1]} wide do not belong to the encoder '{encoder}'"
            )
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(self, "encoder", encoder)

    @property
    def width(self) -> int:
        return self.vectors.shape[1]

    @property
    def models(self) -> str:
        return models_of(self.encoder, self.width)


@dataclass(frozen=True)
class Progress:
    """How far a run with progressive vectors has come: it begins with one vector and adds one every `scale` steps.

    `step` is the number of optimizer steps done, `scale` the number of steps for each added vector.
    Raises EmbeddingError for numbers that no run can have.
    """

    step: int
    scale: int

    def __post_init__(self) -> None:
        for name, value, least in (("step", self.step, 0), ("scale", self.scale, 1)):
            if type(value) is not int or not least <= value < 2**31:
                raise EmbeddingError(
                    f"the progress has the {name} {value!r:.40}; it is a whole number from {least}"
                )

    @classmethod
    def from_values(cls, step: Any, scale: Any) -> Progress | None:
        """The progress that a file states; None if it states none, or values that no run can have."""
        try:
            return cls(step, scale)
        except EmbeddingError:
            return None

    def in_use(self, count: int) -> int:
        """How many of `count` vectors are in use."""
        return min(count, 1 + self.step // self.scale)


@dataclass(frozen=True, eq=False)
class LearnedEmbeddings:
    """The concepts of one file (or of several merged), with metadata, the format's name and the source's.

    `progress` is set for a run with progressive vectors. Only then may concepts have `unused` vectors, and the
    number of their `vectors` must be the one that the progress gives. Raises EmbeddingError otherwise, and for no
    concept or the same trigger twice.
    """

    concepts: tuple[Concept, ...]
    metadata: Metadata = field(default_factory=Metadata)
    format: str = ""
    source: str = ""
    progress: Progress | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", tuple(self.concepts))
        if not self.concepts:
            raise EmbeddingError("there is no concept in it")
        seen = set()
        for concept in self.concepts:
            total = len(concept.vectors) + (0 if concept.unused is None else len(concept.unused))
            expected = total if self.progress is None else self.progress.in_use(total)
            if len(concept.vectors) != expected:
                raise EmbeddingError(
                    f"'{concept.trigger}': {len(concept.vectors)} of {total} vectors are in use; "
                    f"its progress ({self.progress}) gives {expected}"
                )
            key = (concept.trigger, concept.encoder, concept.part)
            if key in seen:
                raise EmbeddingError(f"the trigger '{concept.trigger}' occurs twice; rename one of them")
            seen.add(key)

    @property
    def triggers(self) -> list[str]:
        return list(dict.fromkeys(concept.trigger for concept in self.concepts))

    def only(self, trigger: str) -> LearnedEmbeddings:
        """The embeddings of one trigger."""
        kept = [concept for concept in self.concepts if concept.trigger == trigger]
        if not kept:
            raise EmbeddingError(f"there is no trigger '{trigger}'; there is {quoted(self.triggers)}")
        return dataclasses.replace(self, concepts=tuple(kept))

    def without_progress(self) -> LearnedEmbeddings:
        """The same vectors in use, without the unused ones and the progress."""
        concepts = tuple(dataclasses.replace(concept, unused=None) for concept in self.concepts)
        return dataclasses.replace(self, concepts=concepts, progress=None)

    def with_encoder(self, encoder: str) -> LearnedEmbeddings:
        """The same vectors said to belong to this encoder; refused if their width says otherwise."""
        concepts = tuple(
            dataclasses.replace(c, encoder=encoder_kind(encoder, c.width)) for c in self.concepts
        )
        return dataclasses.replace(self, concepts=concepts)

    def renamed(self, names: Mapping[str, str]) -> LearnedEmbeddings:
        """The same vectors under other triggers."""
        for name in names:
            self.only(name)
        # A renamed trigger has another token id, which only a tokenizer knows.
        concepts = tuple(
            dataclasses.replace(c, trigger=names[c.trigger], token=None)
            if names.get(c.trigger, c.trigger) != c.trigger
            else c
            for c in self.concepts
        )
        return dataclasses.replace(self, concepts=concepts)

    def vectors_for(self, width: int, encoder: str | None = None) -> dict[str, Tensor]:
        """The vectors [N, width] by trigger that a text encoder of this width can use.

        `encoder` is its kind or family ("clip", "bert"), where the caller knows it. Raises EmbeddingError if
        none fit, or if the file does not say which of two encoders of this width it was made for.
        """
        kind = encoder and encoder_kind(encoder, width)
        usable = [c for c in self.concepts if c.width == width and c.part in ("", "negative")]
        usable = [c for c in usable if kind is None or c.encoder in (kind, None)]
        missing = [trigger for trigger in self.triggers if trigger not in {c.trigger for c in usable}]
        name = f"'{self.source}': " if self.source else ""
        if missing:
            one = next(c for c in self.concepts if c.trigger == missing[0])
            made_for = f"holds {one.part} vectors, not a word" if one.part else f"is for {one.models}"
            raise EmbeddingError(
                f"{name}'{one.trigger}' ({one.width} wide) {made_for}; this model's text encoder takes "
                f"width {width}, {models_of(kind, width)}; use the model it was trained on"
            )
        if kind is not None and any(is_ambiguous(c.encoder, c.width) for c in usable):
            raise EmbeddingError(
                f"{name}vectors {width} wide are for {models_of(None, width)} and the file does not say which; "
                "say it once with: scripts/embeddings.py convert FILE --to original --encoder bert (or clip_g)"
            )
        return {concept.trigger: concept.vectors for concept in usable}


def check_trigger(trigger: Any) -> None:
    if not isinstance(trigger, str) or not trigger.strip():
        raise EmbeddingError("the trigger is empty; give it a word")
    if len(trigger) > MAX_TRIGGER:
        raise EmbeddingError(f"the trigger has {len(trigger)} characters; {MAX_TRIGGER} is the most")
    if not trigger.isprintable():
        raise EmbeddingError(f"the trigger {ascii(trigger)} holds control characters; give it a plain word")


def check_vectors(vectors: Any, name: str) -> Tensor:
    """A [N, d] float32 CPU copy; raises EmbeddingError for what cannot be vectors of an embedding."""
    if not isinstance(vectors, Tensor):
        raise EmbeddingError(f"{name} is no tensor but {type(vectors).__name__}")
    if vectors.layout is not torch.strided or vectors.is_quantized or vectors.is_meta:
        raise EmbeddingError(f"{name} is not an ordinary tensor")
    check_shape(tuple(vectors.shape), name)
    if vectors.dtype not in _FLOATS:
        raise EmbeddingError(
            f"{name} is of type {str(vectors.dtype)[6:]}; vectors are floating-point numbers"
        )
    vectors = vectors.detach().to("cpu", torch.float32, copy=True).reshape(-1, vectors.shape[-1]).contiguous()
    if not torch.isfinite(vectors).all():
        raise EmbeddingError(f"{name} holds NaN or infinity; the training that made it had failed")
    return vectors


def check_shape(shape: tuple[int, ...], name: str) -> None:
    if len(shape) not in (1, 2) or 0 in shape:
        raise EmbeddingError(f"{name} has the shape {list(shape)[:6]}; vectors are [d] or [N, d]")
    rows = shape[0] if len(shape) == 2 else 1
    if rows > MAX_VECTORS or shape[-1] > MAX_WIDTH:
        raise EmbeddingError(f"{name} is {rows} x {shape[-1]}; at most {MAX_VECTORS} x {MAX_WIDTH} is read")


def quoted(names: list[str]) -> str:
    """Names in quotes, the first few of them."""
    shown = ", ".join(f"'{name}'" for name in names[:6])
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")
