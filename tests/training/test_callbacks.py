"""Callbacks around a line that is fitted to numbers."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm import random_state
from ldm.training.callbacks.checkpoint import LastCheckpoint, StateFile
from ldm.training.callbacks.image_logger import ImageLogger
from ldm.training.callbacks.performance import CUDACallback
from ldm.training.callbacks.progress import RunProgress, duration
from ldm.training.callbacks.setup import SetupCallback, ValidationSeed
from ldm.util import UserError, evaluating


def train(model, numbers, folder, callbacks, steps=4, validate=False, ckpt=None, **options):
    trainer = pl.Trainer(
        default_root_dir=folder,
        callbacks=callbacks,
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        plugins=[StateFile()],
        enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        enable_progress_bar=any(isinstance(c, pl.callbacks.ProgressBar) for c in callbacks),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    loader = lambda: DataLoader(numbers(6), batch_size=2, generator=torch.Generator())  # noqa: E731
    trainer.fit(model, loader(), loader() if validate else None, ckpt_path=ckpt)
    return trainer


class TestImageLogger:
    def due(self, steps=10, **options):
        logger = ImageLogger(**{"batch_frequency": 4, "max_images": 2, "increase_log_steps": False} | options)
        found = []
        for step in range(1, steps + 1):
            if logger.is_due("train", step, (step - 1) % 5):
                found.append(step)
                logger._last_step["train"] = step
        return found

    def test_steps(self):
        assert self.due() == [4, 8]
        assert self.due(increase_log_steps=True) == [1, 2, 4, 8]
        assert self.due(log_first_step=True) == [1, 4, 8]
        assert self.due(log_on_batch_idx=True) == [4, 9]
        assert self.due(disabled=True) == self.due(max_images=0) == self.due(batch_frequency=0) == []

    def test_an_accumulated_step_is_shown_once(self, line, numbers, tmp_path):
        logger = ImageLogger(batch_frequency=1, max_images=2)
        train(line, numbers, tmp_path, [logger], steps=2, accumulate_grad_batches=2)
        assert line.previews == 2

    def test_files_have_the_originals_names(self, line, numbers, tmp_path):
        train(line, numbers, tmp_path, [ImageLogger(batch_frequency=3, max_images=2)], steps=6, validate=True)
        train_files = sorted(path.name for path in (tmp_path / "images" / "train").iterdir())
        assert "slope_gs-000003_e-000000_b-000002.jpg" in train_files
        assert "slope_gs-000006_e-000001_b-000002.jpg" in train_files
        assert [path.name for path in (tmp_path / "images" / "val").iterdir()]
        with Image.open(tmp_path / "images" / "train" / train_files[0]) as grid:
            assert grid.size[0] < 2 * 8 + 10, "two of the four pictures"

    def test_the_training_does_not_notice(self, line, numbers, tmp_path):
        torch.manual_seed(1)
        start = {key: value.clone() for key, value in line.state_dict().items()}
        train(line, numbers, tmp_path, [])
        without = line.line.weight.detach().clone()
        line.load_state_dict(start)
        torch.manual_seed(1)
        train(line, numbers, tmp_path, [ImageLogger(batch_frequency=1, max_images=2)])
        assert line.previews == 4
        assert torch.equal(line.line.weight, without)

    def test_modes_come_back(self, line):
        line.train()
        line.frozen.eval()
        with pytest.raises(KeyError), evaluating(line):
            assert not line.line.training
            raise KeyError
        assert line.line.training and not line.frozen.training

    def test_pictures_reach_tensorboard(self, line, numbers, tmp_path):
        seen = []
        log = pl.loggers.TensorBoardLogger(tmp_path)
        log.experiment.add_image = lambda tag, *args, **kwargs: seen.append(tag)
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            callbacks=[ImageLogger(1, 2)],
            max_steps=1,
            logger=log,
            enable_checkpointing=False,
            enable_progress_bar=False,
            accelerator="cpu",
        )
        trainer.fit(line, DataLoader(numbers(2)))
        assert seen == ["train/slope"]


class TestLastCheckpoint:
    def test_saves_at_intervals_and_at_the_end(self, line, numbers, tmp_path):
        path = tmp_path / "checkpoints" / "last.ckpt"
        last = LastCheckpoint(path, every_n_train_steps=2)
        steps = []
        save = last.save_now
        last.save_now = lambda trainer: (save(trainer), steps.append(trainer.global_step))
        train(line, numbers, tmp_path, [last], steps=5)
        assert steps == [2, 4, 5]
        assert torch.load(path, weights_only=True)["global_step"] == 5

    def test_saves_when_a_step_fails(self, line, numbers, tmp_path):
        class Bad(pl.Callback):
            def on_train_batch_start(self, trainer, *rest):
                if trainer.global_step == 3:
                    raise RuntimeError("boom")

        path = tmp_path / "last.ckpt"
        with pytest.raises(RuntimeError, match="boom"):
            train(line, numbers, tmp_path, [Bad(), LastCheckpoint(path)], steps=5)
        assert torch.load(path, weights_only=True)["global_step"] == 3

    def test_a_full_model_is_saved_whole(self, line, numbers, tmp_path):
        train(line, numbers, tmp_path, [LastCheckpoint(tmp_path / "last.ckpt")])
        state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
        assert state.keys() == line.state_dict().keys()

    def test_noise_goes_on_where_it_was(self, line, numbers, tmp_path):
        class Keep(pl.Callback):
            def on_train_batch_end(self, trainer, *rest):
                if trainer.global_step == 2:
                    trainer.save_checkpoint(tmp_path / "second.ckpt")

        def noise(name):
            return torch.load(tmp_path / name, weights_only=True)["random_states"][0]["torch"]

        train(line, numbers, tmp_path, [LastCheckpoint(tmp_path / "straight.ckpt"), Keep()], steps=3)
        torch.manual_seed(99)
        callbacks = [LastCheckpoint(tmp_path / "resumed.ckpt")]
        train(line, numbers, tmp_path, callbacks, steps=3, ckpt=tmp_path / "second.ckpt")
        assert torch.equal(noise("resumed.ckpt"), noise("straight.ckpt"))
        assert not torch.equal(noise("second.ckpt"), noise("straight.ckpt"))


def test_validation_draws_the_same_and_takes_nothing(line, numbers, tmp_path):
    losses = []

    class Collect(pl.Callback):
        def on_validation_end(self, trainer, *rest):
            losses.append(float(trainer.callback_metrics["val/loss"]))

    start = {key: value.clone() for key, value in line.state_dict().items()}
    torch.manual_seed(1)
    train(line, numbers, tmp_path, [ValidationSeed(), Collect()], steps=6, validate=True)
    assert len(losses) == 2 and losses[0] == losses[1]
    validated = line.line.weight.detach().clone()
    line.load_state_dict(start)
    torch.manual_seed(1)
    train(line, numbers, tmp_path, [], steps=6)
    assert torch.equal(line.line.weight, validated)


class TestProgress:
    def test_lines_where_there_is_no_terminal(self, line, numbers, tmp_path, caplog):
        caplog.set_level(logging.INFO, logger="ldm")
        train(line, numbers, tmp_path, [RunProgress(every_n_steps=2, terminal=False)], steps=5)
        lines = [message for message in caplog.messages if message.startswith("step")]
        assert [text.split(",")[0] for text in lines] == ["step 1/5", "step 2/5", "step 4/5", "step 5/5"]
        assert "loss" in lines[0] and "lr 1.00e-01" in lines[0] and "left" in lines[0]

    def test_one_bar_for_the_whole_run(self, line, numbers, tmp_path, capsys):
        progress = RunProgress(terminal=True)
        train(line, numbers, tmp_path, [progress], steps=7)
        shown = capsys.readouterr().err
        assert "7/7" in shown
        assert "loss" in shown.split("\r")[-1] and "lr" in shown.split("\r")[-1]

    @pytest.mark.parametrize(
        ("seconds", "words"), [(8, "8 s"), (300, "5 min"), (3 * 3600 + 300, "3 h 05 min")]
    )
    def test_durations(self, seconds, words):
        assert duration(seconds) == words


def test_cuda_callback_rests_on_a_cpu(line, numbers, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="ldm")
    train(line, numbers, tmp_path, [CUDACallback()])
    assert [message for message in caplog.messages if "CUDA" in message] == [
        "CUDACallback: not on a CUDA device, nothing to measure"
    ]


def test_setup_writes_what_the_run_was_made_of(line, numbers, tmp_path):
    run = tmp_path / "run"
    setup = SetupCallback("", "now", run, run / "checkpoints", run / "configs", {"model": 1}, {"trainer": 2})
    train(line, numbers, tmp_path, [setup])
    assert (tmp_path / "run/configs/now-project.yaml").read_text() == "model: 1\n"
    assert (tmp_path / "run/configs/now-lightning.yaml").read_text() == "lightning:\n  trainer: 2\n"


def test_a_folder_that_cannot_be_written_stops_the_run_before_its_first_step(line, numbers, tmp_path):
    (tmp_path / "run").write_text("a file")
    setup = SetupCallback("", "now", tmp_path / "run", tmp_path / "run/c", tmp_path / "run/configs", {}, {})
    with pytest.raises(UserError, match="cannot write"):
        train(line, numbers, tmp_path, [setup])


def test_a_state_file_is_whole_or_not_there(tmp_path, monkeypatch):
    target = tmp_path / "last.ckpt"
    StateFile().save_checkpoint({"step": torch.tensor(1)}, target)

    def fail(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match="disk is full"):
        StateFile().save_checkpoint({"step": torch.tensor(2)}, target)
    assert StateFile().load_checkpoint(target) == {"step": torch.tensor(1)}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_going_on_with_another_number_of_processes_gives_each_its_own_noise(tmp_path):
    def drawn(rank: int, step: int) -> torch.Tensor:
        last = LastCheckpoint(tmp_path / "last.ckpt")
        last.on_load_checkpoint(None, None, {"random_states": [random_state.capture()]})
        trainer = SimpleNamespace(world_size=2, global_rank=rank, global_step=step)
        torch.manual_seed(7)
        last.on_train_start(trainer, None)
        last.on_train_batch_start(trainer, None, None, 0)
        return torch.rand(4)

    assert not torch.equal(drawn(0, 5), drawn(1, 5)), "two processes draw the same"
    assert not torch.equal(drawn(0, 5), drawn(0, 6)), "the noise of the beginning once more"


def test_random_states_come_back():
    state = random_state.capture()
    drawn = torch.rand(2), np.random.rand(2)
    with random_state.isolated(1, 2):
        inside = torch.rand(2)
    random_state.restore(state)
    with random_state.isolated(1, 2):
        assert torch.equal(torch.rand(2), inside)
    assert torch.equal(torch.rand(2), drawn[0])
    assert (np.random.rand(2) == drawn[1]).all()
