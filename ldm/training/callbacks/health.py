"""How far the vectors have come, and whether they are still of a size that the text encoder knows."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ldm.util import UserError


class Health(Callback):
    """Logs `vectors/norm_ratio` and `vectors/cosine_to_initial` every `every_n_train_steps`.

    The first is the vectors' mean norm over that of the vocabulary; vectors that grow to many times its size are no
    longer told apart by their direction, and prompts are no longer followed (DTI: Kim et al., ICLR 2026). The second
    is the mean cosine to what the vectors were at the run's beginning. Models without an embedding manager that can
    `export` are left alone.
    """

    before_saving = True

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
