"""A tiny model with the golden weights as the subject of a benchmark."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from benchmarks.subjects import CONCEPT, TimedModel
from ldm.data.personalized import PersonalizedBase
from tests.golden_record import Golden

GOLDEN = Golden("clip_one_vector")


@pytest.fixture
def tiny_model() -> Any:
    return GOLDEN.model(load_embeddings=False)


@pytest.fixture
def tiny_config() -> Any:
    return OmegaConf.create({"model": GOLDEN.config()})


@pytest.fixture
def images() -> PersonalizedBase:
    return PersonalizedBase(CONCEPT, size=32, repeats=2, seed=1)


@pytest.fixture
def subject(tiny_config: Any, tmp_path: Path) -> TimedModel:
    """As a run of main.py sees it: batches of 2 images of 32 x 32."""
    tiny_config.model.base_learning_rate = 5e-3
    tiny_config.data = {
        "target": "main.DataModuleFromConfig",
        "params": {
            "batch_size": 2,
            "num_workers": 0,
            "train": {
                "target": "ldm.data.personalized.PersonalizedBase",
                "params": {"size": 32, "repeats": 2},
            },
        },
    }
    path = tmp_path / "tiny.yaml"
    OmegaConf.save(tiny_config, path)
    return TimedModel("tiny", str(path), (), lambda config: GOLDEN.model(load_embeddings=False))


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a benchmark sets for the whole process is as it was: log levels, handlers, environment, generators."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "error")
    loggers = [logging.getLogger(name) for name in ("ldm", "pytorch_lightning", "lightning_fabric")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    with torch.random.fork_rng(devices=[]):
        yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
