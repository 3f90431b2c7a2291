"""The embeddings of a run as files, with the metadata that they carry."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback

from ldm import embeddings
from ldm.files import file_hash, images_fingerprint
from ldm.modules.encoders.modules import BERTEmbedder
from ldm.prompts import PER_IMAGE_TOKENS
from ldm.util import UserError

logger = logging.getLogger(__name__)


class Provenance:
    """The values of `ldm.embeddings.Metadata` for a step of a run.

    The base model and the pictures are hashed once, when first asked for: a large checkpoint takes seconds. What
    cannot be read by then is left unsaid, for no saving may fail by it.
    """

    def __init__(self, config: DictConfig, model: pl.LightningModule) -> None:
        self.config = config
        self.model = model

    def __call__(self, step: int) -> dict[str, Any]:
        params = OmegaConf.select(self.config, "model.params.personalization_config.params") or {}
        words = [str(word) for word in params.get("initializer_words") or [] if word]
        pictures = self._pictures
        return {
            "base_model": self._checkpoint and self._checkpoint.name,
            "base_model_hash": self._base_model_hash,
            "steps": step,
            "seed": self.config["seed"],
            "initializer": ", ".join(words) or None,
            "learning_rate": getattr(self.model, "learning_rate", None),
            "images": len(pictures) or None,
            "images_fingerprint": self._fingerprint,
            "resolution": OmegaConf.select(self.config, "data.params.train.params.size"),
            "tool": "textual_inversion",
        }

    @property
    def _checkpoint(self) -> Path | None:
        named = self.config.get("actual_resume") or OmegaConf.select(self.config, "model.params.ckpt_path")
        return Path(named) if named else None

    @cached_property
    def _base_model_hash(self) -> str | None:
        return None if self._checkpoint is None else _unless_unreadable(file_hash, self._checkpoint)

    @cached_property
    def _pictures(self) -> list[Path]:
        """The files of the training set, if it is one of files."""
        datasets = getattr(getattr(self.model.trainer, "datamodule", None), "datasets", {})
        return list(getattr(datasets.get("train"), "image_paths", ()))

    @cached_property
    def _fingerprint(self) -> str | None:
        return _unless_unreadable(images_fingerprint, self._pictures) if self._pictures else None


def _unless_unreadable(hashed: Callable[[Any], str], source: Path | Iterable[Path]) -> str | None:
    try:
        return hashed(source)
    except UserError as error:
        logger.warning("the embedding files will not say what they were learned with: %s", error)
        return None


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
