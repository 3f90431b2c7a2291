"""A CLIP tokenizer and text configuration for the captions: `python -m ldm.data.creatures.tokenizer FOLDER`.

Every word of captions and templates is one token. Any other text is split into shorter pieces, down to single bytes.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ldm.data.creatures.captions import vocabulary
from ldm.files import write_text

logger = logging.getLogger(__name__)

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 32


def byte_letters() -> list[str]:
    """Return the printable letters that stand for bytes in CLIP's byte-pair files, in the order of its vocabulary."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + k) for k in range(len(rest))]


def learn_merges(vocabulary: Iterable[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges, most frequent pair first, that make each (ASCII) word of `vocabulary` one piece."""
    spelled = [[*word[:-1], word[-1] + END_OF_WORD] for word in sorted(set(vocabulary))]
    merges = []
    while pairs := Counter(pair for word in spelled for pair in zip(word, word[1:], strict=False)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(word, best) for word in spelled]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in word:
        # A piece that was just merged is no longer the first half of the pair, so it does not merge again here.
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def write_tokenizer(folder: str | Path) -> None:
    """Write vocab.json, merges.txt, tokenizer_config.json and the text encoder's config.json; they are deterministic.

    Raises UserError if `folder` cannot be written.
    """
    folder, merges = Path(folder), learn_merges(vocabulary())
    letters = byte_letters()
    pieces = [
        *letters,
        *(letter + END_OF_WORD for letter in letters),
        *(a + b for a, b in merges),
        START,
        END,
    ]
    ids = {piece: number for number, piece in enumerate(pieces)}
    write_text(folder / "vocab.json", json.dumps(ids, ensure_ascii=False))
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    write_text(folder / "tokenizer_config.json", _json(_tokenizer_config()))
    write_text(folder / "config.json", _json(text_config(ids[START], ids[END])))
    logger.info("%d tokens written to %s", len(ids), folder)


def text_config(start: int, end: int) -> dict[str, object]:
    """Return the CLIPTextConfig of the embedded model; `end` is the highest id, at which CLIP pools the sentence."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": end + 1,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "projection_dim": 128,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "model_max_length": MAX_TOKENS,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }


def _json(content: dict[str, object]) -> str:
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ldm.data.creatures.tokenizer FOLDER")
    write_tokenizer(sys.argv[1])
