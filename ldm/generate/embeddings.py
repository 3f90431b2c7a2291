"""Learned words in a model: loading them, setting their dials, and encoding prompts in which they are.

A weight in a prompt (see `ldm.generate.prompt_syntax`) scales what a token adds to the encoder's output. AUTOMATIC1111
and ComfyUI scale differently, and both definitions are here; a prompt without weights is encoded as without them.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.embeddings import LearnedEmbeddings, merge, read
from ldm.embeddings.method_files import MethodFile, read_method_file
from ldm.generate.prompt_syntax import Chunks, Segment, parse
from ldm.generate.request import Words, check_mentions, dial_numbers, dial_text, takes_vectors
from ldm.models.diffusion.conditioning import (
    TimedCondition,
    TimedPrompts,
    concat_conditions,
    context_of,
    with_context,
)
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.methods import words_of
from ldm.modules.personalization import Personalization, TextEncoder
from ldm.util import UserError, shown


def load_embeddings(model: LatentDiffusion, paths: Words | Sequence[Words]) -> list[str]:
    """Replace what the model's personalization has learned by the contents of one or several files.

    A personalization that consists of vectors (see `takes_vectors`) gets the merged vectors of all files, which may be
    those of any tool. If a file is of a method (see `ldm.modules.methods`), its class replaces the personalization, and
    several files of methods or vectors are used together. Any other personalization loads one file of its own. A model
    without personalization gets an `EmbeddingManager`.

    Returns:
        the placeholders, for use in prompts.
    Raises:
        UserError: a file cannot be read or is for another text encoder, or two files have different vectors for one
            placeholder.
    """
    paths = [paths] if isinstance(paths, (str, Path, LearnedEmbeddings, MethodFile)) else list(paths)
    encoder, personalization = text_encoder_of(model), personalization_of(model)
    held = [read_method_file(path) if isinstance(path, (str, Path)) else path for path in paths]
    if any(isinstance(one, MethodFile) for one in held):
        files = [one or _vectors_of(path) for one, path in zip(held, paths, strict=True)]
        words = words_of(files, encoder, model.denoiser_shape)
        model.embedding_manager = words.to(model.alphas_cumprod.device).train(model.training)
        return list(words.placeholders)
    if personalization.method:  # whose place the vectors take
        model.embedding_manager = personalization = EmbeddingManager(encoder)
    if not takes_vectors(type(personalization)):
        kind = type(personalization).__name__
        if len(paths) != 1:
            raise UserError(f"{kind} loads one embedding file, not {len(paths)}; name one")
        if not isinstance(paths[0], (str, Path)):
            raise UserError(f"{kind} has files of its own; name the file instead of vectors")
        personalization.load(paths[0])
        return list(personalization.placeholders)
    merged = merge([_vectors_of(path) for path in paths])
    vectors = merged.vectors_for(encoder.width, encoder.family)
    personalization.take(vectors, source=f"'{merged.source}'")
    # All vectors of a file that are in use there are used here, even if the config adds vectors during training.
    personalization.on_optimizer_step(sys.maxsize)
    # A personalization that held no vectors before could not know the model's device.
    if isinstance(personalization, nn.Module):
        personalization.to(model.alphas_cumprod.device)
    return list(personalization.placeholders)


def _vectors_of(word: Words) -> LearnedEmbeddings:
    assert not isinstance(word, MethodFile), "files of methods are looked for first"
    return word if isinstance(word, LearnedEmbeddings) else read(word)


@contextmanager
def dials_at(model: LatentDiffusion, dials: Mapping[str, float] | None) -> Iterator[dict[str, str]]:
    """Set dials of the model's personalization for this block; afterwards each word has its former values.

    Yields:
        the field "Dials" of an image's settings, if there are any.
    Raises:
        UserError: there is no such dial, or its value is not possible.
    """
    numbers = dial_numbers(dials)
    if not numbers:
        yield {}
        return
    personalization = personalization_of(model)
    inner = personalization.modules() if isinstance(personalization, nn.Module) else [personalization]
    # Each of several words has values of its own; the whole comes before its parts.
    before = [(part, part.dials()) for part in inner if isinstance(part, Personalization)]
    try:
        for name, value in numbers.items():
            personalization.set_dial(name, value)
        yield {"Dials": dial_text(numbers)}
    finally:
        for part, values in before:
            for name in numbers.keys() & values.keys():
                part.set_dial(name, values[name])


def check_prompts(
    model: LatentDiffusion, prompts: Iterable[str], learned: Iterable[str] | None = None
) -> None:
    """Raise UserError for a prompt with a placeholder that has no embedding.

    `learned` lists the placeholders with an embedding, by default all that the model holds.
    """
    personalization: Personalization | None = model.embedding_manager
    held = [] if personalization is None else list(personalization.placeholders)
    check_mentions(prompts, held if learned is None else learned, held)


def text_encoder_of(model: LatentDiffusion) -> TextEncoder:
    """The model's text encoder; UserError if its condition is something else than text."""
    encoder = model.cond_stage_model
    if not isinstance(encoder, TextEncoder):
        raise UserError(
            f"this model has no text encoder that takes embeddings ({type(encoder).__name__}); "
            "name a text-to-image model and its config"
        )
    return encoder


