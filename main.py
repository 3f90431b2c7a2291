"""Learn the vectors of a new word from a few images, or train a model: python main.py --base YAML -t --gpus 0,

YAMLs may name the classes that are re-exported here, as main.DataModuleFromConfig; they are imported on first use.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ldm.commands.entry import train as main
from ldm.util import get_obj_from_str

if TYPE_CHECKING:
    from ldm.training.callbacks.checkpoint import SetupCallback
    from ldm.training.callbacks.image_logger import ImageLogger
    from ldm.training.callbacks.performance import CUDACallback
    from ldm.training.data import DataModuleFromConfig, WrappedDataset

__all__ = ["CUDACallback", "DataModuleFromConfig", "ImageLogger", "SetupCallback", "WrappedDataset", "main"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'main' has no attribute '{name}'")
    return get_obj_from_str(f"main.{name}")


if __name__ == "__main__":
    sys.exit(main())
