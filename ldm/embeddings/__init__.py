"""Embedding files: `read` those of any tool, `write` the format that each tool expects, `merge` and `split` them.

No file is trusted: sizes are checked before memory is allocated, pickles are interpreted without running anything that
they name, and no text from a file becomes a path.
"""

from ldm.embeddings.concept import (
    Concept,
    EmbeddingError,
    LearnedEmbeddings,
    Metadata,
    Progress,
    concepts_of,
    encoder_kind,
)
from ldm.embeddings.merging import Rename, merge, plan_renames, renames_from, split
from ldm.embeddings.reader import read
from ldm.embeddings.writer import (
    DEFAULT_FORMAT,
    FORMATS,
    files_of,
    paths_for,
    write,
    write_all,
)

__all__ = [
    "DEFAULT_FORMAT",
    "FORMATS",
    "Concept",
    "EmbeddingError",
    "LearnedEmbeddings",
    "Metadata",
    "Progress",
    "Rename",
    "concepts_of",
    "encoder_kind",
    "files_of",
    "merge",
    "paths_for",
    "plan_renames",
    "read",
    "renames_from",
    "split",
    "write",
    "write_all",
]