def personalization_of(model: LatentDiffusion) -> Personalization:
    """The model's personalization; a model without one gets an empty `EmbeddingManager`."""
    if model.embedding_manager is None:
        model.embedding_manager = EmbeddingManager(text_encoder_of(model))
    return model.embedding_manager


# -- prompts encoded -----------------------------------------------------------------------------------------


def chunk_count(model: LatentDiffusion, prompt: str, syntax: str) -> int:
    """The number of chunks of a prompt; 1 where the syntax has none."""
    encoder, manager = model.cond_stage_model, model.embedding_manager
    if syntax == "plain" or not isinstance(encoder, TextEncoder):
        return 1
    names = [] if manager is None else list(manager.placeholders)
    return len(parse(prompt, names, syntax, encoder.prompt_tokenizer.ignores_case))


def conditions(
    model: LatentDiffusion,
    prompts: Sequence[str],
    negative_prompt: str | None,
    syntax: str,
    least_chunks: int = 1,
) -> tuple[Any, Any]:
    """The condition of a batch of prompts, and that of the negative prompt for each (None without guidance).

    All are filled up to the longest of them, and to `least_chunks`, because guidance needs conditions of one length.
    """
    negatives = [] if negative_prompt is None else model.negative_prompts(prompts, negative_prompt)
    encoder, manager = model.cond_stage_model, model.embedding_manager
    if syntax != "plain" and isinstance(encoder, TextEncoder):
        names = [] if manager is None else list(manager.placeholders)
        ignores_case = encoder.prompt_tokenizer.ignores_case
        parsed = [parse(text, names, syntax, ignores_case) for text in [*prompts, *negatives]]
        longest = max(least_chunks, *map(len, parsed))
        if longest > 1 or any(part.weight != 1 for chunks in parsed for part in chunks[0]):
            filled = [_filled(chunks, longest) for chunks in parsed]
            wanted, unwanted = filled[: len(prompts)], filled[len(prompts) :]
            condition = model.completed(_weighted_condition(encoder, manager, wanted, syntax))
            if not negatives:
                return condition, None
            return condition, model.completed(
                _weighted_condition(encoder, manager, unwanted, syntax), negatives
            )
        texts = ["".join(part.text for part in chunks[0]) for chunks in parsed]
        prompts, negatives = texts[: len(prompts)], texts[len(prompts) :]
    condition = model.get_learned_conditioning(list(prompts))
    return condition, model.get_unconditional_conditioning(negatives) if negatives else None


def _weighted_condition(
    encoder: TextEncoder, manager: Personalization | None, prompts: Sequence[Chunks], syntax: str
) -> Any:
    """The weighted condition of prompts with equal numbers of chunks; that of timed words is one at the timestep.

    Prompts without a learned word are encoded plainly and once, which may be much faster.
    """

    def at(chunks: Sequence[Chunks], times: Tensor) -> Any:
        return encode(encoder, manager, chunks, syntax, times)

    parts: list[Any] = []
    for has_words, texts in itertools.groupby(prompts, functools.partial(_has_words, encoder, manager)):
        fixed = [tuple(tuple(chunk) for chunk in chunks) for chunks in texts]
        if has_words and manager is not None and manager.timed:
            parts.append(TimedCondition([TimedPrompts(fixed, at, manager.stage_of)]))
        else:
            parts.append(encode(encoder, manager if has_words else None, fixed, syntax))
    return functools.reduce(concat_conditions, parts)


