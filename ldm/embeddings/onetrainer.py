"""OneTrainer's file: the key `emp_params` (its own spelling, and the only one it reads back)."""

from __future__ import annotations

from typing import BinaryIO

from ldm.embeddings.concept import Concept, LearnedEmbeddings
from ldm.embeddings.emb_params import trigger_of
from ldm.embeddings.own import KEY, Record, record_of
from ldm.embeddings.payload import Payload
from ldm.embeddings.tensorfile import save_tensors

_NAME = "emp_params"
_OUTPUT = f"{_NAME}_out"


def recognise(payload: Payload) -> LearnedEmbeddings | None:
    """The embedding of a file with `emp_params`, and its `emp_params_out`; None for anything else."""
    if _NAME not in payload.names:
        return None
    record = Record(payload.header.get(KEY))
    trigger = trigger_of(payload)
    concepts = [record.concept(0, trigger, payload.content[_NAME])]
    if _OUTPUT in payload.names:
        first = concepts[0]
        concepts.append(Concept(first.trigger, payload.content[_OUTPUT], first.encoder, part="output"))
    return LearnedEmbeddings(tuple(concepts), record.metadata, "onetrainer")


def save(embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    """Write the file that OneTrainer continues from (SDXL: `clip_l` and `clip_g`)."""
    tensors = {_NAME: embeddings.concepts[0].vectors}
    if len(embeddings.concepts) > 1:
        tensors = {str(concept.encoder): concept.vectors for concept in embeddings.concepts}
    save_tensors(tensors, {KEY: record_of(embeddings)}, file)
