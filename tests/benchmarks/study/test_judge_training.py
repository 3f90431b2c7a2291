"""Training of the attribute judge."""

from __future__ import annotations

import torch
from omegaconf import OmegaConf

from benchmarks.study.judge_training import JudgeTraining
from ldm.data.creatures.dataset import Creatures
from ldm.evaluation.judge import AttributeJudge
from ldm.util import check_config
from tests.evaluation.test_judge import TOWER


def test_training_learns_and_exports(tmp_path) -> None:
    data = Creatures(32, 32, split="classifier", attributes=True, captions=False)
    items = [data[k] for k in range(32)]
    batch = {name: torch.stack([item[name] for item in items]) for name in ("image", "attributes")}
    torch.manual_seed(0)
    model = JudgeTraining(TOWER, roughen=0.5, export_to=str(tmp_path / "judge"))
    logged = {}
    model.log_dict = lambda values, **_: logged.update(values)
    model.learning_rate = 3e-3
    optimizer = model.configure_optimizers()
    losses = []
    for _ in range(30):
        loss = model.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    model.validation_step(batch, 0)
    assert logged["val/background"] > 0.6
    model._trainer = type("Trainer", (), {"is_global_zero": True})()
    model.on_fit_end()
    AttributeJudge.load(tmp_path / "judge")


def test_the_yaml_is_valid() -> None:
    check_config(OmegaConf.load("configs/creatures/judge.yaml").model)
