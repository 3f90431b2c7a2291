"""Previews during training: images of a batch and of fixed prompts, on disk and in the loggers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from ldm import files, random_state
from ldm.images import ImageError, grid, image_grid, to_pil
from ldm.prompts import PER_IMAGE_TOKENS
from ldm.training.callbacks.base import RunCallback, datasets_of, personalization_of
from ldm.training.callbacks.latent_cache import CachedLatents
from ldm.util import UserError, check_integer, evaluating
from ldm.words import own_words

logger = logging.getLogger(__name__)


@runtime_checkable
class MakesImages(Protocol):
    """A model with previews."""

    def log_images(self, batch: Any, N: int = 8, **options: Any) -> dict[str, Tensor]:
        """Up to N images [n, 3, H, W] per name, in [-1, 1]."""
        ...


def filled_prompts(prompts: Sequence[str], model: object) -> list[str]:
    """Each prompt with each word of the model in place of `{}`; without duplicates, negatives and images' own words."""
    manager = personalization_of(model)
    held = manager.string_to_token_dict if manager is not None else ()
    words = own_words(word for word in held if word not in PER_IMAGE_TOKENS) or ["*"]
    texts = [prompt.replace("{}", word) for prompt in prompts for word in words]
    return list(dict.fromkeys(texts))


def prompt_sheet(
    inputs: Sequence[Image.Image], prompts: Sequence[str], images: Sequence[Image.Image]
) -> Image.Image:
    """A sheet with one column per prompt: the inputs above, the prompt's images (equally many per prompt) below."""
    each = len(images) // len(prompts)
    cells = [inputs[column % len(inputs)] for column in range(len(prompts))] if inputs else []
    labels = ["input"] * len(cells)
    for row in range(each):
        cells += [images[column * each + row] for column in range(len(prompts))]
        labels += prompts
    return grid(cells, len(prompts), labels, largest=None)


PREVIEW_SEED = 42
COLUMNS = 4