def _has_words(encoder: TextEncoder, manager: Personalization | None, chunks: Chunks) -> bool:
    if manager is None:
        return False
    texts = ["".join(segment.text for segment in chunk) for chunk in chunks]
    return bool(encoder.prompt_tokenizer.found(texts, manager.placeholders))


def check_token_limit(encoder: TextEncoder, manager: Personalization | None, prompt: str, syntax: str) -> str:
    """The text of a prompt that the token limit truncates, empty if everything fits.

    Raises:
        UserError: a placeholder is truncated, wholly or in part, or the prompt's syntax is not supported.
    """
    tokenizer = encoder.prompt_tokenizer
    ids: dict[str, int] = {}
    widths: dict[str, int] = {}
    if manager is not None:
        ids = {word: int(token) for word, token in manager.string_to_token_dict.items()}
        widths = manager.placeholders
    lost = []
    for chunk in parse(prompt, ids, syntax, tokenizer.ignores_case):
        text = "".join(segment.text for segment in chunk)
        for cut in tokenizer.truncated(text, ids, widths):
            raise UserError(
                f"the token limit of {tokenizer.max_length} truncates '{shown(cut.placeholder)}' in the prompt "
                f"'{shown(prompt, 80)}' ({cut.kept} of {cut.vectors} vectors remain); move it forward or shorten "
                "the prompt"
            )
        lost.append(tokenizer.overflow(text, ids, widths))
    return " ".join(filter(None, lost))


def encode(
    encoder: TextEncoder,
    manager: Personalization | None,
    prompts: Sequence[Chunks],
    syntax: str = "a1111",
    times: Tensor | None = None,
) -> Any:
    """The weighted condition of prompts in chunks: a context [B, n * L, d], n the largest number of chunks.

    It is layered as the personalization's own is; `times` [B] are the timesteps for one that depends on them.

    With E the encoder's context of a chunk and w its weights [L], `a1111` gives w E, rescaled to the mean of E (as
    AUTOMATIC1111's "Original" emphasis does, here for each chunk and each text tower by itself); `comfyui` gives
    E0 + w (E - E0), with E0 the context of the empty prompt. Both are E where all weights are 1. Prompts with fewer
    chunks than others are filled up with the empty prompt. What an encoder gives beside the context, such as a pooled
    vector, is that of the first chunk without weights.
    """
    count = max(map(len, prompts))
    encoded = []
    for row, chunks in enumerate(prompts):
        own = None if times is None else times[row, None]
        filled = _filled(chunks, count)
        encoded.append(_joined([_encode_chunk(encoder, manager, chunk, syntax, own) for chunk in filled]))
    return functools.reduce(concat_conditions, encoded)


def _joined(chunks: Sequence[Any]) -> Any:
    """The conditions of one prompt's chunks as one: their contexts one after the other."""
    return with_context(chunks[0], torch.cat([context_of(chunk) for chunk in chunks], dim=-2))


def _filled(chunks: Chunks, count: int) -> Chunks:
    return [*chunks, *([[Segment("")]] * (count - len(chunks)))]


def _encode_chunk(
    encoder: TextEncoder,
    manager: Personalization | None,
    chunk: Sequence[Segment],
    syntax: str,
    times: Tensor | None,
) -> Any:
    """The condition of one chunk at a timestep [1], with a context [1, ..., L, d]."""
    ids: Mapping[str, int] = {}
    widths: Mapping[str, int] = {}
    if manager is not None:
        ids = {word: int(token) for word, token in manager.string_to_token_dict.items()}
        widths = manager.placeholders
    segments = [(segment.text, segment.weight) for segment in chunk]
    tokens, weights = encoder.prompt_tokenizer.encode_weighted(segments, ids, widths)
    row = tokens[None].to(encoder.device)
    encoded = encoder.embed_ids(row, None) if manager is None else manager.encode(encoder, row, times)
    if bool((weights == 1).all()):
        return encoded
    context = context_of(encoded)
    weights = weights.to(context)[:, None]
    if syntax == "comfyui":
        empty = context_of(encoder.encode([""], manager))
        return with_context(encoded, empty + weights * (context - empty))
    towers = context.split(encoder.widths, dim=-1) if len(encoder.widths) > 1 else (context,)
    rescaled = []
    for tower in towers:
        weighted = weights * tower
        means = [states.mean(dim=(-2, -1), keepdim=True) for states in (tower, weighted)]
        rescaled.append(weighted * (means[0] / means[1]))
    return with_context(encoded, torch.cat(rescaled, dim=-1))
