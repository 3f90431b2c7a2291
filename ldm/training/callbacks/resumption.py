"""Resuming a run with other settings: the changes are written into the state that Lightning restores."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback
from torch.optim.lr_scheduler import LambdaLR

from ldm.front_ends import setting, spoken
from ldm.training.learning_rate import step_schedule
from ldm.training.resuming import differences, epochs_done, no_epochs_left, plain

logger = logging.getLogger(__name__)

_KEY = "settings"


def settings_of_run(config: DictConfig, trainer: pl.Trainer, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run as plain values: its configuration and the figures in use."""
    return {
        "config": OmegaConf.to_container(config),
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
        "precision": str(trainer.precision),
        "processes": trainer.world_size,
        **figures,
    }


class Resumption(Callback):
    """Saves the settings with the state of a run, and updates a state that is restored with other settings.

    Lightning restores learning rates, schedules, optimizer settings and the position in the data as they were saved.
    What was changed since then is written into the state before Lightning restores it; everything else stays bit by
    bit. `settings` are those of this start, `saved` the configuration of the run before it, for states of earlier
    versions, which hold no settings.
    """

    def __init__(self, settings: Mapping[str, Any], saved: DictConfig | None = None) -> None:
        super().__init__()
        self.settings = dict(settings)
        self.saved = saved
        self._optimizers: list[dict[str, Any]] = []
        self._checkpoint: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_KEY] = {
            **self.settings,
            "optimizers": self._optimizers,
            "schedule": _schedule_of(pl_module),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._checkpoint = checkpoint
        seed = self._settings_before(checkpoint)["config"].get("seed")
        if seed is not None and seed != self.settings["config"].get("seed"):
            # Another seed means other noise; without these states it is drawn from the new seed.
            checkpoint.pop("random_states", None)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning has made the optimizers and restores their states after this hook.
        if not trainer.optimizers:
            trainer.strategy.setup_optimizers(trainer)
        self._optimizers = [_hyperparameters(optimizer) for optimizer in trainer.optimizers]
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            return
        was = self._settings_before(checkpoint)
        notes = differences(was, self.settings)
        notes += self._update_optimizers(trainer, pl_module, checkpoint, was)
        self._update_position(trainer, checkpoint, was)
        if trainer.is_global_zero:
            self._log(trainer, checkpoint, notes)

    def _log(self, trainer: pl.Trainer, checkpoint: Mapping[str, Any], notes: list[str]) -> None:
        step = checkpoint["global_step"]
        limit = f" of {trainer.max_steps}" if trainer.max_steps > 0 else ""
        rates = [group["lr"] for state in checkpoint["optimizer_states"] for group in state["param_groups"]]
        rate = f" with learning rate {rates[0]:.2e}" if rates else ""
        logger.info("resuming from %s at step %d%s%s", trainer.ckpt_path, step, limit, rate)
        if notes:
            logger.info("changed since then: %s", ", ".join(notes))
        else:
            logger.info("all settings are those of the saved state")
        if 0 <= trainer.max_steps <= step:
            logger.warning(
                "nothing is left to train: the run is at step %d and max_steps is %d; go on with %s",
                step,
                trainer.max_steps,
                spoken(setting("steps", step + max(1, trainer.max_steps))),
            )
        elif trainer.max_epochs is not None and 0 <= trainer.max_epochs <= (
            epochs := epochs_done(checkpoint)
        ):
            logger.warning("%s", spoken(no_epochs_left(epochs, trainer.max_epochs)))

    def _settings_before(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that are saved with a state; of an older state, those that follow from it."""
        if _KEY in checkpoint:
            return checkpoint[_KEY]
        config = self.saved if self.saved is not None else OmegaConf.create({})
        lightning = OmegaConf.select(config, "lightning.trainer") or {}
        found: dict[str, Any] = {
            "config": OmegaConf.to_container(config),
            "batch": OmegaConf.select(config, "data.params.batch_size"),
            "accumulation": lightning.get("accumulate_grad_batches") or 1,
            "max_steps": lightning.get("max_steps"),
            "optimizers": _optimizers_of(checkpoint),
        }
        if states := checkpoint.get("random_states"):
            found["processes"] = len(states)
        if found["optimizers"] and found["optimizers"][0]["groups"]:
            found["learning rate"] = found["optimizers"][0]["groups"][0].get("lr")
        scheduler = plain(OmegaConf.select(config, "model.params.scheduler_config"))
        if scheduler is not None:
            params = scheduler.get("params") or {}
            if "max_decay_steps" in params and params["max_decay_steps"] is None:
                params["max_decay_steps"] = found["max_steps"]
        base = OmegaConf.select(config, "model.base_learning_rate")
        found["schedule"] = step_schedule(base) if isinstance(base, str) else scheduler
        return {key: value for key, value in found.items() if value is not None or key == "schedule"}

    # -- learning rates and optimizer settings ---------------------------------------------------------------

    def _update_optimizers(
        self,
        trainer: pl.Trainer,
        model: pl.LightningModule,
        checkpoint: dict[str, Any],
        was: Mapping[str, Any],
    ) -> list[str]:
        """Write changed rates and settings of the optimizers into the state; returns what else is to be said."""
        states, notes = checkpoint["optimizer_states"], []
        before = was.get("optimizers") or []
        if not _same_optimizers(before, self._optimizers, states):
            checkpoint["optimizer_states"] = [optimizer.state_dict() for optimizer in trainer.optimizers]
            notes.append(f"the optimizer, {self._optimizers[0]['class']}, begins without its moments")
            before, states = [], checkpoint["optimizer_states"]
        # A schedule given as "0.005:100, 1e-3" is a part of the rate.
        rescheduled = not before or (was.get("schedule") != _schedule_of(model))
        for index, (state, now) in enumerate(zip(states, self._optimizers, strict=True)):
            for group, fresh, old in zip(
                state["param_groups"],
                now["groups"],
                before[index]["groups"] if before else [{}] * len(now["groups"]),
                strict=True,
            ):
                group.update({k: v for k, v in fresh.items() if k != "lr" and old.get(k, v) != v})
                rescheduled |= old.get("lr") != fresh["lr"]
        if rescheduled:
            self._write_rates(trainer, checkpoint)
        elif times := _rollbacks(checkpoint):
            how_often = "once" if times == 1 else f"{times} times"
            notes.append(f"learning rate halved {how_often}, after losses that were not finite")
        return notes

    def _write_rates(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Write the configured rates into the states of the optimizers, and of their schedules at this step."""
        for state, now in zip(checkpoint["optimizer_states"], self._optimizers, strict=True):
            for group, fresh in zip(state["param_groups"], now["groups"], strict=True):
                group.pop("initial_lr", None)
                group["lr"] = fresh["lr"]
        step = checkpoint["global_step"] // max(1, len(trainer.optimizers))
        saved, schedulers = checkpoint["lr_schedulers"], []
        for number, config in enumerate(trainer.lr_scheduler_configs):
            scheduler = config.scheduler
            if not isinstance(scheduler, LambdaLR):
                schedulers += saved[number : number + 1]
                continue
            index = trainer.optimizers.index(scheduler.optimizer)
            groups = checkpoint["optimizer_states"][index]["param_groups"]
            for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
                group["initial_lr"] = group["lr"]
                group["lr"] = group["initial_lr"] * factor(step)
            fresh = scheduler.state_dict()
            fresh |= {"last_epoch": step, "_step_count": step + 1}
            fresh |= {"base_lrs": [g["initial_lr"] for g in groups], "_last_lr": [g["lr"] for g in groups]}
            schedulers.append(fresh)
        checkpoint["lr_schedulers"] = schedulers

    # -- position in the data --------------------------------------------------------------------------------

    def _update_position(
        self, trainer: pl.Trainer, checkpoint: dict[str, Any], was: Mapping[str, Any]
    ) -> None:
        """Translate the position in the epoch into batches of the present size.

        The run goes on with the batch that holds the first sample it has not seen; some samples may come twice.
        """
        if "batches" not in self.settings:
            return
        now = _Batches.of(self.settings)
        # States of earlier versions do not have the number of batches.
        before = _Batches.of(self.settings | {key: value for key, value in was.items() if key != "batches"})
        samples = now.batches * now.at_once
        before = replace(before, batches=was.get("batches") or -(-samples // before.at_once))
        if before == now:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done, total = progress["current"]["processed"], progress["total"]["processed"]
        epochs = (total - done) // before.batches
        batch = now.batches
        if done < before.batches:
            batch = min(done * before.at_once // now.at_once, now.batches - 1)
            batch -= batch % now.accumulation
        moved = {"current": batch - done, "total": epochs * now.batches + batch - total}
        for name, by in moved.items():
            progress[name] = {key: value + by for key, value in progress[name].items()}
        data: Any = getattr(trainer, "datamodule", None)
        if data is not None:
            data.load_state_dict({"batches_done": progress["total"]["processed"]})


@dataclass(frozen=True)
class _Batches:
    """The batches of an epoch: how many there are, samples in one of all processes, and how many make a step."""

    batches: int
    at_once: int
    accumulation: int

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> _Batches:
        return cls(
            settings["batches"], settings["batch"] * settings["processes"], settings.get("accumulation") or 1
        )


def _schedule_of(model: pl.LightningModule) -> Any:
    return plain(getattr(model, "scheduler_config", None))


def _hyperparameters(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The class of an optimizer and the settings of its groups; "lr" is the rate before a schedule."""
    return {"class": type(optimizer).__name__, "groups": [_settings_of(g) for g in optimizer.param_groups]}


def _optimizers_of(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same of the optimizers in a state, whose classes are not known."""
    # Each time it took the vectors back, the guard halved the rate.
    factor = 2 ** _rollbacks(checkpoint)
    found: list[dict[str, Any]] = []
    for state in checkpoint["optimizer_states"]:
        groups = [_settings_of(group) for group in state["param_groups"]]
        found.append({"groups": [{**group, "lr": group["lr"] * factor} for group in groups]})
    return found


def _rollbacks(checkpoint: Mapping[str, Any]) -> int:
    guards = [state for key, state in checkpoint.get("callbacks", {}).items() if key.startswith("Tripwires")]
    return sum(state.get("rolled_back", 0) for state in guards)


def _settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    kinds = (bool, int, float, str, tuple, type(None))
    known = {key: value for key, value in group.items() if key != "params" and isinstance(value, kinds)}
    return {**known, "lr": float(known.pop("initial_lr", group["lr"]))}


def _same_optimizers(was: list[dict[str, Any]], now: list[dict[str, Any]], states: list[Any]) -> bool:
    """Whether saved states fit the optimizers: as many, of the same classes, with as many groups."""
    if not len(was) == len(now) == len(states):
        return False
    for old, new in zip(was, now, strict=True):
        if old.get("class", new["class"]) != new["class"] or len(old["groups"]) != len(new["groups"]):
            return False
        if "class" not in old and any(
            a.keys() != b.keys() for a, b in zip(old["groups"], new["groups"], strict=True)
        ):
            return False
    return True
