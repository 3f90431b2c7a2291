"""What all commands share: exit codes, errors of one line, checks of paths, and loading a model.

Commands check what they can before they import torch and transformers, which takes seconds. So the modules of this
folder import heavy packages only inside functions.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.console import Interrupted, is_out_of_files, make_streams_lasting, raise_file_limit
from ldm.files import is_address, is_hub_id, no_address, why_unreadable
from ldm.front_ends import VARIABLE, speaking_as
from ldm.util import UserError
from ldm.values import named_number

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from ldm.models.diffusion.ddpm import LatentDiffusion

# The embedded model and its attribute judge, relative to the root of the checkout.
MODEL, JUDGE = Path("models/ldm/creatures"), Path("models/judge/creatures")
WEIGHTS = str(MODEL / "model.safetensors")

SMALLER = "fewer images at once (--n_samples, --batch_size), a smaller --H or --W, or --precision autocast"


def guarded(command: Callable[[], int | None], debug: bool = False, less_memory: str = SMALLER) -> int:
    """Call `command` and return the exit code: its result, or 0 if it returns None.

    A UserError is written as one line to stderr (after its traceback if `debug`). Ctrl-C, a signal and exhausted
    memory end without a traceback too; `less_memory` is what the user is advised to try in the last case.
    """
    make_streams_lasting()
    raise_file_limit()
    try:
        with speaking_as(os.environ.get(VARIABLE, "command")):
            return command() or 0
    except UserError as error:
        if debug:
            traceback.print_exc()
        write_error(error)
        return error.exit_code
    except Interrupted as signal:
        return signal.exit_code
    except KeyboardInterrupt:
        return 130
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_files(error):
            write_error("too many open files; raise the limit with 'ulimit -n 4096', or use num_workers: 0")
            return 1
        if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)) and not debug:
            name = os.fsdecode(error.filename)
            write_error(UserError(f"'{name}': {error.strerror}; check the path, or choose another"))
            return 1
        from ldm.training.fitting import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        write_error(f"out of memory; try {less_memory}")
        return 1


def write_error(error: UserError | str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(f"error: {error}\n")


def check_files(*paths: str | Path | None) -> None:
    """Raise UserError for the first path that was given but is not a file."""
    for path in paths:
        if path and not Path(path).is_file():
            raise UserError(f"'{path}' {why_unreadable(path)}")


def check_model(*sources: str | None) -> None:
    """Raise UserError for the first that was given but is neither a file, a folder nor a possible hub id."""
    for source in sources:
        if source and is_address(source):
            raise UserError(no_address(source))
        if source and not Path(source).exists() and not is_hub_id(source):
            raise UserError(f"'{source}' does not exist; check the path")


def add_dial_option(parser: argparse._ActionsContainer) -> None:
    """Add --dial, whose values are pairs of a name and a number."""

    def dial(text: str) -> tuple[str, float]:
        try:
            return named_number(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    parser.add_argument(
        "--dial",
        action="append",
        default=[],
        type=dial,
        metavar="NAME=NUMBER",
        help="of words of a method: truncation=32 or bypass=0.1 of NeTI, strength=0.8 of an output residual",
    )


@contextmanager
def naming_the_checkpoint(path: str) -> Iterator[None]:
    """Add the checkpoint's path to the error about an output that is not finite."""
    from ldm.generate.images import OutputError

    try:
        yield
    except OutputError as error:
        raise UserError(f"'{path}': {error}") from error


def load_latent_diffusion(
    config: DictConfig,
    ckpt: str,
    device: str | None = None,
    *,
    vae: str | None = None,
    precision: str = "full",
) -> LatentDiffusion:
    """`ldm.generate.session.load_latent_diffusion`, imported when it is called."""
    from ldm.generate import session

    return session.load_latent_diffusion(config, ckpt, device, vae=vae, precision=precision)