class ImageLogger(RunCallback):
    """Saves grids of the model's `log_images` every `batch_frequency` steps, and at the end of a run that had none.

    The files are `images/{train,val}/<name>_gs-<step>_e-<epoch>_b-<batch>.jpg` in the run folder. Every preview uses
    the same seed, and the random numbers of the training do not change.

    Args:
        max_images: the maximum number of images per grid.
        clamp: clamp values to [-1, 1].
        increase_log_steps: also log at the steps 1, 2, 4, ... below the frequency.
        rescale: the model's images are in [-1, 1], otherwise in [0, 1].
        log_on_batch_idx: count batches of the epoch instead of steps.
        log_first_step: also log at step 1.
        log_images_kwargs: further arguments for `log_images`.
        prompts: instead of the captions of a training batch, sample these prompts with the same noise each time; the
            sheet, with the inputs, is `prompts_gs-...jpg`. `{}` is filled with each placeholder in turn.
        images_per_prompt: the number of images of each prompt.
    """

    def __init__(
        self,
        batch_frequency: int,
        max_images: int,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_on_batch_idx: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: Mapping[str, Any] | None = None,
        prompts: Sequence[str] = (),
        images_per_prompt: int = 1,
    ) -> None:
        super().__init__()
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"image_logger: prompts is {prompts!r}; give a list of texts")
        check_integer(images_per_prompt, "image_logger: images_per_prompt")
        self.prompts = list(prompts)
        self.images_per_prompt = images_per_prompt
        self.batch_frequency = batch_frequency
        self.max_images = max_images
        self.clamp = clamp
        self.rescale = rescale
        self.disabled = disabled or max_images < 1 or batch_frequency < 1
        self.log_on_batch_idx = log_on_batch_idx
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self.early_steps: set[int] = set()
        if increase_log_steps and batch_frequency > 0:
            self.early_steps |= {2**n for n in range(int(np.log2(batch_frequency)) + 1)}
        if log_first_step:
            self.early_steps.add(1)
        self._last_step: dict[str, int] = {}  # by split
        self._last_batch: tuple[Any, int] | None = None

    def is_due(self, split: str, step: int, batch_idx: int) -> bool:
        """Whether a preview is due after this optimizer step, and not yet done."""
        if self.disabled:
            return False
        count = batch_idx + 1 if self.log_on_batch_idx else step
        due = count > 0 and (count % self.batch_frequency == 0 or count in self.early_steps)
        # With accumulated gradients several batches belong to one step.
        return due and (self.log_on_batch_idx or self._last_step.get(split) != step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.disabled and "train" not in self._last_step:
            self._last_batch = batch, batch_idx
        if self.is_due("train", trainer.global_step, batch_idx):
            self.log_images(trainer, pl_module, batch, batch_idx, "train")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that ends before its first preview ends with one, so that there is something to see."""
        # A resumed run had previews before, if it is past the first of them.
        if self._last_batch is None or trainer.global_step >= self.batch_frequency or self.early_steps:
            return
        if self.requests.stop is None:
            self.log_images(trainer, pl_module, *self._last_batch, "train")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking and self.is_due("val", trainer.global_step, batch_idx):
            self.log_images(trainer, pl_module, batch, batch_idx, "val")

    def log_images(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, split: str
    ) -> None:
        """Make and save the previews of one batch."""
        self._last_step[split], self._last_batch = trainer.global_step, None
        if not trainer.is_global_zero or not isinstance(pl_module, MakesImages):
            return
        try:
            batch = _with_images(trainer, pl_module, batch, split)
        except ImageError as error:
            # With cached latents the training does not need the image files.
            logger.warning("step %d: no preview: %s", trainer.global_step, error)
            return
        arguments: dict[str, Any] = {"N": self.max_images, **self.log_images_kwargs}
        if "split" in inspect.signature(pl_module.log_images).parameters:
            arguments["split"] = split
        texts = filled_prompts(self.prompts, pl_module) if split == "train" else []
        if texts:
            arguments |= {"prompts": texts, "images_per_prompt": self.images_per_prompt}
        # With several processes the others would wait forever for one that stops here.
        stoppable = self.requests.interruptible() if trainer.world_size == 1 else nullcontext()
        with (
            stoppable,
            evaluating(pl_module),
            random_state.isolated(PREVIEW_SEED),
            torch.no_grad(),
            trainer.precision_plugin.val_step_context(),
        ):
            images = pl_module.log_images(batch, **arguments)
        if broken := [key for key, tensor in images.items() if not tensor.isfinite().all()]:
            logger.warning(
                "step %d: no preview of %s: the output of %s is not finite (NaN or infinity) and would "
                "be a black image; use another copy of it, another --vae, or lightning.trainer.precision=32-true",
                trainer.global_step,
                ", ".join(broken),
                self.model_name,
            )
            images = {key: tensor for key, tensor in images.items() if key not in broken}
        name = f"gs-{trainer.global_step:06}_e-{trainer.current_epoch:06}_b-{batch_idx:06}"
        grids = {key: self._as_pil(tensor) for key, tensor in images.items()}
        if prompted := grids.pop("prompts", None):
            sheet = prompt_sheet(grids.get("inputs", []), texts, prompted)
            self._save(trainer, split, "prompts", name, sheet)
        for key, cells in grids.items():
            self._save(trainer, split, key, name, image_grid(cells[: self.max_images], columns=COLUMNS))

    def _as_pil(self, images: Tensor) -> list[Image.Image]:
        images = images.detach().float().cpu()
        if not self.rescale:
            images = images * 2 - 1
        if self.clamp:
            images = images.clamp(-1, 1)
        return [to_pil(image) for image in images]

    def _save(self, trainer: pl.Trainer, split: str, key: str, name: str, grid: Image.Image) -> None:
        path = Path(trainer.default_root_dir) / "images" / split / f"{key}_{name}.jpg"
        files.atomic_write(path, lambda file: grid.save(file, "JPEG", quality=95), sync=False)
        log: Any
        for log in trainer.loggers:
            if hasattr(log, "log_image"):  # Weights & Biases, Comet, MLflow
                log.log_image(f"{split}/{key}", [grid], step=trainer.global_step)
            elif hasattr(log.experiment, "add_image"):
                log.experiment.add_image(
                    f"{split}/{key}", np.asarray(grid), global_step=trainer.global_step, dataformats="HWC"
                )


def _with_images(trainer: pl.Trainer, model: Any, batch: Any, split: str) -> Any:
    """The batch; if it holds cached latents instead of images, with the images added."""
    key = getattr(model, "first_stage_key", None)
    if key is None or not isinstance(batch, Mapping) or key in batch:
        return batch
    dataset = datasets_of(trainer).get("train" if split == "train" else "validation")
    return dataset.with_images(batch, key) if isinstance(dataset, CachedLatents) else batch
