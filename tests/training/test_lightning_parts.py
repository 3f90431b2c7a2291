"""Trainer options, callbacks and loggers out of the YAML's lightning node."""

import logging
import sys

import pytest
from omegaconf import OmegaConf

from ldm.training import trainer as parts
from ldm.training.callbacks.checkpoint import LastCheckpoint
from ldm.training.callbacks.image_logger import ImageLogger
from ldm.training.callbacks.interruption import Requests
from ldm.training.run_folder import RunFolder
from ldm.training.trainer import Devices
from ldm.util import ConfigError, UsageError

CPU = Devices("cpu", 1)


def kwargs(personalization=True, **trainer):
    return parts.trainer_kwargs({"trainer": trainer}, CPU, personalization=personalization)


def callbacks(tmp_path, lightning, model=None):
    run = RunFolder(tmp_path, "now")
    node = parts.complete_lightning(lightning)
    return parts.make_callbacks(node, OmegaConf.create({"lightning": lightning}), run, model, Requests(), "")


def test_old_names_are_translated_or_dropped(caplog):
    caplog.set_level(logging.INFO, logger="ldm")
    options = kwargs(
        gpus="0,",
        accelerator="ddp",
        weights_summary="top",
        replace_sampler_ddp=True,
        benchmark=True,
        max_steps=9,
    )
    assert options["strategy"] == "ddp"
    assert options["accelerator"] == "cpu"
    assert options["use_distributed_sampler"] is True
    assert options["benchmark"] is True
    assert not {"gpus", "weights_summary"} & options.keys()
    assert caplog.messages == ["lightning.trainer.weights_summary belongs to Lightning 1.x and is ignored"]


def test_a_personalization_without_an_end_gets_the_usual_one():
    assert kwargs()["max_steps"] == 6100
    assert "max_steps" not in kwargs(max_epochs=2)
    scratch = kwargs(personalization=False)
    assert scratch["max_epochs"] == -1 and "max_steps" not in scratch


def test_several_gpus_use_ddp():
    options = parts.trainer_kwargs({}, Devices("cuda", [0, 1]), personalization=True)
    assert (options["strategy"], options["accelerator"], options["devices"]) == ("ddp", "gpu", [0, 1])


def test_several_machines_use_ddp():
    options = parts.trainer_kwargs({"trainer": {"num_nodes": 2}}, Devices("cuda", [0]), personalization=True)
    assert (options["strategy"], options["num_nodes"], options["devices"]) == ("ddp", 2, [0])
    assert kwargs(devices=2)["strategy"] == "ddp"
    assert kwargs()["strategy"] == "auto"


@pytest.mark.parametrize("steps", [0, -5, 2.5, "many"])
def test_steps_that_make_no_sense(steps):
    with pytest.raises(UsageError, match="max_steps is"):
        parts.check_lengths({"trainer": {"max_steps": steps}})


def test_null_stays_where_it_means_something():
    assert kwargs(check_val_every_n_epoch=None, limit_val_batches=None)["check_val_every_n_epoch"] is None


def test_callbacks_are_changed_by_name_and_added_by_target(tmp_path):
    lightning = {
        "modelcheckpoint": {"params": {"every_n_train_steps": 50}},
        "callbacks": {
            "image_logger": {"params": {"max_images": 1}},
            "mine": {"target": "pytorch_lightning.callbacks.Timer"},
            "progress": None,
        },
    }
    built = {type(callback).__name__: callback for callback in callbacks(tmp_path, lightning)}
    assert built["ImageLogger"].max_images == 1
    assert built["ImageLogger"].batch_frequency == 750
    assert built["LastCheckpoint"].every_n_train_steps == 50
    assert built["EmbeddingSaver"].every_n_train_steps == 50
    assert "Timer" in built
    assert "RunProgress" not in built
    assert "ModelCheckpoint" not in built


def test_signals_are_met_before_previews_and_the_state_is_saved_last(tmp_path):
    built = callbacks(tmp_path, {})
    kinds = [type(callback).__name__ for callback in built]
    assert kinds.index("Interruption") < kinds.index("ImageLogger")
    assert isinstance(built[-1], LastCheckpoint)
    logger = next(callback for callback in built if isinstance(callback, ImageLogger))
    assert logger.requests is built[kinds.index("Interruption")].requests


def test_a_monitored_checkpoint_is_lightnings_own(tmp_path):
    lightning = {"modelcheckpoint": {"params": {"monitor": "val/loss", "save_top_k": 2}}}
    assert "ModelCheckpoint" in [type(callback).__name__ for callback in callbacks(tmp_path, lightning)]


def test_loggers(tmp_path):
    def names(node):
        return [
            type(log).__name__
            for log in parts.make_loggers(parts.complete_lightning(node), RunFolder(tmp_path, "n"))
        ]

    assert names({}) == ["CSVLogger", "TensorBoardLogger"]
    assert names({"logger": {"target": "pytorch_lightning.loggers.TestTubeLogger"}}) == names({})
    assert names({"logger": {"target": "pytorch_lightning.loggers.CSVLogger"}}) == ["CSVLogger", "CSVLogger"]


def test_a_logger_whose_package_is_absent_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("pytorch_lightning.loggers.wandb._WANDB_AVAILABLE", False)
    node = parts.complete_lightning({"logger": {"target": "pytorch_lightning.loggers.WandbLogger"}})
    with pytest.raises(ConfigError, match="WandbLogger needs a package that is not installed"):
        parts.make_loggers(node, RunFolder(tmp_path, "n"))


def test_a_personalization_has_callbacks_of_its_own_and_null_removes_them():
    assert "latent_cache" not in parts.complete_lightning({})["callbacks"]
    assert parts.complete_lightning({}, personalization=True)["callbacks"]["latent_cache"]["target"]
    assert (
        parts.complete_lightning({"callbacks": {"latent_cache": None}}, personalization=True)["callbacks"][
            "latent_cache"
        ]
        is None
    )
    named = parts.complete_lightning({"callbacks": {"latent_cache": {"params": {"batch_size": 2}}}})[
        "callbacks"
    ]
    assert named["latent_cache"]["target"].endswith("LatentCache")


def test_what_belongs_to_a_steps_state_is_done_before_a_signal_can_save_it(tmp_path):
    lightning = {"callbacks": {"deterministic_loss": {}}}
    kinds = [type(callback).__name__ for callback in callbacks(tmp_path, lightning)]
    assert kinds.index("DeterministicLoss") < kinds.index("Interruption")
