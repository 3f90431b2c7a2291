from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.embeddings import EmbeddingError, Progress, read, write
from tests.embeddings.samples import FOREIGN, GOLDEN, a1111_dict, learned, vectors


@pytest.mark.parametrize("name", FOREIGN)
def test_reads_what_other_tools_write(name, every_file):
    file, _, kind, trigger, encoder = FOREIGN[name]
    found = read(every_file[name])
    [concept] = found.concepts
    assert (found.format, concept.trigger, concept.encoder, concept.part) == (kind, trigger, encoder, "")
    assert found.source == file
    expected = vectors(width=concept.width)
    expected = expected.half().float() if "half" in name else expected
    assert concept.vectors.dtype == torch.float32 and not concept.vectors.requires_grad
    assert torch.equal(concept.vectors, expected)


@pytest.mark.parametrize(
    "case", ["clip_one_vector", "clip_three_vectors", "bert_one_vector", "vq_one_vector"]
)
def test_reads_the_originals_files(case):
    found = read(GOLDEN / case / "embeddings.pt")
    [concept] = found.concepts
    assert found.format == "original" and concept.trigger == "*"
    assert concept.token == (41 if case == "bert_one_vector" else 265)
    assert concept.vectors.shape == {"clip_three_vectors": (3, 32), "bert_one_vector": (1, 64)}.get(
        case, (1, 32)
    )


def test_reads_the_layout_of_old_torch():
    found = read(GOLDEN / "embeddings_torch_1_10_layout.pt")
    assert found.triggers == ["*", "@"]
    star, at = found.concepts
    assert star.vectors.shape == (2, 32) and at.vectors.shape == (1, 32)
    assert star.vectors.sum().item() == pytest.approx(-0.16457687)
    assert at.vectors.sum().item() == pytest.approx(-0.02920608)
    assert (star.token, at.token) == (265, 287)


