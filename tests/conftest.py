"""Fixtures that several rooms use."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTextConfig

from tests.golden_record import GOLDEN


@pytest.fixture(scope="session")
def clip_vit_l(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text encoder of Stable Diffusion v1 without its weights, in place of a download."""
    folder = tmp_path_factory.mktemp("clip-vit-large-patch14")
    CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
    ).save_pretrained(folder)
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / file).write_bytes((GOLDEN / "clip_tiny" / file).read_bytes())
    return folder
