"""Successors of one learned vector as `personalization_config` targets, and the words of their files.

Each is a class of its own with a YAML in configs/personalization/; `METHODS` are those with files of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from ldm.embeddings import LearnedEmbeddings
from ldm.embeddings.method_files import MethodFile, check_method
from ldm.modules.methods.core import CoRe, CoReGrid, CoReNeTI
from ldm.modules.methods.dreamartist import DreamArtist
from ldm.modules.methods.grid import XTI, Grid, OutputResidual, ProSpect
from ldm.modules.methods.neti import NeTI
from ldm.modules.methods.words import LearnedWords, PlainWords, ShapedWords, Together
from ldm.modules.personalization import DenoiserShape, TextEncoder

__all__ = [
    "METHODS",
    "XTI",
    "CoRe",
    "CoReGrid",
    "CoReNeTI",
    "DreamArtist",
    "Grid",
    "NeTI",
    "OutputResidual",
    "ProSpect",
    "class_of",
    "words_of",
]

METHODS: dict[str, type[LearnedWords]] = {
    kind.method: kind for kind in (ProSpect, XTI, NeTI, OutputResidual, Grid)
}


def class_of(file: MethodFile) -> type[LearnedWords]:
    """The class of a file's method; UserError if there is none."""
    check_method(file)
    return METHODS[file.method]


def words_of(
    files: Sequence[MethodFile | LearnedEmbeddings], embedder: TextEncoder, denoiser: DenoiserShape
) -> ShapedWords:
    """The words of files, at least one of them of a method, as one personalization.

    Raises:
        UserError: a file is of an unknown method, does not fit, or holds a word that another one holds too.
    """
    members: list[ShapedWords] = []
    for file in files:
        if isinstance(file, LearnedEmbeddings):
            members.append(PlainWords(file, embedder))
        else:
            members.append(class_of(file).from_file(file, embedder, denoiser))
    return members[0] if len(members) == 1 else Together(members, embedder)
