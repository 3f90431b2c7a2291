"""Saved YAMLs, and the seed of validation."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch

from ldm.training.callbacks.setup import SetupCallback, ValidationSeed
from ldm.util import UserError
from tests.training.runs import fit_line


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
