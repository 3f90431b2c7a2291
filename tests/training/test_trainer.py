"""Devices, Trainer options, callbacks and loggers from the YAML's lightning node."""

from __future__ import annotations

import logging
import platform
import sys

import pytest
import torch
from omegaconf import OmegaConf

from ldm.training import trainer as trainer_module
from ldm.training.callbacks import complete_lightning
from ldm.training.callbacks.checkpoint import LastCheckpoint
from ldm.training.callbacks.image_logger import ImageLogger
from ldm.training.callbacks.interruption import Requests
from ldm.training.command_line import OLD_TRAINER_KEYS, TRAINER_OPTIONS
from ldm.training.run_folder import RunFolder
from ldm.training.trainer import Devices, choose_devices, parse_gpus, processes
from ldm.util import ConfigError, UsageError, UserError
from tests.training.runs import start


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("0,", [0]),
        ("0", 0),
        ("2", 2),
        ("-1", -1),
        ("0,1", [0, 1]),
        (0, 0),
        ([1], [1]),
        (None, None),
        ("1,", [1]),
        ("[0]", [0]),
        ("[0, 1]", [0, 1]),
    ],
)
def test_parse_gpus(text, meaning):
    assert parse_gpus(text) == meaning


@pytest.mark.parametrize("text", ["all", "0;1", "0,x", {"a": 1}])
def test_invalid_gpus(text):
    with pytest.raises(UsageError, match="not understood"):
        parse_gpus(text)


@pytest.mark.parametrize(
    ("text", "accelerator", "count"),
    [
        ("0,", "cuda", 1),
        ("0", "cpu", 1),
        ("2", "cuda", 2),
        ("-1", "cuda", 2),
        ("0,1", "cuda", 2),
        (None, "cuda", 1),
    ],
)
def test_choose_devices_with_cuda(two_gpus, text, accelerator, count):
    chosen = choose_devices(text)
    assert (chosen.accelerator, chosen.count) == (accelerator, count)


@pytest.mark.done_or_said
@pytest.mark.parametrize("text", ["3", "2,", "0,5"])
def test_missing_gpu(two_gpus, text):
    with pytest.raises(UserError, match="this machine has 2"):
        choose_devices(text)


@pytest.mark.done_or_said
@pytest.mark.parametrize(("text", "lines"), [("0,", 1), ("-1", 1), ("0", 0), (None, 0)])
def test_choose_devices_without_cuda(no_gpu, caplog, text, lines):
    caplog.set_level(logging.INFO, logger="ldm")
    assert choose_devices(text).accelerator == "cpu"
    assert len(caplog.messages) == lines


def test_accelerator_cpu(two_gpus, caplog):
    caplog.set_level(logging.INFO, logger="ldm")
    for gpus in (None, "0,", "0,1", "-1"):
        assert choose_devices(gpus, "cpu") == Devices("cpu", 1)
    assert choose_devices("0,", "gpu") == choose_devices("0,", "ddp") == Devices("cuda", [0])
    assert not caplog.messages


@pytest.mark.done_or_said
@pytest.mark.parametrize(
    ("gpus", "accelerator", "chosen"),
    [
        (None, None, "mps"),
        ("0,", None, "mps"),
        ("-1", "auto", "mps"),
        (None, "gpu", "mps"),
        (None, "MPS", "mps"),
        ("0", None, "cpu"),
        (None, "cpu", "cpu"),
    ],
)
def test_apple_gpu(apple_gpu, gpus, accelerator, chosen):
    assert choose_devices(gpus, accelerator) == Devices(chosen, 1)
    options = trainer_module.trainer_kwargs({}, choose_devices(gpus, accelerator), personalization=True)
    assert (options["accelerator"], options["devices"], options["strategy"]) == (chosen, 1, "auto")


@pytest.mark.done_or_said
def test_several_apple_gpus(apple_gpu):
    with pytest.raises(UserError, match="this machine has one Apple GPU"):
        choose_devices("0,1")
    with pytest.raises(UserError, match="accelerator is cuda, but torch finds no GPU"):
        choose_devices(None, "cuda")


