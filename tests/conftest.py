"""Fixtures that several rooms use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Where there is a GPU, only the tests marked for it see it: the others compare bits."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def clip_vit_l(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text encoder of Stable Diffusion v1 without its weights, in place of a download."""
    from benchmarks.subjects import stand_in_encoder

    return stand_in_encoder(tmp_path_factory.mktemp("clip-vit-large-patch14"))
