"""Previews while training: images of a batch and of fixed prompts, on disk and in TensorBoard."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from ldm import files, random_state
from ldm.images import ImageError, enlarged, image_grid, labelled, to_pil
from ldm.training.callbacks.interruption import Requests
from ldm.util import UserError

logger = logging.getLogger(__name__)

# Pictures smaller than this are enlarged, so that the words below them can be read.
SMALLEST = 128


def filled_prompts(prompts: Sequence[str], model: Any) -> list[str]:
    """The prompts with each of the model's placeholders in place of `{}`; what has no `{}` stays as it is."""
    words = list(getattr(getattr(model, "embedding_manager", None), "placeholders", {})) or ["*"]
    texts = [prompt.replace("{}", word) for prompt in prompts for word in words]
    return list(dict.fromkeys(texts))


def prompt_sheet(
    inputs: Sequence[Image.Image], prompts: Sequence[str], pictures: Sequence[Image.Image]
) -> Image.Image:
    """A row for each prompt with its pictures, equally many for all, beside one of the inputs."""
    each = len(pictures) // len(prompts)
    cells: list[Image.Image] = []
    for row, prompt in enumerate(prompts):
        if inputs:
            cells.append(labelled(_large(inputs[row % len(inputs)]), "input"))
        cells += [labelled(_large(picture), prompt) for picture in pictures[row * each : (row + 1) * each]]
    return image_grid(cells, columns=len(cells) // len(prompts), padding=4)


def _large(picture: Image.Image) -> Image.Image:
    return enlarged(picture, max(1, -(-SMALLEST // picture.width)))


PREVIEW_SEED = 42
COLUMNS = 4


class ImageLogger(Callback):
    """Saves grids of the model's `log_images` every `batch_frequency` steps.

    Files are `images/{train,val}/<name>_gs-<step>_e-<epoch>_b-<batch>.jpg` in the run folder. At most
    `max_images` per grid. `increase_log_steps` adds the steps 1, 2, 4, ... below the frequency,
    `log_first_step` the first; `log_on_batch_idx` counts batches of the epoch in place of steps.
    `rescale` takes pictures as [-1, 1] (otherwise [0, 1]); `clamp` cuts values outside [-1, 1].
    `log_images_kwargs` go to `log_images`. Previews use random numbers of their own: they neither change the
    training nor differ from one another by chance.

    With `prompts` each preview of a training batch is `images_per_prompt` pictures of every prompt, the same noises
    each time, on one sheet beside the inputs: `prompts_gs-...jpg`. `{}` in a prompt is the placeholder; of several
    placeholders each has the prompt in turn.
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
        if not isinstance(images_per_prompt, int) or images_per_prompt < 1:
            raise UserError(
                f"image_logger: images_per_prompt is {images_per_prompt!r}; it must be a whole number from 1 on"
            )
        self.prompts = list(prompts)
        self.images_per_prompt = images_per_prompt
        self.batch_frequency = batch_frequency
        self.max_images = max_images
        self.clamp = clamp
        self.rescale = rescale
        self.disabled = disabled or max_images < 1 or batch_frequency < 1
        self.log_on_batch_idx = log_on_batch_idx
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self.early_steps = set()
        if increase_log_steps and batch_frequency > 0:
            self.early_steps |= {2**n for n in range(int(np.log2(batch_frequency)) + 1)}
        if log_first_step:
            self.early_steps.add(1)
        self.requests = Requests()
        self._last: dict[str, int] = {}

    def is_due(self, split: str, step: int, batch_idx: int) -> bool:
        """Whether a preview is due, and not done already, after this many optimizer steps."""
        if self.disabled:
            return False
        count = batch_idx + 1 if self.log_on_batch_idx else step
        due = count > 0 and (count % self.batch_frequency == 0 or count in self.early_steps)
        # Several batches may be accumulated into one step.
        return due and (self.log_on_batch_idx or self._last.get(split) != step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.is_due("train", trainer.global_step, batch_idx):
            self.log_images(trainer, pl_module, batch, batch_idx, "train")

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
        self._last[split] = trainer.global_step
        if not trainer.is_global_zero or not callable(getattr(pl_module, "log_images", None)):
            return
        try:
            batch = _with_pictures(trainer, pl_module, batch, split)
        except ImageError as error:
            # A cache of latents trains on without the pictures.
            logger.warning("step %d: no preview: %s", trainer.global_step, error)
            return
        arguments = {"N": self.max_images, **self.log_images_kwargs}
        if "split" in inspect.signature(pl_module.log_images).parameters:
            arguments["split"] = split
        texts = filled_prompts(self.prompts, pl_module) if split == "train" else []
        if texts:
            arguments |= {"prompts": texts, "images_per_prompt": self.images_per_prompt}
        # The other processes of a run on several GPUs would wait for one that ends here.
        stoppable = self.requests.interruptible() if trainer.world_size == 1 else nullcontext()
        with (
            stoppable,
            evaluating(pl_module),
            random_state.isolated(PREVIEW_SEED),
            torch.no_grad(),
            trainer.precision_plugin.val_step_context(),
        ):
            pictures = pl_module.log_images(batch, **arguments)
        name = f"gs-{trainer.global_step:06}_e-{trainer.current_epoch:06}_b-{batch_idx:06}"
        shown = {key: self._as_pil(tensor) for key, tensor in pictures.items()}
        if made := shown.pop("prompts", None):
            sheet = prompt_sheet(shown.get("inputs", []), texts, made)
            self._save(trainer, split, "prompts", name, sheet)
        for key, found in shown.items():
            self._save(trainer, split, key, name, image_grid(found[: self.max_images], columns=COLUMNS))

    def _as_pil(self, pictures: Tensor) -> list[Image.Image]:
        pictures = pictures.detach().float().cpu()
        if not self.rescale:
            pictures = pictures * 2 - 1
        if self.clamp:
            pictures = pictures.clamp(-1, 1)
        return [to_pil(picture) for picture in pictures]

    def _save(self, trainer: pl.Trainer, split: str, key: str, name: str, grid: Image.Image) -> None:
        path = Path(trainer.default_root_dir) / "images" / split / f"{key}_{name}.jpg"
        files.atomic_write(path, lambda file: grid.save(file, "JPEG", quality=95))
        for log in trainer.loggers:
            if hasattr(log, "log_image"):  # Weights & Biases, Comet, MLflow
                log.log_image(f"{split}/{key}", [grid], step=trainer.global_step)
            elif hasattr(log.experiment, "add_image"):
                log.experiment.add_image(
                    f"{split}/{key}", np.asarray(grid), global_step=trainer.global_step, dataformats="HWC"
                )


def _with_pictures(trainer: pl.Trainer, model: Any, batch: Any, split: str) -> Any:
    """The batch; where a cache has taken its pictures' place, with the pictures."""
    key = getattr(model, "first_stage_key", None)
    if key is None or not isinstance(batch, Mapping) or key in batch:
        return batch
    dataset = getattr(trainer.datamodule, "datasets", {}).get("train" if split == "train" else "validation")
    return dataset.with_pictures(batch, key) if hasattr(dataset, "with_pictures") else batch


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode for this block; each part then returns to the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