@pytest.mark.done_or_said
def test_why_there_is_no_apple_gpu(apple_gpu, monkeypatch):
    def refused(words):
        with pytest.raises(UserError, match=f"accelerator is mps, but .*{words}.*; leave it out"):
            choose_devices(None, "mps")
        assert choose_devices(None) == Devices("cpu", 1)

    with monkeypatch.context() as intel:
        intel.setattr(platform, "machine", lambda: "x86_64")
        refused("Apple's own processors")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    refused("macOS 12.3")
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    refused("this build of torch")
    monkeypatch.setenv("DISABLE_MPS", "1")
    refused("DISABLE_MPS")


@pytest.mark.parametrize("name", ["tpu", "cude", 7])
def test_unknown_accelerator(name):
    with pytest.raises(UsageError, match="choose one of auto, cpu, cuda, gpu, mps"):
        choose_devices(None, name)


@pytest.mark.done_or_said
def test_accelerator_that_is_not_here(no_gpu):
    with pytest.raises(UserError, match="accelerator is gpu, but torch finds no GPU here; leave it out"):
        choose_devices(None, "gpu")


@pytest.mark.parametrize(
    ("trainer", "count"),
    [
        ({}, 1),
        ({"gpus": "0,"}, 1),
        ({"gpus": "0,1"}, 2),
        ({"gpus": "-1"}, 2),
        ({"gpus": "0,", "num_nodes": 3}, 3),
        ({"devices": 2, "accelerator": "cpu"}, 2),
        ({"devices": "0,1", "num_nodes": 2}, 4),
        ({"devices": "auto"}, 1),
    ],
)
def test_processes(trainer, count):
    assert processes(trainer) == count


def test_processes_of_chosen_devices():
    assert processes({"num_nodes": 2}, Devices("cuda", [0, 1])) == 4
    assert processes({"devices": 3}, Devices("cpu", 1)) == 3


CPU = Devices("cpu", 1)


def kwargs(personalization=True, **trainer):
    return trainer_module.trainer_kwargs({"trainer": trainer}, CPU, personalization=personalization)


def build_callbacks(tmp_path, lightning, model=None):
    run = RunFolder(tmp_path, "now")
    node = complete_lightning(lightning)
    return trainer_module.make_callbacks(
        node, OmegaConf.create({"lightning": lightning}), run, model, Requests(), ""
    )


@pytest.mark.one_reader
def test_old_option_names(caplog):
    caplog.set_level(logging.INFO, logger="ldm")
    options = kwargs(
        gpus="0,",
        accelerator="ddp",
        weights_summary="top",
        amp_level="O2",
        process_position=None,
        replace_sampler_ddp=True,
        benchmark=True,
        max_steps=9,
    )
    assert options["strategy"] == "ddp"
    assert options["accelerator"] == "cpu"
    assert options["use_distributed_sampler"] is True
    assert options["benchmark"] is True
    assert options["enable_model_summary"] is True
    assert not {"gpus", "weights_summary", "amp_level", "process_position"} & options.keys()
    assert caplog.messages == [
        "lightning.trainer.amp_level belongs to Lightning 1.x and is ignored; set precision"
    ]


@pytest.mark.one_reader
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"progress_bar_refresh_rate": 0}, {"enable_progress_bar": False}),
        ({"progress_bar_refresh_rate": 20}, {"enable_progress_bar": None}),
        ({"weights_summary": None}, {"enable_model_summary": False}),
        ({"checkpoint_callback": True}, {"enable_checkpointing": True}),
        ({"reload_dataloaders_every_epoch": True}, {"reload_dataloaders_every_n_epochs": 1}),
        ({"row_log_interval": 5}, {"log_every_n_steps": 5}),
        ({"max_nb_epochs": 3}, {"max_epochs": 3}),
        ({"train_percent_check": 0.5}, {"limit_train_batches": 0.5}),
        ({"gradient_clip": 1.0}, {"gradient_clip_val": 1.0}),
        ({"use_amp": True}, {"precision": "16-mixed"}),
        ({"num_processes": 2}, {"devices": 2}),
        ({"distributed_backend": "dp"}, {"strategy": "ddp"}),
        ({"accelerator": "ddp_spawn"}, {"strategy": "ddp_spawn"}),
        ({"accelerator": "ddp2", "strategy": "auto"}, {"strategy": "auto"}),
        ({"accelerator": "cpu"}, {"accelerator": "cpu"}),
        ({"max_steps": 7, "max_nb_epochs": 2}, {"max_steps": 7, "max_epochs": 2}),
    ],
)
def test_old_options_that_have_a_successor(old, new, caplog):
    caplog.set_level(logging.INFO, logger="ldm")
    assert trainer_module.translate_old_keys(old) == new
    assert not caplog.messages


