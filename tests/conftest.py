"""Fixtures that several rooms use."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # One of several processes: threads of torch, which counts processors when it is imported, would only compete.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Where there is a GPU, only the tests marked for it see it: the others compare bits."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["DISABLE_MPS"] = "1"


@pytest.fixture
def apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch and the machine say that there is an Apple GPU, on macOS 14; nothing can be computed there."""
    monkeypatch.delenv("DISABLE_MPS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.backends.mps, "is_macos_or_newer", lambda major, minor: (major, minor) <= (14, 0)
    )
    monkeypatch.setattr(platform, "machine", lambda: "arm64")


@pytest.fixture(scope="session")
def clip_vit_l(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text encoder of Stable Diffusion v1 without its weights, in place of a download."""
    from benchmarks.subjects import stand_in_encoder

    return stand_in_encoder(tmp_path_factory.mktemp("clip-vit-large-patch14"))
