"""Statistics of the vectors, and a guard against runs that learn nothing or whose loss is not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.personalization import Personalization, TextEncoder
from ldm.training.callbacks.base import RunCallback, loss_of, personalization_of
from ldm.util import UserError, check_integer

logger = logging.getLogger(__name__)


class VectorRow(NamedTuple):
    """One measurement of `VectorStats`."""

    step: int
    norm_ratio: float
    cosine: float
    learning_rate: float


class VectorStats(RunCallback):
    """Logs `vectors/norm_ratio` and `vectors/cosine_to_initial` every `every_n_train_steps`.

    The first is the mean norm of the vectors over that of the vocabulary. Vectors much longer than words hardly
    differ in direction any more, and prompts with them are followed badly (DTI: Kim et al., ICLR 2026). The second
    is the mean cosine between the vectors and their values at the start of the run. Where a word has vectors for each
    timestep or layer, these are means over all of them; where it has none, only the learning rate is kept.
    """

    runs_before_saving = True

    state_key = "Health"  # the name in the states of earlier runs

    def __init__(self, every_n_train_steps: int = 10) -> None:
        super().__init__()
        check_integer(every_n_train_steps, "vector_stats: every_n_train_steps")
        self.every_n_train_steps = every_n_train_steps
        self.rows: list[VectorRow] = []
        self._initial: dict[str, Tensor] = {}
        self._widths: tuple[int, ...] = ()
        self._vocabulary_norms: list[float] = []
        self._measured_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        manager = personalization_of(pl_module)
        if manager is None:
            return
        self._initial = self._initial or _vectors_of(manager)
        encoder = cast(TextEncoder, pl_module.cond_stage_model)
        table, self._widths = encoder.token_embedding.weight.detach().float(), encoder.widths
        self._vocabulary_norms = [float(part.norm(dim=1).mean()) for part in self._parts(table)]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == 0 or step % self.every_n_train_steps or step == self._measured_step:
            return
        manager = personalization_of(pl_module)
        if manager is None:
            return
        self._measured_step = step
        rate, current = trainer.optimizers[0].param_groups[0]["lr"], _vectors_of(manager)
        if not current:
            self.rows.append(VectorRow(step, math.nan, math.nan, rate))
            return
        norms = [torch.stack([part.norm(dim=1) for part in self._parts(v)]) for v in current.values()]
        ratios = (torch.cat(norms, dim=1).mean(dim=1) / torch.tensor(self._vocabulary_norms)).tolist()
        ratio = sum(ratios) / len(ratios)
        cosines = [
            torch.cosine_similarity(one, other, dim=1)
            for word, vectors in current.items()
            if (first := self._initial.get(word)) is not None
            for one, other in zip(
                self._parts(vectors[: len(first)]), self._parts(first[: len(vectors)]), strict=True
            )
        ]
        cosine = torch.cat(cosines).mean().item() if cosines else float("nan")
        self.rows.append(VectorRow(step, ratio, cosine, rate))
        metrics = {"vectors/norm_ratio": ratio, "vectors/cosine_to_initial": cosine}
        if len(ratios) > 1:
            metrics |= {f"vectors/norm_ratio_{tower}": own for tower, own in enumerate(ratios, start=1)}
        for log in trainer.loggers:
            log.log_metrics(metrics, step=step)

    def _parts(self, vectors: Tensor) -> Sequence[Tensor]:
        """The parts of vectors [N, d] for the towers of the text encoder, which differ in the norm of words."""
        whole = vectors.shape[1] != sum(self._widths)
        return (vectors,) if whole else vectors.split(list(self._widths), dim=1)

    def figures(self) -> list[str]:
        if not self.rows or math.isnan(self.rows[-1].norm_ratio):
            return []
        return [f"norm x{self.rows[-1].norm_ratio:.2f}", f"cos {self.rows[-1].cosine:.2f}"]

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": [list(row) for row in self.rows],
            "initial": dict(self._initial),
            "looked": self._measured_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [VectorRow(*row) for row in state_dict["rows"]]
        self._initial, self._measured_step = dict(state_dict["initial"]), state_dict["looked"]


def _vectors_of(manager: Personalization) -> dict[str, Tensor]:
    """Copies [N, d] of the vectors in place of tokens, by word, or by number if the personalization shares none."""
    shared = manager.export()
    if shared:
        return shared
    return {
        str(number): vectors.detach().flatten(0, -2).to("cpu", torch.float32, copy=True)
        for number, vectors in enumerate(manager.input_vectors())
        if vectors.ndim > 1
    }


class TrainingGuard(RunCallback):
    """Checks learning rate, gradient, vectors and loss every `every_n_train_steps`.

    If the first check finds a learning rate of 0, no gradient, or vectors that have not changed, the run ends with a
    UserError; at later checks this is a warning, once. If a loss or a vector is not finite, vectors and optimizer
    return to the state of the last check and the learning rate is halved; after more than `rollbacks` such returns
    the run ends with a UserError, and so it does at once if no loss was finite yet: then the model is broken, which
    `model_name` names. Between two checks nothing is read from the device. Models without a personalization are
    ignored.
    """

    runs_before_saving = True

    state_key = "Tripwires"  # the name in the states of earlier runs

    def __init__(self, every_n_train_steps: int = 10, rollbacks: int = 3) -> None:
        super().__init__()
        check_integer(every_n_train_steps, "training_guard: every_n_train_steps")
        self.every_n_train_steps = every_n_train_steps
        self.rollbacks = rollbacks
        self.rolled_back = 0
        self._active = False
        self._has_learned = False
        self._warned: list[str] = []
        self._checked_step = -1
        # Since the last check: the gradients' sum of absolute values, whether a loss was not finite, the largest rate.
        self._gradient = torch.zeros(())
        self._not_finite = torch.zeros((), dtype=torch.bool)
        self._any_finite = torch.zeros((), dtype=torch.bool)  # of all losses
        self._rate = 0.0
        self._last_good: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        vectors = _vectors(pl_module)
        self._active = bool(vectors)
        if not self._active:
            return
        self._gradient = self._gradient.to(pl_module.device)
        self._not_finite = self._not_finite.to(pl_module.device)
        self._any_finite = self._any_finite.to(pl_module.device)
        if not self._last_good:
            self._checked_step = trainer.global_step
            self._remember(trainer, vectors)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self._active:
            return
        for vector in _vectors(pl_module):
            if vector.grad is not None:
                self._gradient += vector.grad.abs().sum()
        self._rate = max(self._rate, *(group["lr"] for group in optimizer.param_groups))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._active:
            return
        loss = loss_of(outputs)
        if loss is not None:
            finite = loss.detach().isfinite().all()
            self._not_finite |= ~finite
            self._any_finite |= finite
        step = trainer.global_step
        if step % self.every_n_train_steps == 0 and step != self._checked_step:
            self._checked_step = step
            self._check(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._active:
            self._check_model()

    def _check_model(self) -> None:
        if bool(self._not_finite) and not bool(self._any_finite):
            raise UserError(
                f"no loss is finite: {self.model_name} gives NaN or infinity from the first step on; use another copy "
                "of it, or lightning.trainer.precision=32-true"
            )

    def _check(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self._check_model()
        vectors = _vectors(model)
        for vector in vectors:
            self._not_finite |= ~vector.detach().isfinite().all()
        if trainer.strategy.reduce_boolean_decision(bool(self._not_finite), all=False):
            # A denoiser that is trained too is not copied, so it cannot be restored.
            self._roll_back(
                trainer, vectors, 0 if cast(LatentDiffusion, model).unfreeze_model else self.rollbacks
            )
        else:
            before = self._last_good["vectors"]
            changed = any(
                not torch.equal(v.detach().cpu(), old) for v, old in zip(vectors, before, strict=True)
            )
            if problem := self._problem(changed):
                if not self._has_learned:
                    raise UserError(f"nothing is learned until step {trainer.global_step}: {problem}")
                if problem not in self._warned:
                    self._warned.append(problem)
                    logger.warning("step %d: nothing more is learned: %s", trainer.global_step, problem)
            self._has_learned |= changed
            self._remember(trainer, vectors)
        self._gradient.zero_()
        self._not_finite.zero_()
        self._rate = 0.0

    def _problem(self, changed: bool) -> str | None:
        if self._rate == 0:
            return "the learning rate is 0; see model.base_learning_rate and scheduler_config"
        if float(self._gradient) == 0:
            return (
                "no gradient reaches the vectors; check the placeholder in the captions and the loss weights"
            )
        if not changed:
            return (
                f"the vectors do not change at a learning rate of {self._rate:.1e}; see model.base_learning_rate and "
                "optimizer_config"
            )
        return None

    def _roll_back(self, trainer: pl.Trainer, vectors: Sequence[Tensor], limit: int) -> None:
        self.rolled_back += 1
        step, good = trainer.global_step, self._last_good["step"]
        self._restore(trainer, vectors)
        if self.rolled_back > limit:
            raise UserError(
                f"the loss is not finite at step {step} (rollbacks: {self.rolled_back - 1}); the vectors are those of "
                f"step {good}. Try lightning.trainer.precision=32-true, or a lower model.base_learning_rate"
            )
        for config in trainer.lr_scheduler_configs:
            if hasattr(config.scheduler, "base_lrs"):
                config.scheduler.base_lrs = [rate / 2 for rate in config.scheduler.base_lrs]
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] /= 2
                if "initial_lr" in group:
                    group["initial_lr"] /= 2
        logger.warning(
            "the loss is not finite at step %d: training continues from the vectors of step %d with half the learning "
            "rate",
            step,
            good,
        )

    def _remember(self, trainer: pl.Trainer, vectors: Sequence[Tensor]) -> None:
        """Copy the vectors and the optimizers' state of each of them."""
        self._last_good = {
            "step": trainer.global_step,
            "vectors": [vector.detach().to("cpu", copy=True) for vector in vectors],
            "moments": [
                {key: _copy(value) for key, value in optimizer.state.get(vector, {}).items()}
                for optimizer in trainer.optimizers
                for vector in vectors
            ],
        }

    @torch.no_grad()
    def _restore(self, trainer: pl.Trainer, vectors: Sequence[Tensor]) -> None:
        moments = iter(self._last_good["moments"])
        for vector, good in zip(vectors, self._last_good["vectors"], strict=True):
            vector.copy_(good)
        for optimizer in trainer.optimizers:
            for vector in vectors:
                saved = next(moments)
                current = optimizer.state.get(vector, {})
                for key in list(current):
                    if key not in saved:
                        del current[key]
                    elif isinstance(current[key], Tensor):
                        current[key].copy_(saved[key])
                    else:
                        current[key] = saved[key]

    def state_dict(self) -> dict[str, Any]:
        return {
            "rolled_back": self.rolled_back,
            "learns": self._has_learned,
            "warned": list(self._warned),
            "looked": self._checked_step,
            "rate": self._rate,
            "gradient": _copy(self._gradient),
            "bad": _copy(self._not_finite),
            "finite": _copy(self._any_finite),
            "good": self._last_good,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rolled_back = state_dict["rolled_back"]
        self._has_learned = state_dict["learns"]
        self._warned = list(state_dict["warned"])
        self._checked_step = state_dict["looked"]
        self._rate = state_dict["rate"]
        self._gradient = state_dict["gradient"]
        self._not_finite = state_dict["bad"]
        self._any_finite = state_dict.get("finite", torch.ones((), dtype=torch.bool))
        self._last_good = state_dict["good"]


def _vectors(model: pl.LightningModule) -> list[nn.Parameter]:
    manager = personalization_of(model)
    return [] if manager is None else list(manager.embedding_parameters())


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
