"""What a run saves to be resumed: its YAMLs, and `last.ckpt` with its state and random states; the seed of validation."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm import files, pickles, random_state
from ldm.training.callbacks.base import is_personalization


class SetupCallback(Callback):
    """Creates `logdir`, `ckptdir` and `cfgdir`, and saves `config` and `lightning_config` in `cfgdir`.

    The files are `<now>-project.yaml` and `<now>-lightning.yaml`; `-r` reads them. `resume` is not used; it is part
    of the original's signature.
    """

    def __init__(
        self,
        resume: str,
        now: str,
        logdir: str | Path,
        ckptdir: str | Path,
        cfgdir: str | Path,
        config: DictConfig,
        lightning_config: DictConfig,
    ) -> None:
        super().__init__()
        self.resume = resume
        self.now = now
        self.logdir = Path(logdir)
        self.ckptdir = Path(ckptdir)
        self.cfgdir = Path(cfgdir)
        self.config = config
        self.lightning_config = lightning_config

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not trainer.is_global_zero or stage != "fit":
            return
        # Writing these files first makes a run fail before its first step if the folder is not writable.
        lightning = OmegaConf.create({"lightning": self.lightning_config})
        files.write_text(self.cfgdir / f"{self.now}-project.yaml", OmegaConf.to_yaml(self.config))
        files.write_text(self.cfgdir / f"{self.now}-lightning.yaml", OmegaConf.to_yaml(lightning))
        self.ckptdir.mkdir(parents=True, exist_ok=True)


class StateFile(TorchCheckpointIO):
    """Writes checkpoints atomically and reads them safely, in place of Lightning's default.

    The default uses a temporary file that may be on another disk, and does not sync it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        files.atomic_write(path, lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return pickles.load(path)


class LastCheckpoint(Checkpoint):
    """Saves the run's state to `path` every `every_n_train_steps` optimizer steps, at the end, and on an exception.

    For a personalization the file holds only what is trained, since the frozen weights come from their own
    checkpoint; for other models it holds all weights. It also holds the random states of all processes, so that a
    resumed run draws the numbers that the uninterrupted run would have drawn.
    """

    def __init__(self, path: str | Path, every_n_train_steps: int = 500) -> None:
        super().__init__()
        self.path = Path(path)
        self.every_n_train_steps = every_n_train_steps
        self._saved_step = 0
        self._restored_states: list[Any] | None = None

    def save_now(self, trainer: pl.Trainer) -> None:
        """Save, unless this step is already saved; all processes of a run must call it."""
        if trainer.global_step != self._saved_step:
            trainer.save_checkpoint(self.path)
            self._saved_step = trainer.global_step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step
        if self._restored_states is not None and len(self._restored_states) != trainer.world_size:
            self._restored_states = None
        if self._restored_states is None and trainer.world_size > 1:
            # All processes were seeded equally, but each needs noise of its own. The step is part of the seed, so that
            # a run resumed with another number of processes does not repeat its first noise.
            random_state.seed_all(torch.initial_seed(), trainer.global_rank, trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not earlier: the setup of callbacks and data loaders may draw random numbers.
        if self._restored_states is not None:
            random_state.restore(self._restored_states[trainer.global_rank])
            self._restored_states = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = self.every_n_train_steps > 0 and trainer.global_step % self.every_n_train_steps == 0
        # Save before a validation, so that interrupting it does not lose the steps before it.
        validates = batch_idx + 1 == trainer.num_training_batches and trainer.enable_validation
        # Lightning counts the epoch in which a run ends as finished, so a state of later would continue with the next.
        ends = trainer.should_stop or trainer.global_step == trainer.max_steps
        if due or ends or (validates and is_personalization(pl_module)):
            self.save_now(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save_now(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        # With several processes the others may be blocked elsewhere, and saving waits for all of them.
        if trainer.global_step > 0 and trainer.world_size == 1:
            self.save_now(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states: list[Any] = [random_state.capture()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, random_state.capture())
        checkpoint["random_states"] = states
        if is_personalization(pl_module):
            checkpoint["state_dict"] = pl_module.trainable_state_dict()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._restored_states = checkpoint.get("random_states")


VALIDATION_SEED = 4711


class ValidationSeed(Callback):
    """Runs every validation with the same seed, so that its losses are comparable, and restores the generators."""

    def __init__(self) -> None:
        super().__init__()
        self._isolation = ExitStack()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._isolation.enter_context(random_state.isolated(VALIDATION_SEED, trainer.global_rank))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._isolation.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._isolation.close()
