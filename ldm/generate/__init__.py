"""Images from prompts, with a model and learned embeddings.

The package itself can be called: `ldm.generate("a photo of *", words="cat.safetensors")` is `text_to_image`. Its names
are imported on first use: what checks a request (`ldm.generate.request`) needs no torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.generate.editing import InitImage
    from ldm.generate.embeddings import check_prompts, load_embeddings
    from ldm.generate.images import SAMPLERS, Settings, check_settings, generate, save_image
    from ldm.generate.request import check_mentions
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

_WHERE = {
    "InitImage": "editing",
    "check_mentions": "request",
    **dict.fromkeys(("check_prompts", "load_embeddings"), "embeddings"),
    **dict.fromkeys(("SAMPLERS", "Settings", "check_settings", "generate", "save_image"), "images"),
    **dict.fromkeys(("Session", "release", "text_to_image"), "session"),
}


def __getattr__(name: str) -> Any:
    if name in _WHERE.values() or name == "prompt_syntax":
        return importlib.import_module(f"ldm.generate.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'ldm.generate' has no attribute '{name}'")
    return getattr(importlib.import_module(f"ldm.generate.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Callable(ModuleType):
    def __call__(self, *prompts: Any, **settings: Any) -> Any:
        return self.text_to_image(*prompts, **settings)


# The import system sets `ldm.generate` to this module, so a function of that name has to be the module.
sys.modules[__name__].__class__ = _Callable
