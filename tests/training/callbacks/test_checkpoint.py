"""Saved YAMLs; last.ckpt: when it is saved, what it holds, and the random states in it; the seed of validation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from ldm import random_state
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.callbacks.checkpoint import LastCheckpoint, SetupCallback, StateFile, ValidationSeed
from ldm.util import UserError
from tests.training.runs import fit_line, start, state_of


class TestLastCheckpoint:
    def test_saves_at_intervals_and_at_the_end(self, line, numbers, tmp_path):
        path = tmp_path / "checkpoints" / "last.ckpt"
        last = LastCheckpoint(path, every_n_train_steps=2)
        steps = []
        save = last.save_now
        last.save_now = lambda trainer: (save(trainer), steps.append(trainer.global_step))
        fit_line(line, numbers, tmp_path, [last], steps=5)
        assert sorted(set(steps)) == [2, 4, 5]
        assert torch.load(path, weights_only=True)["global_step"] == 5

    def test_saves_when_a_step_fails(self, line, numbers, tmp_path):
        class Fails(pl.Callback):
            def on_train_batch_start(self, trainer, *rest):
                if trainer.global_step == 3:
                    raise RuntimeError("boom")

        path = tmp_path / "last.ckpt"
        with pytest.raises(RuntimeError, match="boom"):
            fit_line(line, numbers, tmp_path, [Fails(), LastCheckpoint(path)], steps=5)
        assert torch.load(path, weights_only=True)["global_step"] == 3

    def test_all_weights_of_other_models_are_saved(self, line, numbers, tmp_path):
        fit_line(line, numbers, tmp_path, [LastCheckpoint(tmp_path / "last.ckpt")])
        state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
        assert state.keys() == line.state_dict().keys()

    def test_noise_continues_after_resuming(self, line, numbers, tmp_path):
        class Keep(pl.Callback):
            def on_train_batch_end(self, trainer, *rest):
                if trainer.global_step == 2:
                    trainer.save_checkpoint(tmp_path / "second.ckpt")

        def noise(name):
            return torch.load(tmp_path / name, weights_only=True)["random_states"][0]["torch"]

        fit_line(line, numbers, tmp_path, [LastCheckpoint(tmp_path / "straight.ckpt"), Keep()], steps=3)
        torch.manual_seed(99)
        callbacks = [LastCheckpoint(tmp_path / "resumed.ckpt")]
        fit_line(line, numbers, tmp_path, callbacks, steps=3, ckpt=tmp_path / "second.ckpt")
        assert torch.equal(noise("resumed.ckpt"), noise("straight.ckpt"))
        assert not torch.equal(noise("second.ckpt"), noise("straight.ckpt"))


def test_the_steps_before_a_validation_are_saved_first(tiny_yaml, monkeypatch):
    saved = []
    monkeypatch.setattr(
        LatentDiffusion, "validation_step", lambda *arguments: saved.append(state_of()["global_step"])
    )
    rarely = "lightning.modelcheckpoint.params.every_n_train_steps=100"
    assert start("--base", tiny_yaml, "-t", rarely) == 0
    assert sorted(set(saved)) == [3, 6]


def test_state_file_is_written_atomically(tmp_path, monkeypatch):
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


def test_new_noise_with_another_number_of_processes(tmp_path):
    def first_noise(rank: int, step: int) -> torch.Tensor:
        last = LastCheckpoint(tmp_path / "last.ckpt")
        last.on_load_checkpoint(None, None, {"random_states": [random_state.capture()]})
        trainer = SimpleNamespace(world_size=2, global_rank=rank, global_step=step)
        torch.manual_seed(7)
        last.on_train_start(trainer, None)
        last.on_train_batch_start(trainer, None, None, 0)
        return torch.rand(4)

    assert not torch.equal(first_noise(0, 5), first_noise(1, 5)), "two processes draw the same"
    assert not torch.equal(first_noise(0, 5), first_noise(0, 6)), "the first noise is repeated"


def test_validation_seed(line, numbers, tmp_path):
    losses = []

    class Collect(pl.Callback):
        def on_validation_end(self, trainer, *rest):
            losses.append(float(trainer.callback_metrics["val/loss"]))

    start = {key: value.clone() for key, value in line.state_dict().items()}
    torch.manual_seed(1)
    fit_line(line, numbers, tmp_path, [ValidationSeed(), Collect()], steps=6, validate=True)
    assert len(losses) == 2 and losses[0] == losses[1]
    validated = line.line.weight.detach().clone()
    line.load_state_dict(start)
    torch.manual_seed(1)
    fit_line(line, numbers, tmp_path, [], steps=6)
    assert torch.equal(line.line.weight, validated)


def test_saved_yamls(line, numbers, tmp_path):
    run = tmp_path / "run"
    setup = SetupCallback("", "now", run, run / "checkpoints", run / "configs", {"model": 1}, {"trainer": 2})
    fit_line(line, numbers, tmp_path, [setup])
    assert (tmp_path / "run/configs/now-project.yaml").read_text() == "model: 1\n"
    assert (tmp_path / "run/configs/now-lightning.yaml").read_text() == "lightning:\n  trainer: 2\n"


def test_unwritable_folder(line, numbers, tmp_path):
    (tmp_path / "run").write_text("a file")
    setup = SetupCallback("", "now", tmp_path / "run", tmp_path / "run/c", tmp_path / "run/configs", {}, {})
    with pytest.raises(UserError, match="cannot write"):
        fit_line(line, numbers, tmp_path, [setup])
