from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.embeddings import Concept, EmbeddingError, LearnedEmbeddings, read, write, write_all
from ldm.embeddings.method_files import read_words
from tests.embeddings.samples import learned, vectors

pytestmark = pytest.mark.client_files


def test_the_default_format(tmp_path):
    (path,) = write_all(learned(), tmp_path)
    assert path == tmp_path / "cat.safetensors"
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["emb_params"]
        header = file.metadata()
        assert file.get_tensor("emb_params").dtype == torch.float32
    assert header["modelspec.trigger_phrase"] == "<cat>"
    assert header["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert header["modelspec.resolution"] == "512x512"
    assert header["modelspec.date"] == "2026-01-02T03:04:05+00:00"
    own = json.loads(header["textual_inversion"])
    assert own["initializer"] == "cat" and own["steps"] == 500 and own["seed"] == 23
    assert own["images"] == 5 and own["base_model_hash"].startswith("cc6cb27103")


def test_the_default_format_has_a_date_without_metadata(tmp_path):
    embeddings = LearnedEmbeddings((Concept("x", vectors()),))
    with safe_open(write(embeddings, tmp_path / "x"), "pt") as file:
        assert file.metadata()["modelspec.date"].startswith("20")


def test_ldm_bert_is_not_marked_as_sdxl(tmp_path):
    path = write(learned(width=1280), tmp_path / "x.safetensors")
    with safe_open(path, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "latent-diffusion-bert/textual-inversion"


def test_the_trigger_in_our_file_wins_over_the_file_name(tmp_path):
    path = write(learned("<my cat>"), tmp_path / "renamed later.safetensors")
    assert read(path).triggers == ["<my cat>"]


def test_onetrainer_and_diffusers_have_one_key(tmp_path):
    for format, key in (("onetrainer", "emp_params"), ("diffusers", "<cat>")):
        with safe_open(write(learned(), tmp_path / format, format), "pt") as file:
            assert list(file.keys()) == [key]
    with safe_open(write(learned(count=1), tmp_path / "one", "diffusers"), "pt") as file:
        assert file.get_tensor("<cat>").shape == (1, 768)  # as diffusers writes it


@pytest.mark.parametrize("format", ["safetensors", "diffusers", "onetrainer"])
def test_our_safetensors_load_by_the_rules_of_a1111(format, tmp_path):

    content = load_file(write(learned(count=1), tmp_path / "cat.safetensors", format))
    assert len(content) == 1
    [vectors] = content.values()
    assert vectors.shape == (1, 768)


def test_one_dimensional_vectors(tmp_path):
    torch.save({"<cat>": vectors()[0]}, tmp_path / "a.bin")
    assert read(tmp_path / "a.bin").concepts[0].vectors.shape == (1, 768)


def test_an_sdxl_pair_is_recognised(tmp_path):
    path = tmp_path / "cat.safetensors"
    save_file({"clip_l": vectors(), "clip_g": vectors(width=1280)}, path)
    found = read(path)
    assert found.format == "sdxl pair" and found.triggers == ["cat"]
    assert {(c.encoder, c.width) for c in found.concepts} == {("clip_l", 768), ("clip_g", 1280)}
    assert torch.equal(found.vectors_for(768, "clip")["cat"], vectors())
    assert torch.equal(
        read(write(found, tmp_path / "b.safetensors")).vectors_for(1280, "clip_g")["cat"], vectors(width=1280)
    )


def test_output_vectors_of_onetrainer_are_recognised(tmp_path):
    path = tmp_path / "cat.safetensors"
    save_file({"emp_params": vectors(), "emp_params_out": vectors(seed=1)}, path)
    assert [c.part for c in read(path).concepts] == ["", "output"]
    save_file({"clip_l": vectors(), "clip_l_out": vectors(seed=1)}, path)
    assert [c.part for c in read(path).concepts] == ["", "output"]


def test_xti_is_recognised_as_a_method(tmp_path):
    path = tmp_path / "cat.safetensors"
    layers = ["IN01", "IN02", "IN04", "MID", "OUT03", "OUT11"]
    save_file({name: vectors(1) for name in layers}, path)
    with pytest.raises(
        EmbeddingError, match="it holds words of the method 'xti', which are more than vectors; gen"
    ):
        read(path)
    found = read_words(path)
    assert found.method == "xti" and found.words == {"cat": 1} and list(found.tensors) == layers


def test_embeddings_inside_a_lora(tmp_path):
    path = tmp_path / "lora.safetensors"
    weights = {"lora_unet_down.lora_down.weight": torch.zeros(4, 2000, 3)}
    save_file({"<s1>": vectors()[0], **weights}, path, {"<s1>": "<embed>"})
    found = read(path)
    assert found.format == "cloneofsimo" and found.triggers == ["<s1>"]

    bundle = {"bundle_emb.my.cat.clip_l": vectors(), "bundle_emb.my.cat.clip_g": vectors(width=1280)}
    save_file({**bundle, "bundle_emb.dog.string_to_param.*": vectors(seed=1), **weights}, path)
    found = read(path)
    assert found.format == "onetrainer bundle" and found.triggers == ["dog", "my.cat"]
    assert [c.encoder for c in found.only("my.cat").concepts] == ["clip_g", "clip_l"]


def test_several_words_of_cloneofsimo(tmp_path):
    torch.save({"<s1>": vectors()[0], "<s2>": vectors()[1]}, tmp_path / "x.pt")
    assert read(tmp_path / "x.pt").triggers == ["<s1>", "<s2>"]


def test_the_triggers_of_replicate_are_in_a_file_beside_it(tmp_path):
    save_file({"text_encoders_0": vectors(3), "text_encoders_1": vectors(3, 1280)}, tmp_path / "e.pti")
    (tmp_path / "special_params.json").write_text(json.dumps({"TOK": "<s0><s2>", "../x": "<s1>"}))
    found = read(tmp_path / "e.pti")
    assert found.triggers == ["TOK", "../x"]
    assert torch.equal(found.vectors_for(768)["TOK"], vectors(3)[[0, 2]])
    (tmp_path / "special_params.json").write_text('{"TOK": "<s99>"}')
    assert read(tmp_path / "e.pti").triggers == ["e"]


def test_roettgers_sdxl_pair(tmp_path):
    torch.save({"emb": vectors()[0], "emb2": vectors(1, 1280)[0]}, tmp_path / "cat.pt")
    assert [(c.encoder, c.width) for c in read(tmp_path / "cat.pt").concepts] == [
        ("clip_l", 768),
        ("clip_g", 1280),
    ]
