"""Files that are something else, or whose container is damaged, and the metadata of a file."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from ldm.embeddings import EmbeddingError, read
from tests.embeddings.samples import a1111_dict, refused, saved, vectors

pytestmark = pytest.mark.client_files


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>Not found</html>", "web page"),
        (b"\n <html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "Git LFS pointer"),
        (b'{"a": 1}', "JSON"),
        (b"MZ\x90\x00", "not an embedding file"),
        (b"\x80", "damaged"),
        (b"\x80\x02K\x01.", "not of torch.save"),
        (b"PK\x03\x04", "damaged"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (b"RIFF\x00\x00\x00\x00WEBP", "damaged"),
    ],
)
def test_files_of_other_kinds_are_refused(data, match, tmp_path):
    refused(saved(tmp_path / "cat.pt", data), match)


def test_missing_files_and_folders_are_refused(tmp_path):
    refused(tmp_path / "absent.pt", "does not exist")
    refused(tmp_path, "folder")


def test_a_large_file_that_is_cut_off_is_refused(tmp_path):
    with (tmp_path / "model.ckpt").open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(2**32)
    refused(tmp_path / "model.ckpt", "damaged or cut off.*download it again")


def test_a_safetensors_header_larger_than_the_file_is_refused(tmp_path):
    refused(saved(tmp_path / "a", struct.pack("<Q", 2**40) + b'{"a": 1}'), "header should be 1099511627776")
    header = b'{"emb_params":{"dtype":"F32","shape":[1000000,768],"data_offsets":[0,3072000000]}}'
    refused(saved(tmp_path / "b", struct.pack("<Q", len(header)) + header), "header is damaged")


def test_texts_of_a_file_in_error_messages_stay_on_one_line(tmp_path):
    header = b'{"emb_params":{"dtype":"F\\n\\u001b[2J","shape":[1],"data_offsets":[0,4]}}'
    file = saved(tmp_path / "a", struct.pack("<Q", len(header)) + header + bytes(4))
    refused(file, "header is damaged")
    with pytest.raises(EmbeddingError, match="has the type F") as caught:
        read(file, numbers=False)
    assert str(caught.value).isprintable()


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
