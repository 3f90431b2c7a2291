"""Images from prompts, with a model and learned embeddings.

The package itself can be called: `ldm.generate("a photo of *", words="cat.safetensors")` is `text_to_image`.
"""

import sys
from types import ModuleType
from typing import Any

from ldm.generate.editing import InitImage
from ldm.generate.embeddings import check_mentions, check_prompts, load_embeddings
from ldm.generate.images import SAMPLERS, Settings, check_settings, generate, save_image
from ldm.generate.session import Session, release, text_to_image

__all__ = [
    "SAMPLERS",
    "InitImage",
    "Session",
    "Settings",
    "check_mentions",
    "check_prompts",
    "check_settings",
    "generate",
    "load_embeddings",
    "release",
    "save_image",
    "text_to_image",
]


class _Callable(ModuleType):
    def __call__(self, *prompts: Any, **settings: Any) -> Any:
        return text_to_image(*prompts, **settings)


# The import system sets `ldm.generate` to this module, so a function of that name has to be the module.
sys.modules[__name__].__class__ = _Callable
