"""Textual inversion: learn a word from a few images, and generate with it.

    import ldm

    concept = ldm.invert("data/concepts/bobo", placeholder="<bobo>", init="bear")
    for image in ldm.generate("a photo of <bobo> on a beach", words=concept):
        image.show()
    concept.save("bobo.safetensors")

| name | what it is |
|---|---|
| `invert` | learns a word and returns a `Concept`; raises `Stopped` when it is interrupted |
| `load`, `load_all` | one concept, or all, of files, run folders and repositories on the Hugging Face hub |
| `interpolate` | a concept between two |
| `generate` | images from prompts and words; keeps the model, as `Session` does |
| `grid`, `save_image`, `Settings` | images side by side; a file that holds its settings, and how to read them |
| `FORMATS` | the formats of embedding files, for `Concept.save` |
| `UserError` | every mistake that a user can correct, in one line |

They are imported on first use, so that `import ldm` stays light.
"""

import importlib
import warnings
from typing import Any

_WHERE = {
    "invert": "ldm.training.inversion",
    "load": "ldm.training.concepts",
    "load_all": "ldm.training.concepts",
    "interpolate": "ldm.training.concepts",
    "Concept": "ldm.training.concepts",
    "Stopped": "ldm.training.inversion",
    "Session": "ldm.generate",
    "Settings": "ldm.generate",
    "save_image": "ldm.generate",
    "grid": "ldm.images",
    "FORMATS": "ldm.embeddings",
    "UserError": "ldm.util",
}
__all__ = ["generate", *_WHERE]


def __getattr__(name: str) -> Any:
    if name != "generate" and name not in _WHERE:
        raise AttributeError(f"module 'ldm' has no attribute '{name}'")
    with warnings.catch_warnings():
        # tqdm's advice in notebooks without ipywidgets, for bars that are not shown here.
        warnings.filterwarnings("ignore", message="IProgress not found")
        if name == "generate":  # the package, which can be called
            return importlib.import_module("ldm.generate")
        return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
