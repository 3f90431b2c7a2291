"""The small model of a golden record, with the words of a method in place of its vector."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ldm.modules.methods import METHODS
from ldm.modules.methods.words import LearnedWords
from tests.golden_record import Golden

# Options that make a method small.
SMALL: dict[str, dict[str, Any]] = {
    "neti": {"features": 16, "hidden": 8},
    "prospect": {"stages": 3},
    "grid": {"stages": 3, "layers": True, "residual_layers": True},
}


@pytest.fixture(scope="session")
def golden_model() -> Any:
    """A latent diffusion model whose weights, and those that begin at zero, are not zero."""
    model = Golden("clip_one_vector").model(load_embeddings=False)
    return model.requires_grad_(False).eval()


@pytest.fixture
def model(golden_model: Any) -> Any:
    before = golden_model.embedding_manager
    yield golden_model.eval()
    golden_model.embedding_manager = before


def words(model: Any, method: str, *strings: str, **options: Any) -> LearnedWords:
    """Words of a method, every parameter at its own value, held by the model."""
    made = METHODS[method](
        model.cond_stage_model,
        placeholder_strings=list(strings) or ["*"],
        initializer_words=["cat"],
        denoiser=model.denoiser_shape,
        **{**SMALL.get(method, {}), **options},
    )
    with torch.no_grad():
        for number, parameter in enumerate(made.embedding_parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.embedding_manager = made
    assert isinstance(made, nn.Module)
    return made.eval()
