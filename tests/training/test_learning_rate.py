"""Rates by steps, accumulation and clipping in runs of a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import main


def start(*words: object) -> int:
    return main.main([str(word) for word in words])


def state_of(folder: str = "logs") -> dict:
    (run,) = Path(folder).iterdir()
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def test_rates_by_steps(tiny_yaml, capsys):
    words = ["model.base_learning_rate=1e-3:2, 5e-4:4, 1e-4", "--scale_lr", "false"]
    often = "lightning.callbacks.health.params.every_n_train_steps=1"
    assert start("--base", tiny_yaml, "-t", "-l", "a", often, *words) == 0
    assert "learning rate 1.00e-03; by steps: 1e-3:2, 5e-4:4, 1e-4" in capsys.readouterr().out
    rows = next(value for key, value in state_of("a")["callbacks"].items() if "Health" in key)["rows"]
    # What is found after a step is the rate of the next one.
    assert [rate for *_, rate in rows] == pytest.approx([1e-3, 5e-4, 5e-4, 1e-4, 1e-4, 1e-4])
    assert start("--base", tiny_yaml, "-t", "-l", "b", "model.base_learning_rate=1e-3:2, 5e-4") == 0
    (group,) = state_of("b")["optimizer_states"][0]["param_groups"]
    assert (group["initial_lr"], group["lr"]) == pytest.approx((2e-3, 1e-3)), "times the batch of 2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.base_learning_rate=quick"], "'quick' is no RATE:STEPS"),
        (
            [
                "model.base_learning_rate=1e-3:5, 1e-4",
                "model.params.scheduler_config.target=ldm.lr_scheduler.LambdaStepScheduler",
                "model.params.scheduler_config.params.rates=1e-3",
            ],
            "scheduler_config too",
        ),
    ],
)
def test_rates_that_make_no_sense(tiny_yaml, capsys, words, message):
    assert start("--base", tiny_yaml, "-t", *words) == 1
    assert message in capsys.readouterr().err


def test_accumulation_and_clipping_are_lightnings(tiny_yaml):
    words = [
        "model.params.optimizer_config.target=torch.optim.SGD",
        "model.base_learning_rate=1",
        "lightning.trainer.accumulate_grad_batches=2",
        "--max_steps",
        1,
    ]
    moved = {}
    for clip in (1e-4, 1e4):
        folder = f"clip{clip}"
        words_of = [*words, f"lightning.trainer.gradient_clip_val={clip}", "-l", folder]
        assert start("--base", tiny_yaml, "-t", *words_of) == 0
        state = state_of(folder)
        assert state["DataModuleFromConfig"]["batches_done"] == 2
        initial = next(v for k, v in state["callbacks"].items() if "Health" in k)["initial"]["*"]
        (vectors,) = (v for k, v in state["state_dict"].items() if "string_to_param_dict" in k)
        moved[clip] = float((vectors - initial).norm())
    rate = 1 * 2 * 2
    assert moved[1e-4] == pytest.approx(rate * 1e-4, rel=1e-2) and moved[1e4] > 10 * moved[1e-4]
