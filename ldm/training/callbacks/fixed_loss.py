"""The loss of fixed samples under fixed noise: whether a run learns, which step is the best, and when to stop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import default_collate

from ldm import random_state
from ldm.training.callbacks.embedding_saver import EmbeddingSaver
from ldm.training.callbacks.image_logger import evaluating
from ldm.util import UserError

logger = logging.getLogger(__name__)


def copy_of_state(manager: nn.Module) -> dict[str, Tensor]:
    """A copy of a manager's state on the CPU."""
    return {key: value.detach().to("cpu", copy=True) for key, value in manager.state_dict().items()}


@contextmanager
def holding_state(manager: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this block the manager has another state; after it, to the bit, its own."""
    before = copy_of_state(manager)
    manager.load_state_dict(state)
    try:
        yield
    finally:
        manager.load_state_dict(before)


NOISE_SEED = 2302


class FixedNoiseLoss:
    """The loss of `samples` fixed samples of a dataset under fixed noise, at timesteps from evenly spaced ranges.

    The samples are spread over the pictures. They go through the model `chunk` at a time, so that measuring takes
    no more memory than training. The training loss of a step says little, for its timesteps and noise decide on it
    (DVAR: Voronov et al. 2023, arXiv 2302.04841, fix them as is done here).
    """

    def __init__(self, model: Any, dataset: Any, samples: int, chunk: int) -> None:
        pictures = min(getattr(dataset, "num_images", len(dataset)), len(dataset))
        spread = [i if samples >= pictures else i * pictures // samples for i in range(samples)]
        with random_state.isolated(NOISE_SEED), torch.no_grad():
            items = [dataset[index % len(dataset)] for index in spread]
            batches = [default_collate(items[i : i + chunk]) for i in range(0, samples, chunk)]
            inputs = [model.get_input(_on(batch, model.device), model.first_stage_key) for batch in batches]
            self.samples = samples
            self.latents, self.captions = zip(*inputs, strict=True)
            # On the CPU, so that every device measures the same.
            self.noise = [torch.randn(latent.shape).to(latent.device) for latent in self.latents]
            places = (torch.randperm(samples) + torch.rand(samples)) / samples
        self.timesteps = (places * model.num_timesteps).long().to(model.device).split(chunk)

    @torch.no_grad()
    def measure(self, model: Any) -> float:
        """The mean loss; the model should be in evaluation mode. Draws from no generator."""
        total = torch.zeros((), device=model.device)
        chunks = zip(self.latents, self.captions, self.timesteps, self.noise, strict=True)
        with random_state.isolated(NOISE_SEED):
            for latents, captions, timesteps, noise in chunks:
                condition = model.get_learned_conditioning(captions)
                loss, _ = model.p_losses(latents, condition, timesteps, noise=noise)
                total += loss * len(latents)
        return float(total / self.samples)


def _on(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}


class Plateau:
    """The stopping rule of DVAR (Voronov et al. 2023, arXiv 2302.04841).

    A curve is flat once the variance of its last `window` values is below `threshold` of the variance of all. DVAR
    measures every step, with 310 steps and 0.15 for textual inversion; 31 values of every tenth step are as long.
    """

    def __init__(self, window: int = 31, threshold: float = 0.15) -> None:
        if not isinstance(window, int) or window < 2:
            raise UserError(f"stop: window is {window!r}; give a number of evaluations from 2 on")
        if not 0 < threshold < 1:
            raise UserError(f"stop: threshold is {threshold!r}; give a number between 0 and 1")
        self.window = window
        self.threshold = threshold

    def ratio(self, values: Sequence[float]) -> float:
        """Variance of the window over the variance of all; infinite as long as there are no more values than that."""
        if len(values) <= self.window:
            return float("inf")
        whole = float(np.var(values))
        return float(np.var(values[-self.window :])) / whole if whole > 0 else 0.0

    def reached(self, values: Sequence[float]) -> bool:
        return self.ratio(values) < self.threshold


LEAST_SAMPLES = 4


class DeterministicLoss(Callback):
    """Measures the loss of fixed samples every `every_n_train_steps` and logs it as `val/loss_deterministic`.

    `samples` (None: a batch, but at least 4) are measured each time. The best step is the one with the lowest mean
    over the last `smooth` measurements; its vectors are saved as `embeddings_best.pt`, and in the embedding
    saver's further formats, whenever the run's state is saved. With `stop`, the parameters of `Plateau`, the run
    ends as soon as the curve is flat. Measuring takes no random numbers from the training. Models without an
    embedding manager are left alone.
    """

    # A state that is saved at a step includes what was measured there.
    before_saving = True

    def __init__(
        self,
        every_n_train_steps: int = 10,
        samples: int | None = None,
        smooth: int = 3,
        stop: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("every_n_train_steps", every_n_train_steps), ("smooth", smooth)):
            if not isinstance(number, int) or number < 1:
                raise UserError(
                    f"deterministic_loss: {name} is {number!r}; it must be a whole number from 1 on"
                )
        if samples is not None and (not isinstance(samples, int) or samples < 1):
            raise UserError(
                f"deterministic_loss: samples is {samples!r}; it must be a whole number from 1 on"
            )
        self.every_n_train_steps = every_n_train_steps
        self.samples = samples
        self.smooth = smooth
        try:
            self.rule = None if stop is None else Plateau(**stop)
        except TypeError as error:
            raise UserError(f"deterministic_loss: stop: {error}; it takes window and threshold") from error
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.best_step: int | None = None
        self._best_loss = math.inf
        self._best: dict[str, Tensor] = {}
        self._written: int | None = None
        self._yardstick: FixedNoiseLoss | None = None
        self._measured = -1

    @property
    def flat(self) -> bool:
        """Whether the rule says that there is nothing more to gain."""
        return self.rule is not None and self.rule.reached(self.losses)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        dataset = getattr(trainer.datamodule, "datasets", {}).get("train")
        if getattr(pl_module, "embedding_manager", None) is None or not hasattr(dataset, "__len__"):
            return
        if getattr(pl_module, "cond_stage_key", None) != "caption":
            return
        chunk = getattr(trainer.datamodule, "batch_size", 1)
        with evaluating(pl_module):
            self._yardstick = FixedNoiseLoss(
                pl_module, dataset, self.samples or max(LEAST_SAMPLES, chunk), chunk
            )
        if self.flat:
            logger.info("the deterministic loss was flat already: there is nothing to go on with")
            trainer.should_stop = True
        if not self.losses:
            self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._yardstick is None or step % self.every_n_train_steps or step == self._measured:
            return
        self._measure(trainer, pl_module)
        if self.flat:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save_best(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.save_best(trainer)

    def figures(self, trainer: pl.Trainer) -> list[str]:
        """The last measurement in words."""
        return [f"fixed loss {self.losses[-1]:.4f}"] if self.losses else []

    def save_best(self, trainer: pl.Trainer) -> None:
        """Write the best vectors so far, unless they are written already."""
        saver = next((c for c in trainer.callbacks if isinstance(c, EmbeddingSaver)), None)
        if saver is None or not self.best_step or self.best_step == self._written:
            return
        if not trainer.is_global_zero:
            return
        with holding_state(trainer.lightning_module.embedding_manager, self._best):
            saver.save_as(trainer, "_best", self.best_step)
        self._written = self.best_step

    def verdict(self, trainer: pl.Trainer, *, finished: bool) -> str | None:
        """Why the run ended and which step is the best, in one line; `finished` tells one that was not stopped."""
        if not self.losses:
            return None
        step = trainer.global_step
        if self.flat:
            ratio = self.rule.ratio(self.losses)
            reason = f"the deterministic loss is flat ({ratio:.2f} < {self.rule.threshold})"
        else:
            reason = "that is its limit" if finished else "it was interrupted"
        if not self.best_step:
            found = "; no step was better than the first vectors" if len(self.losses) > 1 else ""
            return f"ended at step {step} because {reason}{found}"
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
            "best": dict(self._best),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.losses = list(state_dict["steps"]), list(state_dict["losses"])
        self.best_step, self._best_loss = state_dict["best_step"], state_dict["best_loss"]
        self._best = dict(state_dict["best"])
        self._measured = self.steps[-1] if self.steps else -1

    def _measure(self, trainer: pl.Trainer, model: Any) -> None:
        self._measured = step = trainer.global_step
        with evaluating(model), trainer.precision_plugin.val_step_context():
            loss = self._yardstick.measure(model)
        # All processes of a run must come to the same conclusions.
        loss = float(trainer.strategy.reduce(torch.tensor(loss, device=model.device)))
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
            self._best = copy_of_state(model.embedding_manager)
