"""A fixture with one valid file of every format."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ldm.embeddings import FORMATS, paths_for, write
from tests.embeddings.samples import FOREIGN, learned


@pytest.fixture(scope="session")
def every_file(tmp_path_factory) -> dict[str, Path]:
    """One valid file of every format by its name: ours, those of other tools, and both layouts of torch.save."""
    folder = tmp_path_factory.mktemp("files")
    files = {}
    for name, (file, save, *_) in FOREIGN.items():
        files[name] = folder / name.replace(" ", "_") / file
        files[name].parent.mkdir()
        save(files[name])
    for name in FORMATS:
        [path] = paths_for(["<cat>"], folder / "ours" / name, name)
        files[f"our {name}"] = write(learned(width=32), path, name)
    files["webp"] = folder / "cat.webp"
    Image.open(files["our a1111-png"]).convert("RGB").save(files["webp"], lossless=True)
    return files
