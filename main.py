"""Learn the vectors of a new word from a few images, or train a model: python main.py --base YAML -t --gpus 0,

YAMLs refer to the classes imported here as `main.DataModuleFromConfig` and so on.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from ldm import console
from ldm.console import Interrupted
from ldm.training.callbacks.image_logger import ImageLogger
from ldm.training.callbacks.performance import CUDACallback
from ldm.training.callbacks.setup import SetupCallback
from ldm.training.data import DataModuleFromConfig, WrappedDataset
from ldm.training.run import run
from ldm.util import UserError

__all__ = ["CUDACallback", "DataModuleFromConfig", "ImageLogger", "SetupCallback", "WrappedDataset", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; a failure prints one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv or "-d" in argv
    console.set_up_logging(debug)
    # Classes of the user are imported from the working directory.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return run(argv)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
