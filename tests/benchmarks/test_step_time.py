"""The comparison as a whole, on a tiny model: who takes turns with whom, and what is written."""

from __future__ import annotations

import pytest
import torch

from benchmarks import step_time
from benchmarks.rounds import OURS
from benchmarks.step_time import Bench
from benchmarks.subjects import EMBEDDED, fill_zeros, stable_diffusion
from ldm.training import command_line, run


def test_steps_of_a_run_and_of_the_other_loop_take_turns(subject, tmp_path, cpu, monkeypatch):
    bench = Bench(subject, tmp_path, cpu, rounds=3, warm_up=1)
    steps = []
    step = step_time.OriginalLoop.__call__
    monkeypatch.setattr(step_time.OriginalLoop, "__call__", lambda loop: steps.append(step(loop)))
    rounds = bench.compare("original", "bfloat16")
    assert len(steps) == rounds.done == 4
    assert {name: len(seconds) for name, seconds in rounds.seconds.items()} == {
        OURS: 3,
        step_time.ORIGINAL: 3,
    }
    (log,) = tmp_path.glob("*/checkpoints/embeddings_gs-4.pt")
    assert log.is_file()
    assert {parameter.dtype for parameter in bench.weights.parameters()} == {torch.float32}


def test_the_table_and_its_bars(subject, tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(step_time, "EMBEDDED", subject)
    assert step_time.main(["embedded", "--rounds", "1", "--warm_up", "0", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "step_time_embedded.md").read_text()
    assert text.strip() in capsys.readouterr().out
    for loop in ("ours, bfloat16", "ours, float32", "original arithmetic", "as diffusers, bfloat16"):
        assert loop in text
    assert ">= 3: m" in text and ">= 1.6: m" in text


def test_without_cuda_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert step_time.main(["sd-v1", "--device", "cuda"]) == 0
    assert capsys.readouterr().out == "no CUDA device here: nothing is measured\n"


def test_the_subjects_fit_our_command_line(tmp_path):
    large = stable_diffusion(256, tmp_path)
    for subject in (EMBEDDED, large):
        plan = run.make_plan(command_line.parse(subject.argv(tmp_path, *step_time.QUIET)))
        assert plan.config.lightning.callbacks.deterministic_loss is None
    assert plan.config.data.params.batch_size == 1
    assert plan.config.data.params.train.params.size == 256
    assert plan.config.model.params.unet_config.params.model_channels == 320


def test_zero_layers_are_initialized():
    zero = torch.nn.Conv2d(4, 4, 1)
    torch.nn.init.zeros_(zero.weight)
    other = torch.nn.Linear(2, 2)
    before = other.weight.detach().clone()
    fill_zeros(torch.nn.Sequential(zero, other))
    assert zero.weight.std() > 0.1
    assert torch.equal(other.weight, before)
