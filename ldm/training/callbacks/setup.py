"""The run folder with its saved YAMLs, and the seed of validation."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback

from ldm import files, random_state


class SetupCallback(Callback):
    """Creates `logdir`, `ckptdir` and `cfgdir`, and saves `config` and `lightning_config` in `cfgdir`.

    The files are `<now>-project.yaml` and `<now>-lightning.yaml`; `-r` reads them. `resume` is not used; it is part
    of the original's signature.
    """

    def __init__(
        self,
        resume: str,
        now: str,
        logdir: str | Path,
        ckptdir: str | Path,
        cfgdir: str | Path,
        config: DictConfig,
        lightning_config: DictConfig,
    ) -> None:
        super().__init__()
        self.resume = resume
        self.now = now
        self.logdir = Path(logdir)
        self.ckptdir = Path(ckptdir)
        self.cfgdir = Path(cfgdir)
        self.config = config
        self.lightning_config = lightning_config

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not trainer.is_global_zero or stage != "fit":
            return
        # Writing these files first makes a run fail before its first step if the folder is not writable.
        lightning = OmegaConf.create({"lightning": self.lightning_config})
        files.write_text(self.cfgdir / f"{self.now}-project.yaml", OmegaConf.to_yaml(self.config))
        files.write_text(self.cfgdir / f"{self.now}-lightning.yaml", OmegaConf.to_yaml(lightning))
        self.ckptdir.mkdir(parents=True, exist_ok=True)


VALIDATION_SEED = 4711


class ValidationSeed(Callback):
    """Runs every validation with the same seed, so that its losses are comparable, and restores the generators."""

    def __init__(self) -> None:
        super().__init__()
        self._isolation = ExitStack()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._isolation.enter_context(random_state.isolated(VALIDATION_SEED, trainer.global_rank))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._isolation.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._isolation.close()