@pytest.mark.one_reader
@pytest.mark.parametrize("key", sorted(k for k, new in OLD_TRAINER_KEYS.items() if new is None))
def test_old_options_that_mean_nothing_any_more(key, caplog):
    caplog.set_level(logging.INFO, logger="ldm")
    assert trainer_module.translate_old_keys({key: 1, "max_steps": 3}) == {"max_steps": 3}
    (message,) = caplog.messages
    assert message.startswith(f"lightning.trainer.{key} belongs to Lightning 1.x and is ignored")
    assert trainer_module.translate_old_keys({key: None}) == {} and len(caplog.messages) == 1


def test_all_old_options_are_old():
    assert not OLD_TRAINER_KEYS.keys() - {"gpus"} & set(TRAINER_OPTIONS)


@pytest.mark.one_reader
def test_options_that_the_run_sets(caplog):
    caplog.set_level(logging.INFO, logger="ldm")
    assert trainer_module.translate_old_keys({"default_root_dir": "x", "logger": True, "plugins": None}) == {}
    assert caplog.messages == [
        "lightning.trainer.default_root_dir is set by the run and is ignored; use --logdir",
        "lightning.trainer.logger is set by the run and is ignored; use lightning.logger",
    ]


@pytest.mark.one_reader
def test_old_options_in_a_run(tiny_yaml, capsys):
    """In a YAML and as flags; what is in use is saved under its current name."""
    words = [
        "--row_log_interval",
        "3",
        "--weights_summary",
        "top",
        "--terminate_on_nan",
        "true",
        "--tpu_cores",
        "8",
    ]
    words += ["lightning.trainer.distributed_backend=ddp_cpu", "lightning.trainer.max_nb_epochs=1"]
    words += ["lightning.trainer.default_root_dir=elsewhere", "lightning.modelcheckpoint.params.save_top_k=3"]
    words += ["lightning.trainer.num_processes=1", "lightning.trainer.checkpoint_callback=false"]
    words += ["lightning.logger.target=pytorch_lightning.loggers.TestTubeLogger"]
    assert start("--base", tiny_yaml, *words) == 0
    out = capsys.readouterr().out
    assert out.count("lightning.trainer.terminate_on_nan belongs to Lightning 1.x and is ignored") == 1
    assert out.count("lightning.trainer.tpu_cores belongs to Lightning 1.x and is ignored") == 1
    assert "lightning.modelcheckpoint: save_top_k is ignored" in out
    assert "TestTubeLogger no longer exists: TensorBoard takes its place" in out
    assert "enable_checkpointing: false is ignored: a run always saves its state" in out


@pytest.mark.one_reader
def test_options_of_the_trainer_are_no_mappings(tiny_yaml, capsys):
    words = ["lightning.trainer.callbacks=[]", "--logger", "false"]
    assert start("--base", tiny_yaml, *words) == 0
    out = capsys.readouterr().out
    assert "lightning.trainer.callbacks is set by the run and is ignored; use lightning.callbacks" in out
    assert "lightning.trainer.logger is set by the run and is ignored; use lightning.logger" in out


@pytest.mark.done_or_said
def test_a_half_precision_is_not_warned_of_by_lightning(tiny_yaml, capsys):
    """It would name its own choice before the run's own."""
    assert start("--base", tiny_yaml, "--precision", "16") == 0
    shown = capsys.readouterr()
    assert "lightning.trainer.precision: 16 is not supported on a CPU; using bf16-mixed" in shown.out
    assert "connector" not in shown.err + shown.out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lightning.trainer.max_step=3", "unknown key 'max_step' (did you mean 'max_steps'?)"),
        (
            "lightning.trainer.row_log_intervall=3",
            "unknown key 'row_log_intervall' (did you mean 'row_log_interval'?)",
        ),
        ("lightning.trainer.nonsense=3", "unknown key 'nonsense'"),
    ],
)
def test_options_that_never_existed(tiny_yaml, capsys, word, message):
    assert start("--base", tiny_yaml, word) == 1
    assert f"lightning.trainer: {message}" in capsys.readouterr().err