@pytest.mark.parametrize("plain", [False, True])
def test_a_progressive_run_of_the_original(plain, tmp_path):
    """The file's vectors are divided into those in use and the rest, whatever the number of each word."""
    words = {"a": vectors(4), "b": vectors(1, seed=1), "c": vectors(2, seed=2)}
    content = {
        "string_to_token": {},
        "string_to_param": words if plain else torch.nn.ParameterDict(words),
        "progressive_step": 150,
        "progressive_scale": 100,
    }
    torch.save(content, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert found.progress == Progress(150, 100)
    assert [len(concept.vectors) for concept in found.concepts] == [2, 1, 2]
    assert torch.equal(found.concepts[0].unused, vectors(4)[2:])
    assert [concept.unused for concept in found.concepts[1:]] == [None, None]


@pytest.mark.parametrize(
    ("step", "scale"),
    [
        (-1, 100),
        (True, 100),
        (2**80, 100),
        (150.0, 100),
        ("150", 100),
        (150, 0),
        (150, -1),
        (150, None),
        (None, 9),
    ],
)
def test_progress_that_no_run_can_have_is_ignored(step, scale, tmp_path):
    content = {"string_to_param": {"a": vectors(4)}, "progressive_step": step, "progressive_scale": scale}
    torch.save(content, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert found.progress is None and torch.equal(found.concepts[0].vectors, vectors(4))


def test_the_suffix_does_not_matter(tmp_path, every_file):
    for index, (name, path) in enumerate(every_file.items()):
        renamed = tmp_path / f"file{index}.jpeg"
        renamed.write_bytes(path.read_bytes())
        assert torch.equal(read(renamed).concepts[0].vectors, read(path).concepts[0].vectors), name


def test_a_webp_carries_it_in_the_pixels(every_file):
    assert getattr(Image.open(every_file["webp"]), "text", None) is None
    [concept] = read(every_file["webp"]).concepts
    assert concept.trigger == "<cat>" and torch.equal(concept.vectors, vectors(width=32))


def test_the_pixels_of_a_png_are_enough(tmp_path, every_file):
    image = Image.open(every_file["our a1111-png"])
    image.load()
    image.info.clear()
    image.save(tmp_path / "stripped.png")
    assert torch.equal(read(tmp_path / "stripped.png").concepts[0].vectors, vectors(width=32))


def test_the_name_of_an_a1111_picture_is_the_one_inside(tmp_path, every_file):
    path = tmp_path / "shared on a forum.png"
    path.write_bytes(every_file["our a1111-png"].read_bytes())
    assert read(path).triggers == ["<cat>"]


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


def test_one_dimensional_vectors(tmp_path):
    torch.save({"<cat>": vectors()[0]}, tmp_path / "a.bin")
    assert read(tmp_path / "a.bin").concepts[0].vectors.shape == (1, 768)


def test_an_sdxl_pair_is_named_as_such(tmp_path):
    path = tmp_path / "cat.safetensors"
    save_file({"clip_l": vectors(), "clip_g": vectors(width=1280)}, path)
    found = read(path)
    assert found.format == "sdxl pair" and found.triggers == ["cat"]
    assert {(c.encoder, c.width) for c in found.concepts} == {("clip_l", 768), ("clip_g", 1280)}
    assert torch.equal(found.vectors_for(768, "clip")["cat"], vectors())
    assert torch.equal(
        read(write(found, tmp_path / "b.safetensors")).vectors_for(1280, "clip_g")["cat"], vectors(width=1280)
    )


def test_onetrainers_output_vectors_are_named_as_such(tmp_path):
    path = tmp_path / "cat.safetensors"
    save_file({"emp_params": vectors(), "emp_params_out": vectors(seed=1)}, path)
    assert [c.part for c in read(path).concepts] == ["", "output"]
    save_file({"clip_l": vectors(), "clip_l_out": vectors(seed=1)}, path)
    assert [c.part for c in read(path).concepts] == ["", "output"]


def test_xti_is_named_as_such_and_fits_no_word(tmp_path):
    path = tmp_path / "cat.safetensors"
    layers = ["IN01", "IN02", "IN04", "MID", "OUT03", "OUT11"]
    save_file({name: vectors(1) for name in layers}, path)
    found = read(path)
    assert found.format == "xti" and [c.part for c in found.concepts] == layers
    with pytest.raises(EmbeddingError, match="IN01 vectors, not a word"):
        found.vectors_for(768)


@pytest.mark.parametrize("end", ["-neg", "-uc"])
def test_the_negative_of_a_pair_is_named_as_such(tmp_path, end):
    torch.save(a1111_dict(f"cat{end}"), tmp_path / f"cat{end}.pt")
    [concept] = read(tmp_path / f"cat{end}.pt").concepts
    assert (concept.trigger, concept.part) == (f"cat{end}", "negative")


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


def test_replicates_words_lie_beside_the_file(tmp_path):
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


def test_width_1280_of_the_original_is_bert_and_else_unknown(tmp_path):
    values = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors(1, 1280))})
    torch.save({"string_to_token": {"*": torch.tensor(1008)}, "string_to_param": values}, tmp_path / "a.pt")
    assert read(tmp_path / "a.pt").concepts[0].encoder == "bert"
    save_file({"emb_params": vectors(1, 1280)}, tmp_path / "b.safetensors")
    found = read(tmp_path / "b.safetensors")
    assert found.concepts[0].encoder is None
    with pytest.raises(EmbeddingError, match="BERT.*SDXL|SDXL.*BERT"):
        found.vectors_for(1280, "bert")
    with pytest.raises(EmbeddingError, match="give the encoder"):
        write(found, tmp_path / "c.safetensors")
    assert list(found.with_encoder("bert").vectors_for(1280, "bert")) == ["b"]
    header = {"modelspec.architecture": "stable-diffusion-xl-v1-base/textual-inversion"}
    save_file({"emb_params": vectors(1, 1280)}, tmp_path / "d.safetensors", header)
    assert read(tmp_path / "d.safetensors").concepts[0].encoder == "clip_g"


def test_a_slice_that_drags_its_whole_table_along(tmp_path):
    table = vectors(1000, 64)
    torch.save({"<cat>": table[7:9]}, tmp_path / "big.bin")
    found = read(tmp_path / "big.bin")
    assert torch.equal(found.concepts[0].vectors, table[7:9])
    assert found.concepts[0].vectors.untyped_storage().nbytes() == 2 * 64 * 4


def test_a_model_is_told_from_an_embedding(tmp_path):
    save_file({"model.diffusion_model.out.2.weight": torch.zeros(4, 4)}, tmp_path / "m.safetensors")
    with pytest.raises(EmbeddingError, match="model or LoRA"):
        read(tmp_path / "m.safetensors")
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "m.ckpt")
    with pytest.raises(EmbeddingError, match="model"):
        read(tmp_path / "m.ckpt")
    torch.save({"hash": "12ab", "optimizer_state_dict": {}}, tmp_path / "m.optim")
    with pytest.raises(EmbeddingError, match="optimizer state"):
        read(tmp_path / "m.optim")


def test_ours_says_more_than_the_file_name(tmp_path):
    path = write(learned("<my cat>"), tmp_path / "renamed later.safetensors")
    assert read(path).triggers == ["<my cat>"]
