"""Lightning's fit, with failures as one-line errors and no process left running."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.exceptions import SIGTERMException

from ldm import pickles
from ldm.console import Interrupted
from ldm.front_ends import setting
from ldm.training import run_folder
from ldm.training.callbacks.base import is_personalization, personalization_of
from ldm.training.run_folder import RunFolder
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

# Parts of the messages of torch, cuBLAS and cuDNN, in lower case.
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)


def fit(
    folder: RunFolder,
    state: Path | None,
    trainer: pl.Trainer,
    model: pl.LightningModule,
    data: pl.LightningDataModule,
) -> None:
    """Train in a run folder, from the beginning or from a state file.

    Raises:
        UserError: the devices, the disk or the memory failed, or the configuration does not fit.
        Interrupted: a signal asked the run to stop.
    """
    if state is not None:
        check_state(state, model)
        # A resumed run may leave out callbacks of its first start.
        warnings.filterwarnings(
            "ignore", message="Be aware that when using `ckpt_path`, callbacks used to create"
        )
    try:
        with run_folder.locked(folder.path, hold=trainer.is_global_zero), kill_others_on_failure(trainer):
            trainer.fit(model, datamodule=data, ckpt_path=None if state is None else str(state))
    except MisconfigurationException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    except UserError as error:
        if "\n" not in str(error):
            raise
        # From a worker of the data loader: the text is that process's traceback, and its last line is the message.
        raise UserError(str(error).strip().splitlines()[-1].partition(": ")[2]) from error
    except OSError as error:
        where = f" '{error.filename}'" if error.filename else ""
        raise UserError(
            f"step {trainer.global_step}: {error.strerror or str(error).strip().splitlines()[-1]}{where}; what was "
            f"learned is in {folder.checkpoints}; correct the cause and resume with {setting('resume', '-r')} "
            f"{folder.path}"
        ) from error
    except ValueError as error:
        if "val_check_interval" not in str(error):
            raise
        batches = trainer.num_training_batches
        raise ConfigError(
            f"lightning.trainer.val_check_interval is {trainer.val_check_interval}, more than the {batches} batches of "
            "an epoch; lower it, or set check_val_every_n_epoch: null to count over all epochs"
        ) from error
    except SIGTERMException as error:
        # Lightning raises this if the signal comes after a step and before the end of the epoch is handled.
        raise Interrupted(signal.SIGTERM) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory at step {trainer.global_step}; what was learned is in {folder.checkpoints}. Try "
            f"{setting('less_memory')}, that is data.params.batch_size=1, "
            "lightning.trainer.precision=bf16-mixed, model.params.unet_config.params.use_checkpoint=true or smaller "
            "images"
        ) from error


@contextmanager
def kill_others_on_failure(trainer: pl.Trainer) -> Iterator[None]:
    """If this block fails, kill the processes that this one started: they would wait for it for a long time."""
    try:
        yield
    except BaseException:
        started = getattr(trainer.strategy.launcher, "procs", [])
        others = list(started)
        # Lightning watches this list and would kill this process when one of the others ends.
        started.clear()
        for process in others:
            process.kill()
        raise


def check_is_state(path: Path, folder: RunFolder) -> dict[str, Any]:
    """Check that a file is the state of a run, and return its content, mapped into memory.

    Raises:
        UserError: it is not, or it is one of Lightning 1.x; a run of the original keeps nothing in it.
    """
    vectors = ""
    if folder.embeddings.is_file():
        vectors = f"; begin a new run from its vectors: {setting('begin', folder.embeddings)}"
    try:
        content = pickles.load(path, mmap=True)
    except UserError as error:
        if "pytorch_lightning" not in str(error):
            raise
        raise UserError(f"'{path}' is a state of Lightning 1.x, which cannot be resumed{vectors}") from error
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("state_dict"), dict)
        or "loops" not in content
    ):
        holds = "is not the state of a run"
        if isinstance(content, dict) and not content:
            holds = "is empty, as the original left it"
        elif isinstance(content, dict) and str(content.get("pytorch-lightning_version", "")).startswith("1."):
            holds = "is a state of Lightning 1.x, which cannot be resumed"
        raise UserError(f"'{path}' {holds}{vectors or '; give the run folder, or a last.ckpt'}")
    return content


def check_state(path: Path, model: pl.LightningModule) -> None:
    """Check that a state file belongs to this model; Lightning would ignore names that do not fit.

    Raises:
        UserError: its names are not those of the model.
    """
    state = pickles.load(path, mmap=True)["state_dict"]
    model.configure_model()  # a first stage builds its loss, which has weights of its own
    if (manager := personalization_of(model)) is not None:
        own = "embedding_manager."
        manager.adopt_settings({k.removeprefix(own): v for k, v in state.items() if k.startswith(own)})
    expected = model.trainable_state_dict() if is_personalization(model) else model.state_dict()
    mismatched = sorted(state.keys() ^ expected.keys())
    if mismatched:
        raise UserError(
            f"'{path}' does not fit the configuration: '{mismatched[0]}' is only in one of the two; resume with the "
            "YAMLs and the placeholder that the run was started with"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or a CUDA library means that memory was not enough."""
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(
        part in text for part in _OUT_OF_MEMORY
    )
