"""Where learned vectors come from, for the files that can say it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from ldm.embeddings.fingerprint import file_hash, images_fingerprint
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
