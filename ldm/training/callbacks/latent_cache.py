"""Encodes the training images once before training, instead of at every step."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.utils.data import Dataset

from ldm.models.diffusion.ddpm import LATENT, POSTERIOR, LatentDiffusion
from ldm.models.diffusion.schedule import LOSS_WEIGHT, cell_weights
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.training.callbacks.base import datasets_of
from ldm.training.callbacks.progress import duration
from ldm.util import UserError, check_integer, counted, free_memory

logger = logging.getLogger(__name__)

# Pixels encoded at once by default: one image of 512 x 512, which needs about as much memory as a training step.
PIXELS_AT_ONCE = 2**18


class CachedLatents(Dataset[dict[str, Any]]):
    """An image dataset whose items hold a posterior (or latent) instead of the image.

    Args:
        dataset: offers `variants()`, the arguments of `image(...)` for all images that its items can show, and
            `draw(index)` with the fields variant and caption. It may offer `loss_weight(...)` with the same arguments,
            the weights of the pixels in the loss [H, W] or None. Its other attributes can be read here too.
        encoded: one row per variant, [V, C, h, w].
        key: POSTERIOR or LATENT. A posterior is sampled at every step, so training sees the same distribution of
            latents as without the cache.

    An item's `row` is its row in `encoded`, from which `with_images` finds the image.
    """

    def __init__(self, dataset: Any, encoded: np.ndarray, key: str) -> None:
        self.data = dataset
        self.encoded = encoded
        self.key = key
        self._variants = list(map(tuple, dataset.variants()))
        self._row = {variant: row for row, variant in enumerate(self._variants)}
        self.weights = self._cell_weights()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        drawn = self.draw(index)
        row = self._row[drawn.variant]
        moments = torch.from_numpy(np.array(self.encoded[row]))
        item = {self.key: moments, "caption": drawn.caption, "row": torch.tensor(row)}
        if hasattr(self.data, "sizes"):
            item["sizes"] = self.data.sizes(*drawn.variant)
        return item if self.weights is None else {**item, LOSS_WEIGHT: self.weights[row]}

    def _cell_weights(self) -> Tensor | None:
        """The weights in the loss of the cells of each row, [V, h, w]; None if the dataset has none."""
        weight_of = getattr(self.data, "loss_weight", None)
        pixels = [weight_of(*variant) for variant in self._variants] if callable(weight_of) else []
        if not pixels or pixels[0] is None:
            return None
        return torch.cat([cell_weights(one[None], *self.encoded.shape[-2:])[0] for one in pixels])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "data" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.data, name)

    def draw(self, index: int) -> Any:
        """What an item shows: its variant and its caption."""
        return self.data.draw(index)

    def with_images(self, batch: Mapping[str, Any], key: str) -> dict[str, Any]:
        """A batch of items with their images [B, H, W, 3] added under a key."""
        images = [torch.as_tensor(self.data.image(*self._variants[row])) for row in batch["row"].tolist()]
        return {**batch, key: torch.stack(images)}


class LatentCache(Callback):
    """Replaces the training images by their posteriors before training begins.

    A dataset that cannot list its images, images of different sizes, and a model that does not learn from captions
    are left as they are. During training the first stage stays on the CPU, which frees its memory on the accelerator;
    previews and validation move a copy there as long as they need it (`first_stage_on`).

    Args:
        batch_size: images encoded at once; None: as many as one image of 512 x 512 has pixels.
        memory_mib: the largest cache that is held in memory; a larger one is a temporary file for the run.
    """

    def __init__(self, batch_size: int | None = None, memory_mib: int = 4096) -> None:
        if batch_size is not None:
            check_integer(batch_size, "latent_cache: batch_size")
        self.batch_size = batch_size
        self.memory_bytes = memory_mib << 20
        self._validation = ExitStack()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        datasets = datasets_of(trainer)
        dataset = datasets.get("train")
        if not isinstance(pl_module, LatentDiffusion) or pl_module.cond_stage_key != "caption":
            return
        if all(callable(getattr(dataset, name, None)) for name in ("variants", "draw", "image")):
            datasets["train"] = self.cached(pl_module, dataset, trainer.strategy.root_device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not earlier: Lightning moves the whole model to its device after on_fit_start.
        dataset = datasets_of(trainer).get("train")
        if isinstance(dataset, CachedLatents) and isinstance(pl_module, LatentDiffusion):
            pl_module.first_stage_model.to("cpu")
            # For the first image cuDNN tries convolutions with all the memory that is free (on an H200, 139 GB for an
            # image of 512 x 512). It is no memory of the run, and other programs want it.
            free_memory()
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Once for the whole validation, because each batch would otherwise move it anew.
        if isinstance(pl_module, LatentDiffusion):
            self._validation.enter_context(pl_module.first_stage_on(trainer.strategy.root_device))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._validation.close()

    @torch.no_grad()
    def cached(self, model: LatentDiffusion, dataset: Any, device: torch.device) -> Any:
        """`dataset` as CachedLatents, encoded on `device`; `dataset` itself if its images differ in size."""
        variants = list(dataset.variants())
        shape = dataset.image(*variants[0]).shape
        at_once = self.batch_size or max(1, PIXELS_AT_ONCE // (shape[0] * shape[1]))
        first_stage = model.first_stage_model
        home = next((p.device for p in first_stage.parameters()), device)
        first_stage.to(device)
        rows = np.empty(0)
        key = POSTERIOR
        for start in counted(range(0, len(variants), at_once), _tell_encoding(len(variants), at_once)):
            chunk = variants[start : start + at_once]
            images = [torch.as_tensor(dataset.image(*variant)) for variant in chunk]
            if any(image.shape != shape for image in images):
                logger.info(
                    "the images differ in size and are encoded at every step; set size in the dataset"
                )
                first_stage.to(home)
                return dataset
            encoded = model.encode_first_stage(torch.stack(images).movedim(-1, 1).to(device))
            if isinstance(encoded, DiagonalGaussianDistribution):
                moments = encoded.parameters
            else:
                key, moments = LATENT, encoded
            if start == 0:
                rows = self._allocate((len(variants), *moments.shape[1:]))
            rows[start : start + len(chunk)] = moments.float().cpu().numpy()
        first_stage.to(home)
        logger.info(
            "encoded %d images once; the first stage is not used at the training steps", len(variants)
        )
        return CachedLatents(dataset, rows, key)

    def _allocate(self, shape: Sequence[int]) -> np.ndarray:
        if 4 * int(np.prod(shape)) <= self.memory_bytes:
            return np.empty(shape, np.float32)
        # The mapping keeps the unnamed file alive as long as the array.
        with tempfile.TemporaryFile(prefix="latents-") as file:
            size = 4 * int(np.prod(shape))
            try:
                if hasattr(os, "posix_fallocate"):  # on a full disk a mapping would end the process
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise UserError(
                    f"the latents need {size / 2**30:.1f} GiB in '{tempfile.gettempdir()}' ({error.strerror}); set "
                    "TMPDIR to another folder, or lightning.callbacks.latent_cache: null"
                ) from error
            return np.memmap(file, np.float32, "w+", shape=tuple(shape))


def _tell_encoding(images: int, at_once: int) -> Callable[[int, int], None]:
    """What `counted` calls while images are encoded: it logs how many are done and the time left."""
    start = time.monotonic()

    def tell(done: int, total: int) -> None:
        left = (time.monotonic() - start) * (total - done) / done
        logger.info("encoded %d of %d images, %s left", min(done * at_once, images), images, duration(left))

    return tell