def test_default_number_of_steps():
    assert kwargs()["max_steps"] == 6100
    assert "max_steps" not in kwargs(max_epochs=2)
    scratch = kwargs(personalization=False)
    assert scratch["max_epochs"] == -1 and "max_steps" not in scratch


def test_several_gpus_use_ddp():
    options = trainer_module.trainer_kwargs({}, Devices("cuda", [0, 1]), personalization=True)
    assert (options["strategy"], options["accelerator"], options["devices"]) == ("ddp", "gpu", [0, 1])


def test_several_machines_use_ddp():
    options = trainer_module.trainer_kwargs(
        {"trainer": {"num_nodes": 2}}, Devices("cuda", [0]), personalization=True
    )
    assert (options["strategy"], options["num_nodes"], options["devices"]) == ("ddp", 2, [0])
    assert kwargs(devices=2)["strategy"] == "ddp"
    assert kwargs()["strategy"] == "auto"


def test_null_that_is_a_value():
    assert kwargs(check_val_every_n_epoch=None, limit_val_batches=None)["check_val_every_n_epoch"] is None


def test_callbacks_by_name_and_by_target(tmp_path):
    lightning = {
        "modelcheckpoint": {"params": {"every_n_train_steps": 50}},
        "callbacks": {
            "image_logger": {"params": {"max_images": 1}},
            "mine": {"target": "pytorch_lightning.callbacks.Timer"},
            "progress": None,
        },
    }
    built = {type(callback).__name__: callback for callback in build_callbacks(tmp_path, lightning)}
    assert built["ImageLogger"].max_images == 1
    assert built["ImageLogger"].batch_frequency == 750
    assert built["LastCheckpoint"].every_n_train_steps == 50
    assert built["EmbeddingSaver"].every_n_train_steps == 50
    assert "Timer" in built
    assert "RunProgress" not in built
    assert "ModelCheckpoint" not in built


def test_order_of_signals_previews_and_saving(tmp_path):
    built = build_callbacks(tmp_path, {})
    kinds = [type(callback).__name__ for callback in built]
    assert kinds.index("Interruption") < kinds.index("ImageLogger")
    assert isinstance(built[-1], LastCheckpoint)
    logger = next(callback for callback in built if isinstance(callback, ImageLogger))
    assert logger.requests is built[kinds.index("Interruption")].requests


def test_monitored_checkpoint_is_lightnings_own(tmp_path):
    lightning = {"modelcheckpoint": {"params": {"monitor": "val/loss", "save_top_k": 2}}}
    assert "ModelCheckpoint" in [type(callback).__name__ for callback in build_callbacks(tmp_path, lightning)]


def test_loggers(tmp_path):
    def names(node):
        return [
            type(log).__name__
            for log in trainer_module.make_loggers(complete_lightning(node), RunFolder(tmp_path, "n"))
        ]

    assert names({}) == ["CSVLogger", "TensorBoardLogger"]
    assert names({"logger": {"target": "pytorch_lightning.loggers.TestTubeLogger"}}) == names({})
    assert names({"logger": {"target": "pytorch_lightning.loggers.CSVLogger"}}) == ["CSVLogger", "CSVLogger"]


def test_logger_with_a_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("pytorch_lightning.loggers.wandb._WANDB_AVAILABLE", False)
    node = complete_lightning({"logger": {"target": "pytorch_lightning.loggers.WandbLogger"}})
    with pytest.raises(ConfigError, match="WandbLogger needs a package that is not installed"):
        trainer_module.make_loggers(node, RunFolder(tmp_path, "n"))


def test_callbacks_of_a_personalization():
    assert "latent_cache" not in complete_lightning({})["callbacks"]
    assert complete_lightning({}, personalization=True)["callbacks"]["latent_cache"]["target"]
    assert (
        complete_lightning({"callbacks": {"latent_cache": None}}, personalization=True)["callbacks"][
            "latent_cache"
        ]
        is None
    )
    named = complete_lightning({"callbacks": {"latent_cache": {"params": {"batch_size": 2}}}})["callbacks"]
    assert named["latent_cache"]["target"].endswith("LatentCache")


def test_state_of_a_step_is_complete_before_it_is_saved(tmp_path):
    lightning = {"callbacks": {"deterministic_loss": {}}}
    kinds = [type(callback).__name__ for callback in build_callbacks(tmp_path, lightning)]
    assert kinds.index("DeterministicLoss") < kinds.index("Interruption")
