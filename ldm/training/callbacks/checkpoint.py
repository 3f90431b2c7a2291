"""The state that a stopped run goes on from: `last.ckpt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm import files, pickles, random_state


class StateFile(TorchCheckpointIO):
    """How Lightning writes and reads checkpoints here.

    Lightning's own way goes through a temporary file that may lie on another disk, and is not synced.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        files.atomic_write(path, lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return pickles.load(path)


class LastCheckpoint(Checkpoint):
    """Saves `path` every `every_n_train_steps` optimizer steps, at the end, and when the run breaks off.

    Of a personalization only what it trains is in the file, since the frozen model comes from its own
    checkpoint; of other models all weights are. The random states of all processes go with it, so that a
    resumed run draws what the uninterrupted one would have drawn.
    """

    def __init__(self, path: str | Path, every_n_train_steps: int = 500) -> None:
        super().__init__()
        self.path = Path(path)
        self.every_n_train_steps = every_n_train_steps
        self._saved_step = 0
        self._restore: list[Any] | None = None

    def save_now(self, trainer: pl.Trainer) -> None:
        """Save unless this step is saved already; all processes of a run must call it."""
        if trainer.global_step != self._saved_step:
            trainer.save_checkpoint(self.path)
            self._saved_step = trainer.global_step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step
        if self._restore is not None and len(self._restore) != trainer.world_size:
            self._restore = None
        if self._restore is None and trainer.world_size > 1:
            # Every process has set the same seed; equal noise on all GPUs would waste all but one. A run that goes on
            # with another number of processes does not begin its noise anew.
            random_state.seed_all(torch.initial_seed(), trainer.global_rank, trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not before the first step: what is set up until then may draw numbers.
        if self._restore is not None:
            random_state.restore(self._restore[trainer.global_rank])
            self._restore = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = self.every_n_train_steps > 0 and trainer.global_step % self.every_n_train_steps == 0
        # A validation that is broken off must not cost the steps before it.
        validates = batch_idx + 1 == trainer.num_training_batches and trainer.enable_validation
        if due or (validates and is_personalization(pl_module)):
            self.save_now(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save_now(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        # The other processes of a run on several GPUs may be waiting elsewhere.
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
        self._restore = checkpoint.get("random_states")


def is_personalization(module: Any) -> bool:
    """Whether a model trains the vectors of an embedding manager, so that its frozen part need not be saved."""
    return getattr(module, "embedding_manager", None) is not None and hasattr(module, "trainable_state_dict")
