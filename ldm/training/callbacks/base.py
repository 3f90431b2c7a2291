"""The base class of this project's callbacks, and what they read from models, datasets and trainers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.personalization import Personalization
from ldm.prompts import PER_IMAGE_TOKENS
from ldm.training.callbacks.interruption import Requests


class RunCallback(Callback):
    """A callback with what a run needs beside Lightning's hooks.

    Attributes:
        runs_before_saving: the callback's state after a step belongs to the saved state of that step, so it must run
            before every callback that saves.
        requests: the stop and save requests of the run, which sets them; see `Requests.interruptible`.
        model_name: what messages call the frozen model; the run sets it.
    """

    runs_before_saving: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.requests = Requests()
        self.model_name = "the model"

    def figures(self) -> list[str]:
        """The latest results as short texts for the progress line."""
        return []


def is_personalization(model: object) -> TypeGuard[LatentDiffusion]:
    """Whether a model trains a personalization, so that its frozen weights need not be saved."""
    return personalization_of(model) is not None


def personalization_of(model: object) -> Personalization | None:
    """The personalization that a model trains, or None for any other model."""
    return model.embedding_manager if isinstance(model, LatentDiffusion) else None


def shared_vectors(manager: Personalization | None) -> dict[str, Tensor]:
    """Copies of the vectors that other programs can use, without those of single training images."""
    exported = {} if manager is None else manager.export()
    return {word: vectors for word, vectors in exported.items() if word not in PER_IMAGE_TOKENS}


def datasets_of(trainer: pl.Trainer) -> dict[str, Any]:
    """The datasets of the run by split; empty for a data module that is not a DataModuleFromConfig."""
    return getattr(getattr(trainer, "datamodule", None), "datasets", {})


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """All callbacks of a trainer."""
    return getattr(trainer, "callbacks", [])


def loss_of(outputs: Any) -> Tensor | None:
    """The loss in what `training_step` returned, if there is one."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, Tensor) else None
