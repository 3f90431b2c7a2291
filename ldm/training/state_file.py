"""The file of a run's state: written whole or not at all, read without running anything in it."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm import files, pickles


class StateFile(TorchCheckpointIO):
    """How Lightning writes and reads checkpoints here.

    Lightning's own way goes through a temporary file that may lie on another disk, and is not synced.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        files.write_whole(path, lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return pickles.load(path)
