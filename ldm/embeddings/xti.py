"""Per-layer files of Extended Textual Inversion (XTI, P+) as kohya writes them: a key for each UNet layer."""

from __future__ import annotations

import re

from ldm.embeddings.concept import Concept, LearnedEmbeddings
from ldm.embeddings.emb_params import header_metadata, trigger_of
from ldm.embeddings.payload import Payload

_LAYER = re.compile(r"(IN|OUT)\d\d|MID")


def recognise(payload: Payload) -> LearnedEmbeddings | None:
    """The vectors of every layer, `part` naming the layer; None for anything else."""
    keys = payload.names
    if len(keys) < 2 or not all(_LAYER.fullmatch(key) for key in keys):
        return None
    trigger = trigger_of(payload)
    concepts = tuple(Concept(trigger, payload.content[key], part=key) for key in sorted(keys))
    return LearnedEmbeddings(concepts, header_metadata(payload.header), "xti")
