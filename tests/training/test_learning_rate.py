"""Learning rates by steps, schedules, accumulation and clipping in runs of a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.runs import start, state_of


def test_rates_by_steps(tiny_yaml, capsys):
    words = ["model.base_learning_rate=1e-3:2, 5e-4:4, 1e-4", "--scale_lr", "false"]
    often = "lightning.callbacks.vector_stats.params.every_n_train_steps=1"
    assert start("--base", tiny_yaml, "-t", "-l", "a", often, *words) == 0
    assert "learning rate 1.00e-03; by steps: 1e-3:2, 5e-4:4, 1e-4" in capsys.readouterr().out
    rows = next(value for key, value in state_of("a")["callbacks"].items() if "Health" in key)["rows"]
    # The rate measured after a step is that of the next step.
    assert [rate for *_, rate in rows] == pytest.approx([1e-3, 5e-4, 5e-4, 1e-4, 1e-4, 1e-4])
    assert start("--base", tiny_yaml, "-t", "-l", "b", "model.base_learning_rate=1e-3:2, 5e-4") == 0
    (group,) = state_of("b")["optimizer_states"][0]["param_groups"]
    assert (group["initial_lr"], group["lr"]) == pytest.approx((2e-3, 1e-3)), "times the batch of 2"


@pytest.mark.refused_first
def test_invalid_rate(tiny_yaml, capsys):
    assert start("--base", tiny_yaml, "-t", "model.base_learning_rate=quick") == 1
    assert "'quick' is not RATE:STEPS" in capsys.readouterr().err


@pytest.mark.done_or_said
def test_rates_by_steps_replace_a_schedule(tiny_yaml, capsys):
    schedule = "model.params.scheduler_config"
    words = [f"{schedule}.target=ldm.lr_scheduler.LambdaStepScheduler", f"{schedule}.params.rates=7"]
    assert start("--base", tiny_yaml, "-t", "-l", "a", "model.base_learning_rate=1e-3:2, 5e-4", *words) == 0
    assert "replaces the YAML's scheduler_config" in capsys.readouterr().err
    (group,) = state_of("a")["optimizer_states"][0]["param_groups"]
    assert (group["initial_lr"], group["lr"]) == pytest.approx((2e-3, 1e-3))


COSINE = (
    "model.params.scheduler_config.target=ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
    "model.params.scheduler_config.params={warm_up_steps: 0, lr_start: 1, lr_max: 1, lr_min: 0, max_decay_steps: null}",
)


def test_schedule_of_the_runs_length(tiny_yaml, capsys):
    for steps in (4, 6):
        assert start("--base", tiny_yaml, "-t", "-l", f"of{steps}", *COSINE, "--max_steps", steps) == 0
        scheduler = state_of(f"of{steps}")["lr_schedulers"][0]
        assert (scheduler["last_epoch"], scheduler["_last_lr"][0]) == (steps, pytest.approx(0, abs=1e-12))
    assert "; times the factor of LambdaWarmUpCosineScheduler\n" in capsys.readouterr().out
    half = state_of("of6")
    assert start("--base", tiny_yaml, "-t", "-l", "half", *COSINE, "--max_steps", 3) == 0
    (run,) = Path("half").iterdir()
    assert start("-t", "-r", run, "--max_steps", 6) == 0
    assert state_of("half")["lr_schedulers"][0]["_last_lr"] == half["lr_schedulers"][0]["_last_lr"]


@pytest.mark.refused_first
def test_schedule_of_the_runs_length_needs_max_steps(tiny_yaml, capsys):
    for limit in ("--max_epochs=2", "--max_steps=-1"):
        words = [*COSINE, limit] + (["lightning.trainer.max_steps=null"] if "epochs" in limit else [])
        assert start("--base", tiny_yaml, "-t", *words) == 1
        assert "the run has no max_steps; give one of the two" in capsys.readouterr().err


def test_accumulation_and_clipping(tiny_yaml):
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
