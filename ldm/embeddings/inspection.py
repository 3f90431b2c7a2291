"""Comparing vectors with a text encoder's vocabulary: their norms, and the nearest words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.base_models import checked_header
from ldm.embeddings.concept import ENCODER_KINDS, Concept, EmbeddingError, LearnedEmbeddings, encoder_kind
from ldm.util import shown
from ldm.weights import TEXT_ENCODERS, Folder, located, read_state_dict

if TYPE_CHECKING:
    from torch import Tensor

# The ends of a token table's name: CLIP in all layouts, and BERT in LDM's and that of transformers.
_CLIP_TABLE, _BERT_TABLE = "token_embedding.weight", ("token_emb.weight", "word_embeddings.weight")


def token_tables(model: str | Path) -> dict[str, Tensor]:
    """Return the token tables [V, d] of a model by the kind of text encoder, such as "clip_l"; SDXL has two.

    `model` is a checkpoint, a folder as diffusers writes it, or a hub id, of which only the text encoders are fetched.
    Raises UserError if it cannot be read or has none.
    """
    found: dict[str, Tensor] = {}
    for file in _files_of(model):
        for name, value in read_state_dict(file).items():
            if value.ndim != 2 or not name.endswith((_CLIP_TABLE, *_BERT_TABLE)):
                continue
            if value.numel() * value.itemsize > value.untyped_storage().nbytes():
                raise EmbeddingError(
                    f"'{model}' is damaged: '{shown(name)}' repeats its numbers; download it again"
                )
            kind = encoder_kind("clip", value.shape[1]) if name.endswith(_CLIP_TABLE) else "bert"
            found.setdefault(kind, value.detach().float())
    if not found:
        raise _no_encoder(model)
    order = [*ENCODER_KINDS, "clip"]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def check_text_encoder(model: str | Path) -> None:
    """Raise UserError if a model cannot be read or has no token table, by the names in its files alone."""
    for file in _files_of(model):
        for name, shape in checked_header(file).shapes.items():
            if len(shape) == 2 and name.endswith((_CLIP_TABLE, *_BERT_TABLE)):
                return
    raise _no_encoder(model)


def _files_of(model: str | Path) -> list[Path]:
    path = located(model, parts=TEXT_ENCODERS)
    if not path.is_dir():
        return [path]
    folder = Folder(path)
    return [file for part in TEXT_ENCODERS for file in folder.weights(part)] or folder.own_weights()


def _no_encoder(model: str | Path) -> EmbeddingError:
    return EmbeddingError(f"'{model}' has no text encoder; name a checkpoint or a diffusers folder with one")


_WORD_END = "</w>"
_WORD_FILES = ("vocab.txt", "vocab.json", "tokenizer.json")


def words_of(folder: str | Path) -> list[str]:
    """Return the words of a tokenizer's folder by token id, from vocab.txt, vocab.json or tokenizer.json.

    Pieces that begin a word are shown as "cat-", those that continue one as "##ing". Raises EmbeddingError if there
    is no such file, or it is damaged.
    """
    folder = Path(folder)
    try:
        if (path := folder / "vocab.txt").is_file():
            return path.read_text(encoding="utf-8").splitlines()
        if (path := folder / "vocab.json").is_file():
            ids = json.loads(path.read_text(encoding="utf-8"))
        elif (path := folder / "tokenizer.json").is_file():
            ids = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
        else:
            raise EmbeddingError(
                f"'{folder}' is not a tokenizer's folder: it has none of vocab.json, vocab.txt, tokenizer.json"
            )
        words = [""] * (max(ids.values()) + 1)
        ends = any(word.endswith(_WORD_END) for word in ids)
        for word, number in ids.items():
            words[number] = word.removesuffix(_WORD_END) + (
                "" if word.endswith(_WORD_END) or not ends else "-"
            )
    except EmbeddingError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise EmbeddingError(f"'{path}' is damaged or not a vocabulary ({str(error)[:80]})") from error
    return words


def token_ids(words: Sequence[str], triggers: Iterable[str]) -> dict[str, int]:
    """Return the token ids of the triggers that are one token; `words` is what `words_of` returns."""
    places = {word: number for number, word in reversed(list(enumerate(words))) if word}
    return {trigger: places[trigger.lower()] for trigger in triggers if trigger.lower() in places}


def known_folder(source: str) -> Path | None:
    """Return the folder of a tokenizer: a local path, or a name on the hub that was downloaded before; else None."""
    if Path(source).is_dir():
        return Path(source)
    from transformers.utils.hub import cached_file

    for name in _WORD_FILES:
        try:
            found = cached_file(source, name, local_files_only=True)
        except (OSError, ValueError):  # a path that does not exist, or not downloaded
            continue
        if found is not None:
            return Path(found).parent
    return None


_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class VocabularyNorms:
    """The spread of the norms of a vocabulary's vectors: the 5th, 50th and 95th percentile."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class ConceptReport:
    """A report on one concept; the last two fields are None without a table of the same width.

    `norms` has one value for each vector, `nearest` one list of (word, cosine similarity), best first.
    """

    trigger: str
    part: str
    encoder: str | None
    models: str
    vectors: int
    width: int
    norms: tuple[float, ...]
    vocabulary_norms: VocabularyNorms | None = None
    nearest: tuple[tuple[tuple[str, float], ...], ...] | None = None


