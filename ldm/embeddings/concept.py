"""What an embedding file holds: triggers with their vectors, and where they come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.embeddings.kinds import encoder_kind, fits, is_ambiguous, known_kind, models_of
from ldm.embeddings.metadata import Metadata
from ldm.util import UserError

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
    CPU copy. `encoder` is a kind of `ldm.embeddings.kinds` or None when it is not known. `part` is "" for
    ordinary vectors; else "negative" (of a DreamArtist pair), "output" (added after the encoder), or the
    layer's name in a per-layer (XTI) file. `token` is the tokenizer's id of the trigger where the file says it.
    Raises EmbeddingError for a bad trigger, shape or type, and for NaN and infinity.
    """

    trigger: str
    vectors: Tensor
    encoder: str | None = None
    part: str = ""
    token: int | None = None

    def __post_init__(self) -> None:
        check_trigger(self.trigger)
        vectors = check_vectors(self.vectors, f"'{self.trigger}'")
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


@dataclass(frozen=True, eq=False)
class LearnedEmbeddings:
    """The concepts of one file (or of several merged), with metadata, the format's name and the source's."""

    concepts: tuple[Concept, ...]
    metadata: Metadata = field(default_factory=Metadata)
    format: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", tuple(self.concepts))
        if not self.concepts:
            raise EmbeddingError("there is no concept in it")
        seen = set()
        for concept in self.concepts:
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
