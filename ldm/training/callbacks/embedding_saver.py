"""The embedding files of a run and their metadata."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from ldm import embeddings
from ldm.embeddings.method_files import read_method_file, write_method_file
from ldm.files import file_hash, images_fingerprint
from ldm.modules.personalization import Personalization, TextEncoder
from ldm.training.callbacks.base import RunCallback, datasets_of, personalization_of, shared_vectors
from ldm.util import UserError, check_integer
from ldm.words import NEGATIVE, file_stem

logger = logging.getLogger(__name__)


class Provenance:
    """Makes the values of `ldm.embeddings.Metadata` for a step of a run.

    The base model and the images are hashed once, on first use, because a large checkpoint takes seconds. A hash is
    None if its files cannot be read, so that this never makes saving fail.
    """

    def __init__(self, config: DictConfig, model: pl.LightningModule) -> None:
        self.config = config
        self.model = model

    def __call__(self, step: int) -> dict[str, Any]:
        params = OmegaConf.select(self.config, "model.params.personalization_config.params") or {}
        words = [str(word) for word in params.get("initializer_words") or [] if word]
        images = self._images
        return {
            "base_model": self._checkpoint and self._checkpoint.name,
            "base_model_hash": self._base_model_hash,
            "steps": step,
            "seed": self.config["seed"],
            "initializer": ", ".join(words) or None,
            "learning_rate": self._rate,
            "images": len(images) or None,
            "images_fingerprint": self._fingerprint,
            "resolution": OmegaConf.select(self.config, "data.params.train.params.size"),
            "tool": "textual_inversion",
        }

    @property
    def _rate(self) -> float | None:
        """The rate of the optimizer before its schedule, which after a resume or a rollback is not the YAML's."""
        groups = [group for optimizer in self.model.trainer.optimizers for group in optimizer.param_groups]
        if not groups:
            return getattr(self.model, "learning_rate", None)
        return float(groups[0].get("initial_lr", groups[0]["lr"]))

    @property
    def _checkpoint(self) -> Path | None:
        path = self.config.get("actual_resume") or OmegaConf.select(self.config, "model.params.ckpt_path")
        return Path(path) if path else None

    @cached_property
    def _base_model_hash(self) -> str | None:
        path = self._checkpoint
        return _hash_or_none(file_hash, path) if path is not None and path.is_file() else None

    @cached_property
    def _images(self) -> list[Path]:
        """The image files of the training set, if it has any."""
        return list(getattr(datasets_of(self.model.trainer).get("train"), "image_paths", ()))

    @cached_property
    def _fingerprint(self) -> str | None:
        return _hash_or_none(images_fingerprint, self._images) if self._images else None


def _hash_or_none(hash_function: Callable[[Any], str], source: Path | Iterable[Path]) -> str | None:
    try:
        return hash_function(source)
    except UserError as error:
        logger.warning("a hash is missing in the metadata of the embedding files: %s", error)
        return None


def _remove_early(folder: Path, keep: int) -> None:
    """Remove the files of all steps but the last `keep` ones, those of further formats too."""
    steps = {
        path: int(match[1])
        for path in [*folder.glob("*"), *folder.glob("*/*")]
        if (match := re.search(r"_gs-(\d+)$", path.stem)) and path.is_file()
    }
    kept = sorted(set(steps.values()))[-keep:]
    for path, step in steps.items():
        if step not in kept:
            path.unlink(missing_ok=True)


