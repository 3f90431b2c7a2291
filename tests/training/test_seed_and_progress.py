"""The run's seed reaches the initial vectors, and a progressive run that ends too early is told."""

from __future__ import annotations

import logging

import pytest
from omegaconf import OmegaConf
from torch import nn

from ldm.training import config, preflight
from tests.golden_record import Golden

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
    model = Golden("clip_one_vector").model()
    model.embedding_manager.progressive_step, model.embedding_manager.progressive_scale = 0, 2000
    with caplog.at_level(logging.WARNING):
        preflight.check_progress(model, steps)
        preflight.check_progress(Golden("clip_one_vector").model(), steps)
        preflight.check_progress(nn.Identity(), steps)
    assert bool(caplog.records) is told
