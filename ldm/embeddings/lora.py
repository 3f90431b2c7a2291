"""Embeddings that travel inside a LoRA: OneTrainer's bundles, and cloneofsimo's files."""

from __future__ import annotations

import re

from ldm.embeddings.concept import Concept, LearnedEmbeddings
from ldm.embeddings.payload import Payload

_BUNDLED = re.compile(
    r"bundle_emb\.(?P<word>.+)\.(?P<key>clip_l|clip_g|t5|emp_params|string_to_param\.[^.]+)(?P<out>_out)?"
)
_ENCODERS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5"}


def recognise(payload: Payload) -> LearnedEmbeddings | None:
    """The embeddings among a LoRA's tensors, which are left alone; None if there are none."""
    marked = [key for key, value in payload.header.items() if value == "<embed>" and key in payload.names]
    if marked:
        concepts = tuple(Concept(key, payload.content[key]) for key in sorted(marked))
        return LearnedEmbeddings(concepts, format="cloneofsimo")
    found = [(key, match) for key in sorted(payload.names) if (match := _BUNDLED.fullmatch(key))]
    if not found:
        return None
    concepts = tuple(
        Concept(
            match["word"],
            payload.content[key],
            _ENCODERS.get(match["key"]),
            part="output" if match["out"] else "",
        )
        for key, match in found
    )
    return LearnedEmbeddings(concepts, format="onetrainer bundle")
