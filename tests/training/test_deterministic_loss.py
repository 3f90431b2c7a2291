"""Runs of a tiny model that are measured, stopped and gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import main
from ldm import embeddings
from ldm.training.callbacks.fixed_loss import DeterministicLoss, FixedNoiseLoss
from ldm.util import UserError

NODE = "lightning.callbacks.deterministic_loss"
OFTEN = [f"{NODE}.params.every_n_train_steps=1", "lightning.modelcheckpoint.params.every_n_train_steps=1"]


def start(*words: object) -> int:
    return main.main([str(word) for word in words])


def only_run(folder: str) -> Path:
    (path,) = Path(folder).iterdir()
    return path


def state_of(folder: str) -> dict:
    return torch.load(only_run(folder) / "checkpoints" / "last.ckpt", weights_only=True)


def measured(state: dict) -> dict:
    return next(value for key, value in state["callbacks"].items() if "DeterministicLoss" in key)


def test_the_training_is_the_same_with_it_and_the_best_is_kept(tiny_yaml, capsys):
    vectors = "model.params.personalization_config.params.num_vectors_per_token=4"
    long = ["--max_steps", 30, vectors]
    assert start("--base", tiny_yaml, "-t", "-l", "with", *OFTEN, *long) == 0
    lines = capsys.readouterr().out.splitlines()
    assert start("--base", tiny_yaml, "-t", "-l", "without", f"{NODE}=null", *long) == 0
    first, second = state_of("with"), state_of("without")
    assert not any("DeterministicLoss" in key for key in second["callbacks"])
    for key, value in second["state_dict"].items():
        assert torch.equal(first["state_dict"][key], value)
    assert torch.equal(first["random_states"][0]["torch"], second["random_states"][0]["torch"])

    found = measured(first)
    assert found["steps"] == list(range(31)) and len(set(found["losses"])) > 20
    means = [sum(part) / len(part) for i in range(31) if (part := found["losses"][max(0, i - 2) : i + 1])]
    assert found["best_loss"] == min(means) and found["best_step"] == means.index(min(means))
    folder = only_run("with") / "checkpoints"
    best = embeddings.read(folder / "embeddings_best.pt").concepts[0].vectors
    assert found["best_step"] > 0, "the first vectors are worse"
    (kept,) = (value for key, value in found["best"].items() if "string_to_param_dict" in key)
    assert torch.equal(best, kept)
    of_step = embeddings.read(folder / f"embeddings_gs-{found['best_step']}.pt")
    assert torch.equal(best, of_step.concepts[0].vectors)
    assert embeddings.read(folder / "embedding_best.safetensors").metadata.steps == found["best_step"]
    assert f"; step {found['best_step']} is best" in lines[-1] and "it reached its limit" in lines[-1]
    assert any("fixed loss" in line for line in lines if line.startswith("step "))
    (csv,) = only_run("with").glob("csv/*/metrics.csv")
    assert "val/loss_deterministic" in csv.read_text().splitlines()[0]


def test_a_flat_curve_ends_the_run_and_a_resumed_one_stays_ended(tiny_yaml, capsys):
    stop = [f"{NODE}.params.stop.window=2", f"{NODE}.params.stop.threshold=0.999"]
    slow = ["model.base_learning_rate=1e-3", "--max_steps", 500]
    assert start("--base", tiny_yaml, "-t", "-l", "runs", *OFTEN, *slow, *stop) == 0
    state = state_of("runs")
    ended = state["global_step"]
    assert 2 <= ended < 100
    assert f"ended at step {ended} because the deterministic loss is flat" in capsys.readouterr().out
    assert start("-r", only_run("runs"), "-t") == 0
    assert state_of("runs")["global_step"] == ended
    assert start("-r", only_run("runs"), "-t", f"{NODE}.params.stop=null", "--max_steps", ended + 2) == 0
    assert state_of("runs")["global_step"] == ended + 2
    assert measured(state_of("runs"))["losses"][: len(measured(state)["losses"])] == measured(state)["losses"]


def test_a_resumed_run_has_measured_the_same(tiny_yaml):
    assert start("--base", tiny_yaml, "-t", "-l", "straight", *OFTEN) == 0
    assert start("--base", tiny_yaml, "-t", "-l", "stopped", *OFTEN, "--max_steps", 3) == 0
    assert start("-r", only_run("stopped"), "-t", "--max_steps", 6) == 0
    straight, resumed = measured(state_of("straight")), measured(state_of("stopped"))
    assert straight["losses"] == resumed["losses"] and straight["steps"] == resumed["steps"]
    assert straight["best_step"] == resumed["best_step"]
    assert all(torch.equal(resumed["best"][key], value) for key, value in straight["best"].items())


def test_what_is_said_where_no_step_is_best(tiny_yaml, capsys, monkeypatch):
    assert start("--base", tiny_yaml, "-t", "-l", "short", "--max_steps", 1) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ended at step 1 because it reached its limit"
    folder = only_run("short") / "checkpoints"
    assert not (folder / "embeddings_best.pt").exists()
    rising = iter([1.0, 1.1, 1.2])
    monkeypatch.setattr(FixedNoiseLoss, "measure", lambda self, model: next(rising))
    assert start("--base", tiny_yaml, "-t", "-l", "worse", *OFTEN, "--max_steps", 2) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("; no step was better than the initial vectors")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"every_n_train_steps": 0}, "every_n_train_steps is 0"),
        ({"samples": 0}, "samples is 0"),
        ({"stop": {"windows": 3}}, "windows"),
    ],
)
def test_settings_that_make_no_sense(options, name):
    with pytest.raises(UserError, match=name):
        DeterministicLoss(**options)
