"""Which embedding file belongs to which concept."""

from __future__ import annotations

import glob
from pathlib import Path

from ldm.util import UserError

NAME = "{name}"
# Within a folder, tried in this order: files of the concept's name, runs of main.py, folders of its name.
_WITHIN = ("{name}.*", "*{name}*/checkpoints/embeddings.pt", "{name}/*embed*")


def embedding_of(place: str, concept: str, several: bool) -> Path:
    """The file for a concept: `place` itself, its newest match with "{name}" filled in, or within the folder it is.

    Raises UserError where no file is found, and for one file where there are `several` concepts.
    """
    if NAME in place:
        patterns = [place]
    elif Path(place).is_dir():
        patterns = [f"{glob.escape(place.rstrip('/'))}/{pattern}" for pattern in _WITHIN]
    elif not Path(place).is_file():
        raise UserError(f"'{place}' does not exist; check the path")
    elif several:
        raise UserError(
            f"--embedding_path '{place}' is one file for several concepts; write {NAME} for theirs"
        )
    else:
        return Path(place)
    for pattern in patterns:
        found = [Path(path) for path in glob.glob(pattern.replace(NAME, glob.escape(concept)))]
        found = [path for path in found if path.is_file()]
        if found:
            return max(found, key=lambda path: (path.stat().st_mtime, path.name))
    tried = ", ".join(f"'{pattern.replace(NAME, concept)}'" for pattern in patterns)
    raise UserError(f"no embedding for the concept '{concept}': nothing matches {tried}")
