"""Statistics of the vectors, and a guard against runs that learn nothing or whose loss is not finite."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ldm.util import UserError

logger = logging.getLogger(__name__)


class VectorStats(Callback):
    """Logs `vectors/norm_ratio` and `vectors/cosine_to_initial` every `every_n_train_steps`.

    The first is the vectors' mean norm over that of the vocabulary; vectors that grow to many times its size are no
    longer told apart by their direction, and prompts are no longer followed (DTI: Kim et al., ICLR 2026). The second
    is the mean cosine to what the vectors were at the run's beginning. Models without an embedding manager that can
    `export` are left alone.
    """

    before_saving = True

    state_key = "Health"  # the name in states of earlier runs

    def __init__(self, every_n_train_steps: int = 10) -> None:
        super().__init__()
        if not isinstance(every_n_train_steps, int) or every_n_train_steps < 1:
            raise UserError(
                f"health: every_n_train_steps is {every_n_train_steps!r}; it must be a whole number from 1 on"
            )
        self.every_n_train_steps = every_n_train_steps
        # One row for each look: step, norm ratio, cosine, rate.
        self.rows: list[tuple[int, float, float, float]] = []
        self._initial: dict[str, Tensor] = {}
        self._usual: float | None = None
        self._looked = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        manager = getattr(pl_module, "embedding_manager", None)
        table = getattr(getattr(pl_module, "cond_stage_model", None), "token_embedding", None)
        if table is None or not hasattr(manager, "export"):
            return
        self._usual = float(table.weight.detach().float().norm(dim=1).mean())
        self._initial = self._initial or manager.export()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._usual is None or step % self.every_n_train_steps or step == self._looked or step == 0:
            return
        self._looked = step
        present = pl_module.embedding_manager.export()
        ratio = torch.cat([v.norm(dim=1) for v in present.values()]).mean().item() / self._usual
        cosines = [
            torch.cosine_similarity(vectors[: len(first)], first[: len(vectors)], dim=1)
            for word, vectors in present.items()
            if (first := self._initial.get(word)) is not None
        ]
        cosine = torch.cat(cosines).mean().item() if cosines else float("nan")
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.rows.append((step, ratio, cosine, rate))
        for log in trainer.loggers:
            log.log_metrics({"vectors/norm_ratio": ratio, "vectors/cosine_to_initial": cosine}, step=step)

    def figures(self, trainer: pl.Trainer) -> list[str]:
        """The last look in words."""
        if not self.rows:
            return []
        _, ratio, cosine, _ = self.rows[-1]
        return [f"norm x{ratio:.2f}", f"cos {cosine:.2f}"]

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": [list(row) for row in self.rows],
            "initial": dict(self._initial),
            "looked": self._looked,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [tuple(row) for row in state_dict["rows"]]
        self._initial, self._looked = dict(state_dict["initial"]), state_dict["looked"]


class TrainingGuard(Callback):
    """Looks at rate, gradient, vectors and loss every `every_n_train_steps`.

    A first look that finds a rate of 0, no gradient, or vectors that have not moved is a UserError; later it is one
    warning. When a loss or a vector is not finite, vectors and optimiser go back to the last look, and the rate is
    halved; beyond `rollbacks` times it is a UserError. Between the looks everything stays on the device. Models
    without an embedding manager are left alone.
    """

    # A state that is saved at a step is one that was looked at.
    before_saving = True

    state_key = "Tripwires"  # the name in states of earlier runs

    def __init__(self, every_n_train_steps: int = 10, rollbacks: int = 3) -> None:
        super().__init__()
        if not isinstance(every_n_train_steps, int) or every_n_train_steps < 1:
            raise UserError(
                f"tripwires: every_n_train_steps is {every_n_train_steps!r}; it must be a whole number from 1 on"
            )
        self.every_n_train_steps = every_n_train_steps
        self.rollbacks = rollbacks
        self.rolled_back = 0
        self._learns = False
        self._warned: list[str] = []
        self._looked = -1
        self._gradient: Tensor | None = None
        self._bad: Tensor | None = None
        self._rate = 0.0
        self._good: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        vectors = _vectors(pl_module)
        if not vectors:
            return
        device = pl_module.device
        self._gradient = (
            torch.zeros((), device=device) if self._gradient is None else self._gradient.to(device)
        )
        self._bad = (
            torch.zeros((), dtype=torch.bool, device=device) if self._bad is None else self._bad.to(device)
        )
        if not self._good:
            self._looked = trainer.global_step
            self._keep(trainer, vectors)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._gradient is None:
            return
        for vector in _vectors(pl_module):
            if vector.grad is not None:
                self._gradient += vector.grad.abs().sum()
        self._rate = max(self._rate, *(group["lr"] for group in optimizer.param_groups))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bad is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._bad |= ~loss.detach().isfinite().all()
        step = trainer.global_step
        if step % self.every_n_train_steps == 0 and step != self._looked:
            self._looked = step
            self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, model: Any) -> None:
        vectors = _vectors(model)
        for vector in vectors:
            self._bad |= ~vector.detach().isfinite().all()
        if trainer.strategy.reduce_boolean_decision(bool(self._bad), all=False):
            # A denoiser that is trained along is not kept, and may be spoilt too.
            self._roll_back(trainer, vectors, 0 if model.unfreeze_model else self.rollbacks)
        else:
            before = self._good["vectors"]
            moved = any(
                not torch.equal(v.detach().cpu(), old) for v, old in zip(vectors, before, strict=True)
            )
            if problem := self._problem(moved):
                if not self._learns:
                    raise UserError(f"nothing is learned until step {trainer.global_step}: {problem}")
                if problem not in self._warned:
                    self._warned.append(problem)
                    logger.warning("step %d: nothing more is learned: %s", trainer.global_step, problem)
            self._learns |= moved
            self._keep(trainer, vectors)
        self._gradient.zero_()
        self._bad.zero_()
        self._rate = 0.0

    def _problem(self, moved: bool) -> str | None:
        if self._rate == 0:
            return "the learning rate is 0; see model.base_learning_rate and scheduler_config"
        if float(self._gradient) == 0:
            return "no gradient reaches the vectors; do the captions hold the placeholder, and is the loss weighted 0?"
        if not moved:
            return (
                f"the vectors do not move at a learning rate of {self._rate:.1e}; see model.base_learning_rate and "
                "optimizer_config"
            )
        return None

    def _roll_back(self, trainer: pl.Trainer, vectors: list[Tensor], limit: int) -> None:
        self.rolled_back += 1
        step, good = trainer.global_step, self._good["step"]
        self._restore(trainer, vectors)
        if self.rolled_back > limit:
            raise UserError(
                f"the loss is not finite at step {step}, for the {self.rolled_back}. time; the vectors are those of "
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
            "the loss is not finite at step %d: going on from the vectors of step %d with half the learning rate",
            step,
            good,
        )

    def _keep(self, trainer: pl.Trainer, vectors: list[Tensor]) -> None:
        """Remember vectors, and of the optimisers what they keep for each of them."""
        self._good = {
            "step": trainer.global_step,
            "vectors": [vector.detach().to("cpu", copy=True) for vector in vectors],
            "moments": [
                {key: _copy(value) for key, value in optimizer.state.get(vector, {}).items()}
                for optimizer in trainer.optimizers
                for vector in vectors
            ],
        }

    @torch.no_grad()
    def _restore(self, trainer: pl.Trainer, vectors: list[Tensor]) -> None:
        moments = iter(self._good["moments"])
        for vector, good in zip(vectors, self._good["vectors"], strict=True):
            vector.copy_(good)
        for optimizer in trainer.optimizers:
            for vector in vectors:
                kept = next(moments)
                held = optimizer.state.get(vector, {})
                for key in list(held):
                    if key not in kept:
                        del held[key]
                    elif isinstance(held[key], Tensor):
                        held[key].copy_(kept[key])
                    else:
                        held[key] = kept[key]

    def state_dict(self) -> dict[str, Any]:
        names = ("rolled_back", "_learns", "_warned", "_looked", "_rate", "_gradient", "_bad", "_good")
        return {name.lstrip("_"): _copy(getattr(self, name)) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rolled_back = state_dict["rolled_back"]
        for name in ("learns", "warned", "looked", "rate", "gradient", "bad", "good"):
            setattr(self, f"_{name}", state_dict[name])


def _vectors(model: Any) -> list[Tensor]:
    manager = getattr(model, "embedding_manager", None)
    return [] if manager is None else list(manager.embedding_parameters())


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
