from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from ldm.embeddings import read
from tests.embeddings.samples import a1111_dict, vectors


def test_metadata_of_a1111_and_kohya(every_file):
    metadata = read(every_file["a1111 zip"]).metadata
    assert (metadata.steps, metadata.base_model, metadata.base_model_hash) == (
        499,
        "v1-5-pruned",
        "cc6cb27103",
    )
    metadata = read(every_file["kohya"]).metadata
    assert (metadata.steps, metadata.seed, metadata.learning_rate) == (500, 23, 5e-6)
    assert (metadata.base_model, metadata.base_model_hash) == ("v1-5.safetensors", "12345678")
    assert read(every_file["ai-toolkit"]).metadata.tool == "ai-toolkit"


def test_malformed_metadata_is_dropped(tmp_path):
    malformed = {
        "textual_inversion": json.dumps(
            {
                "concepts": [{"trigger": 5, "encoder": ["x"], "part": 3, "token": "y"}],
                "steps": "many",
                "seed": 1e400,
                "tool": "a\x1b[0m",
            }
        )
    }
    save_file({"emb_params": vectors()}, tmp_path / "cat.safetensors", malformed)
    found = read(tmp_path / "cat.safetensors")
    assert found.triggers == ["cat"] and found.concepts[0].encoder == "clip_l"
    assert found.metadata.known() == {"tool": "a [0m"}
    for text in ("[" * 100_000, "{", "5", "null", '{"concepts": {"a": 1}}'):
        save_file(
            {"emb_params": vectors()}, tmp_path / "cat.safetensors", {"textual_inversion": text, "name": text}
        )
        assert torch.equal(read(tmp_path / "cat.safetensors").concepts[0].vectors, vectors())
    long = json.dumps({"steps": 5, "filler": "x" * 2**18})
    save_file({"emb_params": vectors()}, tmp_path / "cat.safetensors", {"textual_inversion": long})
    assert read(tmp_path / "cat.safetensors").metadata.steps is None
    torch.save({**a1111_dict(), "step": float("nan"), "sd_checkpoint": [1]}, tmp_path / "cat.pt")
    assert read(tmp_path / "cat.pt").metadata.steps is None
