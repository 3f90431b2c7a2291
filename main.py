"""Learn the vectors of a new word from a few images, or train a model: python main.py --base YAML -t --gpus 0,

YAMLs may name the classes that are re-exported here, as main.DataModuleFromConfig.
"""

from __future__ import annotations

import sys

from ldm.commands.entry import train as main

if __name__ != "__main__":  # importing these takes seconds, which a run spends where Ctrl-C ends in one line
    from ldm.training.callbacks.image_logger import ImageLogger
    from ldm.training.callbacks.performance import CUDACallback
    from ldm.training.callbacks.setup import SetupCallback
    from ldm.training.data import DataModuleFromConfig, WrappedDataset

__all__ = ["CUDACallback", "DataModuleFromConfig", "ImageLogger", "SetupCallback", "WrappedDataset", "main"]

if __name__ == "__main__":
    sys.exit(main())
