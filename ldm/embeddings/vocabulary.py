"""A text encoder's vocabulary: its table of vectors from a checkpoint, its words from a tokenizer's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.embeddings.concept import EmbeddingError

# CLIP in LDM checkpoints and in transformers, the BERT of LDM, a BERT of transformers.
_TABLES = ("token_embedding.weight", "token_emb.weight", "word_embeddings.weight")
_WORD_END = "</w>"
_WORD_FILES = ("vocab.txt", "vocab.json", "tokenizer.json")


def table_of(state_dict: Mapping[str, Tensor], name: str, width: int | None = None) -> Tensor:
    """The token embedding table [V, d] in a checkpoint's state dict; of width `width` if there are several.

    Raises EmbeddingError, which calls the checkpoint `name`, if it has none.
    """
    tables = {key: value for key, value in state_dict.items() if key.endswith(_TABLES) and value.ndim == 2}
    if not tables:
        raise EmbeddingError(
            f"'{name}' holds no table of token embeddings; name a checkpoint with a text encoder"
        )
    fitting = [table for table in tables.values() if table.shape[1] == width]
    return (fitting or list(tables.values()))[0].detach().float()


def words_of(folder: str | Path) -> list[str]:
    """The words of a tokenizer's folder by token id: from vocab.json, vocab.txt or tokenizer.json.

    Pieces that only start a word are shown as "cat-", those that continue one as "##ing". Raises EmbeddingError.
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
                f"'{folder}' is no tokenizer's folder: it has none of vocab.json, vocab.txt, tokenizer.json"
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
        raise EmbeddingError(f"'{path}' is damaged or no vocabulary ({str(error)[:80]})") from error
    return words


def known_folder(source: str) -> Path | None:
    """The folder of a tokenizer that is named by a path, or on the hub and downloaded before; else None."""
    if Path(source).is_dir():
        return Path(source)
    from transformers.utils import cached_file

    for name in _WORD_FILES:
        try:
            found = cached_file(source, name, local_files_only=True)
        except (OSError, ValueError):  # a path that is not there, or never downloaded
            continue
        if found is not None:
            return Path(found).parent
    return None
