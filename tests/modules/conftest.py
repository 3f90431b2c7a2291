"""The two small text encoders of the golden records, with their weights."""

from __future__ import annotations

from typing import Any

import pytest

from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.base import PromptEncoder
from ldm.util import instantiate_from_config, skip_pretrained
from tests.golden_record import Golden, fill


def build_encoder(case: str) -> PromptEncoder:
    with skip_pretrained():
        encoder = instantiate_from_config(Golden(case).config().params.cond_stage_config)
    return fill(encoder, "cond_stage_model.")


def manager_of(encoder: PromptEncoder, *strings: str, **options: Any) -> EmbeddingManager:
    return EmbeddingManager(encoder, placeholder_strings=strings, **options)


@pytest.fixture(scope="session")
def clip() -> PromptEncoder:
    return build_encoder("clip_one_vector").freeze()


@pytest.fixture(scope="session")
def bert() -> PromptEncoder:
    return build_encoder("bert_one_vector").freeze()


@pytest.fixture(params=["clip", "bert"])
def encoder(request: pytest.FixtureRequest) -> PromptEncoder:
    return request.getfixturevalue(request.param)
