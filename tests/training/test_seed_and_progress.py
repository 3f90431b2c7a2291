"""The run's seed reaches the initial vectors, and a progressive run that ends too early is told."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from ldm.training import config, preflight

MANAGER = "ldm.modules.embedding_manager.EmbeddingManager"


def merged(target: str = MANAGER, **params):
    node = {"target": target, "params": params}
    return OmegaConf.create({"seed": 7, "model": {"params": {"personalization_config": node}}})


def test_the_seed_reaches_the_vectors_unless_the_yaml_names_one() -> None:
    for given, expected in (({}, 7), ({"seed": 3}, 3)):
        run = merged(**given)
        config.seed_vectors(run)
        assert run.model.params.personalization_config.params.seed == expected
    other = merged("ldm.modules.encoders.modules.ClassEmbedder")
    config.seed_vectors(other)
    assert "seed" not in other.model.params.personalization_config.params
    config.seed_vectors(OmegaConf.create({"seed": 7, "model": {"params": {}}}))


@pytest.mark.parametrize(
    ("steps", "told"), [(400, True), (2000, True), (6100, False), (None, False), (-1, False)]
)
def test_a_progressive_run_that_ends_before_its_second_vector(steps, told: bool, caplog) -> None:
    manager = SimpleNamespace(progressive_step=0, progressive_scale=2000)
    with caplog.at_level(logging.WARNING):
        preflight.check_progress(SimpleNamespace(embedding_manager=manager), steps)
        preflight.check_progress(
            SimpleNamespace(embedding_manager=SimpleNamespace(progressive_step=None)), steps
        )
        preflight.check_progress(SimpleNamespace(), steps)
    assert bool(caplog.records) is told