class EmbeddingSaver(RunCallback):
    """Saves the personalization every `every_n_train_steps`, at the end of the run, and on an exception.

    The personalization's own files are `embeddings.pt` and `embeddings_gs-<step>.pt`. The vectors that it exports
    are also saved per word, as `my-cat.safetensors` and `my-cat_gs-500.safetensors`, and in further `formats` (see
    ldm.embeddings.FORMATS), each in a folder of that name. A method whose words are more than vectors (see
    `Personalization.method`) is also saved as one such file, named after its first word. With `keep`, the files of so
    many steps are kept and those of earlier steps removed; the latest and the best vectors stay. `describe` makes the
    metadata for a step, and `stems` the file name of each word. Models without a personalization are ignored.
    """

    def __init__(
        self, every_n_train_steps: int = 500, formats: Sequence[str] = (), keep: int | None = None
    ) -> None:
        super().__init__()
        unknown = [name for name in formats if name not in embeddings.FORMATS]
        if unknown:
            known = ", ".join(embeddings.FORMATS)
            raise UserError(f"embedding_saver: format '{unknown[0]}' is unknown; use {known}")
        if keep is not None:
            check_integer(keep, "embedding_saver: keep")
        self.every_n_train_steps, self.keep = every_n_train_steps, keep
        self.formats = list(dict.fromkeys([embeddings.DEFAULT_FORMAT, *formats]))
        self.describe: Callable[[int], dict[str, Any]] = lambda step: {"steps": step}
        self.stems: Callable[[Sequence[str]], dict[str, str]] = lambda words: {
            word: file_stem(word) for word in words
        }
        self._saved_step = 0
        self._stems: dict[str, str] = {}

    def save_now(self, trainer: pl.Trainer) -> None:
        """Save, unless this step is already saved."""
        manager = personalization_of(trainer.lightning_module)
        step = trainer.global_step
        if manager is None or step == self._saved_step or not trainer.is_global_zero:
            return
        if not all(vector.isfinite().all() for vector in manager.embedding_parameters()):
            logger.warning("the vectors of step %d are not finite and are not saved", step)
            return
        self.save_as(trainer, f"_gs-{step}", step)
        self.save_as(trainer, "", step)
        self._saved_step = step
        if self.keep is not None:
            _remove_early(Path(trainer.default_root_dir) / "checkpoints", self.keep)

    def save_as(self, trainer: pl.Trainer, suffix: str, step: int) -> None:
        """Save the current vectors in all formats; `suffix` ends the file names, `step` is for the metadata."""
        manager = personalization_of(trainer.lightning_module)
        if manager is None:
            return
        folder = Path(trainer.default_root_dir) / "checkpoints"
        manager.save(folder / f"embeddings{suffix}.pt")
        metadata = embeddings.Metadata.from_values(self.describe(step))
        if manager.method:  # to share: the same under the word's name, whose suffix says what it is
            words = list(manager.string_to_token_dict)
            self._stems = self._stems or self.stems(words)
            path = folder / f"{self._stems[words[0]]}{suffix}.safetensors"
            manager.save(path)
            if (content := read_method_file(path)) is not None:
                write_method_file(replace(content, metadata=metadata), path)
        encoder = cast(TextEncoder, trainer.lightning_module.cond_stage_model)
        self._export(manager, encoder.family, folder, suffix, metadata)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step
        manager, further = personalization_of(pl_module), self.formats[1:]
        if further and manager is not None and manager.method and not shared_vectors(manager):
            logger.warning(
                "embedding_saver: the formats %s are left out: words of '%s' are more than vectors, and only their own "
                "file holds them",
                ", ".join(further),
                manager.method,
            )

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

    def _export(
        self, manager: Personalization, family: str, folder: Path, suffix: str, metadata: embeddings.Metadata
    ) -> None:
        exported = shared_vectors(manager)
        # Asked once: it reads the files that are there.
        stems = self._stems = self._stems or self.stems(list(exported))
        negatives = {word: word.removesuffix(NEGATIVE) for word in exported if word.endswith(NEGATIVE)}
        # Tools find the negative of a file by its name.
        stems |= {word: stems[of] + NEGATIVE for word, of in negatives.items() if of in exported}
        for name in self.formats:
            paths = embeddings.paths_for([stems[word] for word in exported], folder, name)
            for (word, rows), path in zip(exported.items(), paths, strict=True):
                token = int(manager.string_to_token_dict[word])
                began = manager.initializers.get(word)
                concepts = embeddings.concepts_of(word, rows, family, token=token, initializer=began)
                if negatives.get(word) in exported:
                    concepts = tuple(replace(concept, part="negative") for concept in concepts)
                learned = embeddings.LearnedEmbeddings(concepts, replace(metadata, initializer=began))
                embeddings.write(learned, path.with_stem(f"{path.stem}{suffix}"), name)
