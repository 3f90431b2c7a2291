"""Runs of a tiny model in which something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import main
from ldm import embeddings
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.callbacks.guard import TrainingGuard
from ldm.util import UserError

OFTEN = [
    "lightning.callbacks.training_guard.params.every_n_train_steps=2",
    "lightning.callbacks.deterministic_loss=null",
    "lightning.modelcheckpoint.params.every_n_train_steps=1",
    "lightning.trainer.limit_val_batches=0",
]
ZERO = "model.params.scheduler_config"


def start(*words: object) -> int:
    return main.main([str(word) for word in words])


def only_run(folder: str = "logs") -> Path:
    (path,) = Path(folder).iterdir()
    return path


def state_of(folder: str = "logs") -> dict:
    return torch.load(only_run(folder) / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture
def loss_times(monkeypatch):
    """Multiplies the training loss by what a function makes of the step."""
    p_losses = LatentDiffusion.p_losses

    def install(factor):
        def spoilt(self, *args, **kwargs):
            loss, parts = p_losses(self, *args, **kwargs)
            return loss * factor(self.trainer.global_step), parts

        monkeypatch.setattr(LatentDiffusion, "p_losses", spoilt)

    return install


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [
                f"{ZERO}.target=ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
                *(f"{ZERO}.params.{name}=0" for name in ("warm_up_steps", "lr_min", "lr_max", "lr_start")),
                f"{ZERO}.params.max_decay_steps=9",
            ],
            "the learning rate is 0",
        ),
        (["model.base_learning_rate=1e-30"], "the vectors do not change at a learning rate of 2.0e-30"),
    ],
)
def test_a_run_that_learns_nothing_ends_at_the_first_look(tiny_yaml, capsys, words, message):
    assert start("--base", tiny_yaml, "-t", *OFTEN, *words) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert line.startswith("error: nothing is learned until step 2: ") and message in line
    assert state_of()["global_step"] == 2


def test_no_gradient(tiny_yaml, capsys, loss_times):
    loss_times(lambda step: 0)
    assert start("--base", tiny_yaml, "-t", *OFTEN) == 1
    assert "no gradient reaches the vectors" in capsys.readouterr().err


def test_a_gradient_that_vanishes_later_is_told_once(tiny_yaml, capsys, loss_times):
    loss_times(lambda step: 0 if step >= 2 else 1)
    assert start("--base", tiny_yaml, "-t", *OFTEN) == 0
    assert capsys.readouterr().err.count("step 4: nothing more is learned: no gradient") == 1


def test_a_loss_that_is_no_number_is_taken_back(tiny_yaml, capsys, loss_times):
    loss_times(lambda step: float("nan") if step == 3 else 1)
    assert start("--base", tiny_yaml, "-t", "-l", "straight", *OFTEN) == 0
    shown = capsys.readouterr().err
    assert (
        "not finite at step 4: training continues from the vectors of step 2 with half the learning rate"
        in shown
    )
    straight = state_of("straight")
    (vectors,) = (v for k, v in straight["state_dict"].items() if "string_to_param_dict" in k)
    assert vectors.isfinite().all()
    (optimizer,) = straight["optimizer_states"]
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(5e-3)
    assert optimizer["state"][0]["step"] == 4, "two of the six steps are undone"
    folder = only_run("straight") / "checkpoints"
    second, fourth = (embeddings.read(folder / f"embeddings_gs-{n}.pt").concepts[0].vectors for n in (2, 4))
    assert torch.equal(second, fourth)
    last = embeddings.read(folder / "embeddings.pt").concepts[0].vectors
    assert not torch.equal(last, fourth)

    for stop in (3, 5):
        name = f"stopped-{stop}"
        assert start("--base", tiny_yaml, "-t", "-l", name, *OFTEN, "--max_steps", stop) == 0
        assert start("-r", only_run(name), "-t", "--max_steps", 6) == 0
        resumed = state_of(name)
        assert all(torch.equal(resumed["state_dict"][k], v) for k, v in straight["state_dict"].items())
        assert resumed["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(5e-3)


def test_the_rate_of_a_schedule_is_halved_too(tiny_yaml, loss_times):
    loss_times(lambda step: float("nan") if step == 1 else 1)
    node = [
        f"{ZERO}.target=ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
        *(f"{ZERO}.params.{name}=1" for name in ("lr_min", "lr_max", "lr_start")),
        f"{ZERO}.params.warm_up_steps=0",
        f"{ZERO}.params.max_decay_steps=9",
    ]
    assert start("--base", tiny_yaml, "-t", *OFTEN, *node) == 0
    assert state_of()["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(5e-3)


def test_it_gives_up_after_some_times(tiny_yaml, capsys, loss_times):
    loss_times(lambda step: float("nan") if step >= 2 else 1)
    words = ["lightning.callbacks.training_guard.params.rollbacks=1"]
    assert start("--base", tiny_yaml, "-t", *OFTEN, *words) == 1
    assert "error: the loss is not finite at step 6 (rollbacks: 1)" in capsys.readouterr().err
    last = embeddings.read(only_run() / "checkpoints" / "embeddings.pt").concepts[0].vectors
    second = embeddings.read(only_run() / "checkpoints" / "embeddings_gs-2.pt").concepts[0].vectors
    assert torch.equal(last, second)
    assert not (only_run() / "checkpoints" / "embeddings_gs-3.pt").exists(), "no file of spoilt vectors"


def test_captions_that_are_all_the_same(tiny_yaml, capsys):
    Path("one.txt").write_text("a photo of {}\n")
    assert start("--base", tiny_yaml, "data.params.train.params.template_file=one.txt") == 0
    assert "all captions are 'a photo of *'" in capsys.readouterr().err


def test_bad_settings():
    with pytest.raises(UserError, match="every_n_train_steps is 0"):
        TrainingGuard(every_n_train_steps=0)
