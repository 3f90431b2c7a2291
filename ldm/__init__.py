"""Textual inversion: learn a word from a few images, and generate with it.

    import ldm

    concept = ldm.invert("data/concepts/bobo", placeholder="<bobo>", init="bear")
    for image in ldm.generate("a photo of <bobo> on a beach", words=concept):
        image.show()
    concept.save("bobo.safetensors")

`invert`, `Concept`, `load` and `interpolate` are in `ldm.training.inversion`, `generate` and `Session` in
`ldm.generate`. They are imported on first use, so that `import ldm` stays light.
"""

import importlib
from typing import Any

_WHERE = {
    "invert": "ldm.training.inversion",
    "load": "ldm.training.inversion",
    "interpolate": "ldm.training.inversion",
    "Concept": "ldm.training.inversion",
    "Session": "ldm.generate",
    "Settings": "ldm.generate",
    "UserError": "ldm.util",
}
__all__ = ["generate", *_WHERE]


def __getattr__(name: str) -> Any:
    if name == "generate":  # the package, which can be called
        return importlib.import_module("ldm.generate")
    if name not in _WHERE:
        raise AttributeError(f"module 'ldm' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
