"""Lightning's fit with its failures put in words, and nothing left hanging."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

from ldm import pickles
from ldm.console import Interrupted
from ldm.training import run_folder
from ldm.training.callbacks.checkpoint import is_personalization
from ldm.training.run_folder import RunFolder
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

# What torch, cuBLAS and cuDNN say, in small letters.
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
    """Train in a run folder, from the beginning or from a state.

    Raises UserError for what broke the run off from outside: devices, disks, memory; Interrupted for a signal.
    """
    if state is not None:
        check_state(state, model)
        logger.info("going on from %s", state)
    try:
        with run_folder.locked(folder.path, hold=trainer.is_global_zero), alone_at_last(trainer):
            trainer.fit(model, datamodule=data, ckpt_path=None if state is None else str(state))
    except MisconfigurationException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    except UserError as error:
        if "\n" not in str(error):
            raise
        # Out of a data loader's process it comes with that process's traceback, and its own words last.
        raise UserError(str(error).strip().splitlines()[-1].partition(": ")[2]) from error
    except OSError as error:
        where = f" '{error.filename}'" if error.filename else ""
        raise UserError(
            f"step {trainer.global_step}: {error.strerror or str(error).strip().splitlines()[-1]}{where}; what was "
            f"learned is in {folder.checkpoints}, and -r {folder.path} goes on once that is mended"
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
        # Lightning's own way out, where a signal came after a step and before what follows an epoch.
        raise Interrupted(signal.SIGTERM) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory at step {trainer.global_step}; what was learned is in {folder.checkpoints}. Try "
            "configs/recipes/low-memory.yaml as one more --base, that is data.params.batch_size=1, "
            "lightning.trainer.precision=bf16-mixed, model.params.unet_config.params.use_checkpoint=true or smaller "
            "images"
        ) from error


@contextmanager
def alone_at_last(trainer: pl.Trainer) -> Iterator[None]:
    """End the processes that this one started if it breaks off: they may be waiting for it, and would for long."""
    try:
        yield
    except BaseException:
        started = getattr(trainer.strategy.launcher, "procs", [])
        others = list(started)
        # Lightning's observer, which looks at this very list, would kill this process for the end of another.
        started.clear()
        for process in others:
            process.kill()
        raise


def check_state(path: Path, model: pl.LightningModule) -> None:
    """Whether a state belongs to this model; Lightning would pass over names that do not fit."""
    content = pickles.load(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if state is None or "loops" not in content:
        raise UserError(f"'{path}' is no state of a run; name the run folder, or a last.ckpt")
    model.configure_model()  # a first stage builds its loss, which has weights of its own
    wanted = model.trainable_state_dict() if is_personalization(model) else model.state_dict()
    strange = sorted(state.keys() ^ wanted.keys())
    if strange:
        raise UserError(
            f"'{path}' does not fit the configuration: '{strange[0]}' is only in one of the two; resume with the "
            "YAMLs and the placeholder that the run was started with"
        )


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(
        words in text for words in _OUT_OF_MEMORY
    )
