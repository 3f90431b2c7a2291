"""First-stage posteriors, computed once per picture instead of at every step."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.utils.data import Dataset

from ldm.models.diffusion.ddpm import LATENT, POSTERIOR
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import UserError

logger = logging.getLogger(__name__)

# Pixels that are encoded at once where nothing is said: one picture of 512 x 512, a step's worth of memory.
PIXELS_AT_ONCE = 2**18


class CachedLatents(Dataset):
    """A picture dataset whose items hold a posterior (or latent) in place of the picture.

    `dataset` offers `variants()`, the arguments of `image(...)` for all pictures that its items can show, and
    `draw(index)` with the fields variant and caption. `encoded` holds one row per variant, [V, C, h, w]; `key` says
    what the rows are. A posterior is sampled where the picture would have been encoded, so training sees the same
    distribution. Items also hold their row, from which `with_pictures` finds the pictures again.
    """

    def __init__(self, dataset: Any, encoded: np.ndarray, key: str) -> None:
        self.data = dataset
        self.encoded = encoded
        self.key = key
        self._variants = list(map(tuple, dataset.variants()))
        self._row = {variant: row for row, variant in enumerate(self._variants)}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        drawn = self.draw(index)
        row = self._row[drawn.variant]
        moments = torch.from_numpy(np.array(self.encoded[row]))
        return {self.key: moments, "caption": drawn.caption, "row": torch.tensor(row)}

    def __getattr__(self, name: str) -> Any:
        """What the picture dataset offers beside its items: placeholders, captions and so on."""
        if name.startswith("__") or "data" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.data, name)

    def draw(self, index: int) -> Any:
        return self.data.draw(index)

    def with_pictures(self, batch: Mapping[str, Any], key: str) -> dict[str, Any]:
        """A batch of this dataset's items that also holds their pictures [B, H, W, 3] under a key."""
        pictures = [torch.as_tensor(self.data.image(*self._variants[row])) for row in batch["row"].tolist()]
        return {**batch, key: torch.stack(pictures)}


class LatentCache(Callback):
    """Replaces the pictures of the training split by their posteriors before training begins.

    `batch_size` pictures are encoded at once (None: as many as make up one large one). Up to `memory_mib` the cache
    is kept in memory, beyond that in a temporary file that goes with the run. Datasets that cannot enumerate their
    pictures or whose pictures differ in size, and models that do not learn from captions, are left as they are.
    With everything encoded the first stage rests on the CPU, and leaves its memory on the accelerator to the
    training; previews and validation have it there for as long as they need it (`first_stage_on`).
    """

    def __init__(self, batch_size: int | None = None, memory_mib: int = 4096) -> None:
        if batch_size is not None and batch_size < 1:
            raise UserError(f"latent_cache: batch_size is {batch_size}; it must be at least 1")
        self.batch_size = batch_size
        self.memory_bytes = memory_mib << 20
        self._file: Any = None
        self._lent = ExitStack()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        datasets: dict[str, Any] = getattr(trainer.datamodule, "datasets", {})
        dataset = datasets.get("train")
        if getattr(pl_module, "cond_stage_key", None) != "caption" or not _can_enumerate(dataset):
            return
        datasets["train"] = self.cached(pl_module, dataset, trainer.strategy.root_device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Only now: Lightning moves the whole model to its device after on_fit_start.
        dataset = getattr(trainer.datamodule, "datasets", {}).get("train")
        if isinstance(dataset, CachedLatents) and hasattr(pl_module, "first_stage_on"):
            pl_module.first_stage_model.to("cpu")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Once for all its batches: each of them would bring it anew.
        if hasattr(pl_module, "first_stage_on"):
            self._lent.enter_context(pl_module.first_stage_on(trainer.strategy.root_device))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lent.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._lent.close()

    @torch.no_grad()
    def cached(self, model: Any, dataset: Any, device: torch.device) -> Any:
        """`dataset` with its pictures encoded by the model's first stage on `device`, or as it is."""
        variants = list(dataset.variants())
        shape = dataset.image(*variants[0]).shape
        at_once = self.batch_size or max(1, PIXELS_AT_ONCE // (shape[0] * shape[1]))
        first_stage = model.first_stage_model
        home = next((p.device for p in first_stage.parameters()), device)
        first_stage.to(device)
        rows: np.ndarray | None = None
        key = POSTERIOR
        for start in range(0, len(variants), at_once):
            chunk = variants[start : start + at_once]
            pictures = [torch.as_tensor(dataset.image(*variant)) for variant in chunk]
            if any(picture.shape != shape for picture in pictures):
                logger.info(
                    "the pictures differ in size and are encoded at every step; data size makes them equal"
                )
                first_stage.to(home)
                return dataset
            encoded = model.encode_first_stage(torch.stack(pictures).movedim(-1, 1).to(device))
            if not isinstance(encoded, DiagonalGaussianDistribution):
                key = LATENT
            moments = encoded.parameters if key == POSTERIOR else encoded
            if rows is None:
                rows = self._room((len(variants), *moments.shape[1:]))
            rows[start : start + len(chunk)] = moments.float().cpu().numpy()
        first_stage.to(home)
        logger.info("encoded %d pictures once; the first stage rests from here on", len(variants))
        return CachedLatents(dataset, rows, key)

    def _room(self, shape: Sequence[int]) -> np.ndarray:
        if 4 * int(np.prod(shape)) <= self.memory_bytes:
            return np.empty(shape, np.float32)
        self._file = tempfile.TemporaryFile(prefix="latents-")  # noqa: SIM115  (as long as the run)
        return np.memmap(self._file, np.float32, "w+", shape=tuple(shape))


def _can_enumerate(dataset: Any) -> bool:
    return all(callable(getattr(dataset, name, None)) for name in ("variants", "draw", "image"))
