"""The loss of fixed samples with fixed noise: whether a run learns, its best step, and when to stop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import default_collate

from ldm import random_state
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.schedule import LOSS_WEIGHT
from ldm.training.callbacks.base import RunCallback, callbacks_of, datasets_of, is_personalization
from ldm.training.callbacks.embedding_saver import EmbeddingSaver
from ldm.util import UserError, check_integer, evaluating

logger = logging.getLogger(__name__)


def copy_of_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state dict on the CPU."""
    return {key: value.detach().to("cpu", copy=True) for key, value in module.state_dict().items()}


@contextmanager
def temporary_state(module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Load another state into a module for this block, then restore its own state exactly."""
    before = copy_of_state(module)
    module.load_state_dict(state)
    try:
        yield
    finally:
        module.load_state_dict(before)


NOISE_SEED = 2302


class FixedNoiseLoss:
    """The loss of `samples` fixed samples with fixed noise, at timesteps from evenly spaced ranges.

    The training loss of a single step says little, because it depends mostly on its timesteps and noise; fixing them
    follows DVAR (Voronov et al. 2023, arXiv 2302.04841). The samples are spread evenly over the images. `chunk`
    samples at a time go through the model, so that measuring needs no more memory than training.
    """

    def __init__(self, model: LatentDiffusion, dataset: Any, samples: int, chunk: int) -> None:
        images = min(getattr(dataset, "num_images", len(dataset)), len(dataset))
        indices = [i if samples >= images else i * images // samples for i in range(samples)]
        with random_state.isolated(NOISE_SEED), torch.no_grad():
            items = [dataset[index % len(dataset)] for index in indices]
            batches = [default_collate(items[i : i + chunk]) for i in range(0, samples, chunk)]
            inputs = [
                model.get_input(_to_device(batch, model.device), model.first_stage_key) for batch in batches
            ]
            self.samples = samples
            self.latents = [latents for latents, _ in inputs]
            self.captions = [captions for _, captions in inputs]
            self.weights = [batch.get(LOSS_WEIGHT) for batch in batches]
            # Drawn on the CPU, so that every device measures with the same noise.
            self.noise = [torch.randn(latents.shape).to(latents.device) for latents in self.latents]
            positions = (torch.randperm(samples) + torch.rand(samples)) / samples
        self.timesteps = (positions * model.num_timesteps).long().to(model.device).split(chunk)
        # What the loss depends on besides the vectors: if it differs, two measurements cannot be compared.
        names = ["loss_type", "l_simple_weight", "loss_weighting", "min_snr_gamma"]
        # Only where there is guidance: the states of other runs do not have it.
        names += ["guidance_in_training"] * (model.guidance_in_training != 1)
        self.loss_settings = repr([getattr(model, name) for name in names])

    def description(self) -> dict[str, Any]:
        """What is measured, as plain values: captions, mean latents, mean weights and the settings of the loss."""
        captions = [caption for chunk in self.captions for caption in chunk]
        weights = [weight for weight in self.weights if weight is not None]
        means, pooled = (
            torch.cat([adaptive_avg_pool2d(part.float(), 4).cpu() for part in parts]) if parts else None
            for parts in (self.latents, weights)
        )
        return {"captions": captions, "means": means, "weights": pooled, "loss": self.loss_settings}

    def measures(self, description: Mapping[str, Any]) -> bool:
        """Whether this measures what is described; latents may differ as they do between devices and precisions."""
        own = self.description()
        same = all(own[key] == description[key] for key in ("captions", "loss"))
        # Runs of earlier versions say nothing of weights.
        return (
            same
            and _alike(own["means"], description["means"], 0.1)
            and _alike(own["weights"], description.get("weights"), 0.01)
        )

    @torch.no_grad()
    def measure(self, model: LatentDiffusion) -> float:
        """The mean loss; the model should be in evaluation mode. The random generators are not changed."""
        total = torch.zeros((), device=model.device)
        chunks = zip(self.latents, self.captions, self.timesteps, self.noise, self.weights, strict=True)
        with random_state.isolated(NOISE_SEED):
            for latents, captions, timesteps, noise, weight in chunks:
                condition = model.training_condition(captions)
                loss, _ = model.p_losses(latents, condition, timesteps, noise=noise, weight=weight)
                total += loss * len(latents)
        return float(total / self.samples)


def _alike(one: Tensor | None, other: Tensor | None, tolerance: float) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.allclose(one, other, atol=tolerance)


def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


class Plateau:
    """The stopping rule of DVAR (Voronov et al. 2023, arXiv 2302.04841).

    A curve is flat when the variance of its last `window` values is below `threshold` times the variance of all
    values. DVAR measures every step and uses 310 steps and 0.15 for textual inversion; 31 values of every tenth step
    cover the same range.
    """

    def __init__(self, window: int = 31, threshold: float = 0.15) -> None:
        check_integer(window, "deterministic_loss: stop.window", minimum=2)
        if not 0 < threshold < 1:
            raise UserError(
                f"deterministic_loss: stop.threshold is {threshold!r}; give a number between 0 and 1"
            )
        self.window = window
        self.threshold = threshold

    def ratio(self, values: Sequence[float]) -> float:
        """Variance of the last `window` values over the variance of all; infinite for up to `window` values."""
        if len(values) <= self.window:
            return float("inf")
        whole = float(np.var(values))
        return float(np.var(values[-self.window :])) / whole if whole > 0 else 0.0

    def reached(self, values: Sequence[float]) -> bool:
        """Whether the curve is flat."""
        return self.ratio(values) < self.threshold


LEAST_SAMPLES = 4
# A measurement takes half as long as a training step.
STEPS_APART, STEPS_APART_WITH_STOP = 20, 10


class DeterministicLoss(RunCallback):
    """Measures the loss of fixed samples every `every_n_train_steps` and logs it as `val/loss_deterministic`.

    By default that is every 20 steps, and every 10 with `stop`, whose rule counts measurements. Each measurement uses
    `samples` samples (None: one batch, but at least 4). The best step has the lowest mean of the last `smooth`
    measurements; its vectors are saved as `embeddings_best.pt`, and in the formats of the embedding saver, whenever the
    run's state is saved. With `stop`, the parameters of `Plateau`, the run ends as soon as the curve is flat. Measuring
    does not change the random numbers of the training. A resumed run measures the samples that it began with, whatever
    its batch size is then; with another `samples`, other images, masks, captions or settings of the loss the curve
    begins anew. Models without a personalization are ignored.
    """

    runs_before_saving = True

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        samples: int | None = None,
        smooth: int = 3,
        stop: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if every_n_train_steps is None:
            every_n_train_steps = STEPS_APART if stop is None else STEPS_APART_WITH_STOP
        check_integer(every_n_train_steps, "deterministic_loss: every_n_train_steps")
        check_integer(smooth, "deterministic_loss: smooth")
        if samples is not None:
            check_integer(samples, "deterministic_loss: samples")
        self.every_n_train_steps = every_n_train_steps
        self.samples = samples
        self.smooth = smooth
        try:
            self.rule = None if stop is None else Plateau(**stop)
        except TypeError as error:
            raise UserError(f"deterministic_loss: stop: {error}; use window and threshold") from error
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.best_step: int | None = None
        self._best_loss = math.inf
        self._best_state: dict[str, Tensor] = {}
        self._saved_best_step: int | None = None
        self._fixed: FixedNoiseLoss | None = None
        self._measured_step = -1
        # Of the measurements so far: the number of samples, and how many at a time; 0 if there are none.
        self._measured_samples, self._measured_chunk = 0, 0
        self._description: dict[str, Any] | None = None

    @property
    def flat(self) -> bool:
        """Whether the stopping rule says that the curve is flat; False without a rule."""
        return self.rule is not None and self.rule.reached(self.losses)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        dataset = datasets_of(trainer).get("train")
        if not is_personalization(pl_module) or pl_module.cond_stage_key != "caption":
            return
        if not hasattr(dataset, "__len__"):
            return
        chunk = self._measured_chunk or getattr(getattr(trainer, "datamodule", None), "batch_size", 1)
        samples = self.samples or self._measured_samples or max(LEAST_SAMPLES, chunk)
        with evaluating(pl_module):
            self._fixed = FixedNoiseLoss(pl_module, dataset, samples, chunk)
        if self._measured_samples not in (0, samples):
            self._begin_anew(f"{samples} samples")
        elif self._description is not None and not self._fixed.measures(self._description):
            self._begin_anew("other images, masks, captions or settings of the loss")
        self._measured_samples, self._measured_chunk = samples, chunk
        self._description = self._fixed.description()
        if self.flat:
            logger.info("the deterministic loss is already flat: the run ends here")
            trainer.should_stop = True
        if not self.losses:
            self._measure(trainer, pl_module, self._fixed)

    def _begin_anew(self, reason: str) -> None:
        logger.info("deterministic_loss: its curve begins anew with %s", reason)
        self.steps, self.losses, self._best_loss = [], [], math.inf

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._fixed is None or step % self.every_n_train_steps or step == self._measured_step:
            return
        self._measure(trainer, cast(LatentDiffusion, pl_module), self._fixed)
        if self.flat:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save_best(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.save_best(trainer)

    def figures(self) -> list[str]:
        return [f"fixed loss {self.losses[-1]:.4f}"] if self.losses else []

    def save_best(self, trainer: pl.Trainer) -> None:
        """Save the vectors of the best step, unless they are already saved."""
        saver = next((c for c in callbacks_of(trainer) if isinstance(c, EmbeddingSaver)), None)
        if saver is None or not self.best_step or self.best_step == self._saved_best_step:
            return
        if not trainer.is_global_zero:
            return
        manager = cast(nn.Module, trainer.lightning_module.embedding_manager)
        with temporary_state(manager, self._best_state):
            saver.save_as(trainer, "_best", self.best_step)
        self._saved_best_step = self.best_step

    def verdict(self, trainer: pl.Trainer, *, finished: bool) -> str | None:
        """Why the run ended and which step is the best, in one line; `finished` is false for an interrupted run."""
        if not self.losses:
            return None
        step = trainer.global_step
        if self.rule is not None and self.flat:
            ratio = self.rule.ratio(self.losses)
            reason = f"the deterministic loss is flat ({ratio:.2f} < {self.rule.threshold})"
        else:
            reason = "it reached its limit" if finished else "it was interrupted"
        if not self.best_step:
            comparison = "; no step was better than the initial vectors" if len(self.losses) > 1 else ""
            return f"ended at step {step} because {reason}{comparison}"
        path = Path(trainer.default_root_dir) / "checkpoints" / "embeddings_best.pt"
        first, best = self.losses[0], self._best_loss
        where = f": {path}" if path.is_file() else ""
        return (
            f"ended at step {step} because {reason}; step {self.best_step} is best "
            f"(deterministic loss {first:.4f} -> {best:.4f}){where}"
        )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.save_best(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": list(self.steps),
            "losses": list(self.losses),
            "best_step": self.best_step,
            "best_loss": self._best_loss,
            "best": dict(self._best_state),
            "samples": self._measured_samples,
            "chunk": self._measured_chunk,
            "measured": self._description,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.losses = list(state_dict["steps"]), list(state_dict["losses"])
        self.best_step, self._best_loss = state_dict["best_step"], state_dict["best_loss"]
        self._best_state = dict(state_dict["best"])
        self._measured_samples = state_dict.get("samples", 0)
        self._measured_chunk = state_dict.get("chunk", 0)
        self._description = state_dict.get("measured")
        self._measured_step = self.steps[-1] if self.steps else -1

    def _measure(self, trainer: pl.Trainer, model: LatentDiffusion, fixed: FixedNoiseLoss) -> None:
        self._measured_step = step = trainer.global_step
        with evaluating(model), trainer.precision_plugin.val_step_context():
            local = fixed.measure(model)
        # Averaged, so that all processes of a run decide the same.
        loss = float(trainer.strategy.reduce(torch.tensor(local, device=model.device)))
        if not math.isfinite(loss):
            return
        self.steps.append(step)
        self.losses.append(loss)
        for log in trainer.loggers:
            log.log_metrics({"val/loss_deterministic": loss}, step=step)
        recent = self.losses[-self.smooth :]
        smooth = sum(recent) / len(recent)
        if smooth < self._best_loss:
            self._best_loss, self.best_step = smooth, step
            self._best_state = copy_of_state(cast(nn.Module, model.embedding_manager))
