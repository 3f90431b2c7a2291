"""The embeddings of a run as files, while it trains and when it ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ldm import embeddings
from ldm.modules.encoders.modules import BERTEmbedder
from ldm.prompts import PER_IMAGE_TOKENS
from ldm.util import UserError

logger = logging.getLogger(__name__)


class EmbeddingSaver(Callback):
    """Saves `embeddings.pt` and `embeddings_gs-<step>.pt` every `every_n_train_steps` and at the run's end.

    Beside them each word's vectors go into files of their own, `my-cat.safetensors` and
    `my-cat_gs-500.safetensors`, and those of further `formats` (see ldm.embeddings.FORMATS) into folders of that
    name. `describe` gives the metadata that files can hold, for a step. A model without an embedding manager is
    left alone.
    """

    def __init__(self, every_n_train_steps: int = 500, formats: Sequence[str] = ()) -> None:
        super().__init__()
        unknown = [name for name in formats if name not in embeddings.FORMATS]
        if unknown:
            known = ", ".join(embeddings.FORMATS)
            raise UserError(f"embedding_saver: no format '{unknown[0]}'; there are {known}")
        self.every_n_train_steps = every_n_train_steps
        self.formats = list(dict.fromkeys([embeddings.DEFAULT_FORMAT, *formats]))
        self.describe: Callable[[int], dict[str, Any]] = lambda step: {"steps": step}
        self._saved_step = 0

    def save_now(self, trainer: pl.Trainer) -> None:
        """Save unless this step is saved already."""
        manager = getattr(trainer.lightning_module, "embedding_manager", None)
        step = trainer.global_step
        if manager is None or step == self._saved_step or not trainer.is_global_zero:
            return
        if not all(vector.isfinite().all() for vector in manager.embedding_parameters()):
            logger.warning("the vectors of step %d are not finite and are not saved", step)
            return
        self.save_as(trainer, f"_gs-{step}", step)
        self.save_as(trainer, "", step)
        self._saved_step = step

    def save_as(self, trainer: pl.Trainer, suffix: str, step: int) -> None:
        """Save the present vectors, those of a step, in all formats with a suffix to the names."""
        model: Any = trainer.lightning_module
        folder = Path(trainer.default_root_dir) / "checkpoints"
        model.embedding_manager.save(folder / f"embeddings{suffix}.pt")
        if hasattr(model.embedding_manager, "export"):
            self._export(model, folder, suffix, step)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_train_steps > 0 and trainer.global_step % self.every_n_train_steps == 0:
            self.save_now(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save_now(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if trainer.global_step > 0:
            self.save_now(trainer)

    def _export(self, model: Any, folder: Path, suffix: str, step: int) -> None:
        metadata = embeddings.Metadata.from_values(self.describe(step))
        family = "bert" if isinstance(model.cond_stage_model, BERTEmbedder) else "clip"
        # A picture's own word is of no use outside this run.
        vectors = {w: v for w, v in model.embedding_manager.export().items() if w not in PER_IMAGE_TOKENS}
        for name in self.formats:
            paths = embeddings.paths_for(list(vectors), folder, name)
            for (word, rows), path in zip(vectors.items(), paths, strict=True):
                concept = embeddings.Concept(
                    word,
                    rows,
                    encoder=embeddings.encoder_kind(family, rows.shape[1]),
                    token=int(model.embedding_manager.string_to_token_dict[word]),
                )
                learned = embeddings.LearnedEmbeddings((concept,), metadata)
                embeddings.write(learned, path.with_stem(f"{path.stem}{suffix}"), name)