def inspect_concepts(
    embeddings: LearnedEmbeddings,
    tables: Mapping[str, Tensor] | None = None,
    words: Sequence[str] | None = None,
    count: int = 5,
) -> list[ConceptReport]:
    """Return a report on every concept.

    `tables` are what `token_tables` returns for a model, `words` its V words (without them, token ids are shown), and
    `count` is the number of nearest words.
    """
    return [
        _report(concept, _own_table(concept, tables or {}), words, count) for concept in embeddings.concepts
    ]


def _own_table(concept: Concept, tables: Mapping[str, Tensor]) -> Tensor | None:
    """Return the table of a concept's text encoder; if the file does not name that, one of its width."""
    fitting = {kind: table for kind, table in tables.items() if table.shape[1] == concept.width}
    if concept.encoder is not None:
        is_bert = concept.encoder == "bert"
        fitting = {kind: table for kind, table in fitting.items() if (kind == "bert") == is_bert}
    return fitting.get(concept.encoder or "", next(iter(fitting.values()), None))


def nearest_words(vectors: Tensor, table: Tensor, count: int = 5) -> tuple[Tensor, Tensor]:
    """Find the `count` rows of `table` [V, d] nearest to each of `vectors` [N, d].

    Returns cosine similarities and row numbers, both [N, count], best first.
    """
    import torch
    from torch.nn.functional import normalize

    queries = normalize(vectors.float(), dim=1)
    # In chunks, so that a table in half precision is never converted as a whole.
    similar = torch.cat(
        [queries @ normalize(rows.float(), dim=1).T for rows in table.split(_ROWS_AT_ONCE)], dim=1
    )
    return similar.topk(min(count, table.shape[0]), dim=1)


def _report(concept: Concept, table: Tensor | None, words: Sequence[str] | None, count: int) -> ConceptReport:
    spread, near = None, None
    if table is not None:
        import torch

        quantiles = torch.tensor([0.05, 0.5, 0.95])
        spread = VocabularyNorms(*table.float().norm(dim=1).quantile(quantiles).tolist())
        similar, rows = nearest_words(concept.vectors, table, count)
        near = tuple(
            tuple((_word(words, row), value) for row, value in zip(numbers, values, strict=True))
            for numbers, values in zip(rows.tolist(), similar.tolist(), strict=True)
        )
    return ConceptReport(
        trigger=concept.trigger,
        part=concept.part,
        encoder=concept.encoder,
        models=concept.models,
        vectors=len(concept.vectors),
        width=concept.width,
        norms=tuple(concept.vectors.norm(dim=1).tolist()),
        vocabulary_norms=spread,
        nearest=near,
    )


def _word(words: Sequence[str] | None, row: int) -> str:
    return words[row] if words is not None and row < len(words) and words[row] else f"#{row}"
