from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ldm.embeddings import Concept, EmbeddingError, LearnedEmbeddings
from ldm.embeddings.inspection import inspect_concepts, nearest_words, token_ids, token_tables, words_of
from tests.embeddings.samples import GOLDEN, vectors


@pytest.fixture
def table():
    return torch.randn(20_000, 16, generator=torch.Generator().manual_seed(1))


def test_nearest_words_are_those_of_the_largest_cosine(table):
    wanted = torch.stack([3 * table[19_999], -table[5], table[7] + 0.1 * table[8]])
    similar, rows = nearest_words(wanted, table.half(), 3)
    assert rows[0, 0] == 19_999 and similar[0, 0] == pytest.approx(1, abs=1e-3)
    assert rows[1, 0] != 5 and rows[2, 0] == 7
    expected = torch.nn.functional.cosine_similarity(wanted[2:], table).topk(3)
    assert rows[2].tolist() == expected.indices.tolist()
    torch.testing.assert_close(similar[2], expected.values, atol=2e-3, rtol=0)


def test_a_report(table):
    words = [f"word{i}" for i in range(len(table))]
    found = LearnedEmbeddings((Concept("<cat>", table[[3, 4]] * 2),))
    [report] = inspect_concepts(found, {"clip": table}, words, 2)
    assert [near[0][0] for near in report.nearest] == ["word3", "word4"]
    assert report.norms == pytest.approx((2 * table[[3, 4]].norm(dim=1)).tolist())
    low, median, high = table.norm(dim=1).quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    spread = report.vocabulary_norms
    assert (spread.low, spread.median, spread.high) == pytest.approx((low, median, high))
    assert (report.vectors, report.width) == (2, 16)
    [report] = inspect_concepts(found, {"clip": table})
    assert report.nearest[0][0][0] == "#3"


def test_a_table_of_another_width_is_not_compared(table):
    [report] = inspect_concepts(LearnedEmbeddings((Concept("x", vectors()),)), {"clip": table})
    assert report.nearest is None and report.vocabulary_norms is None
    assert report.models.startswith("Stable Diffusion 1")


def test_words_of_clip_and_bert(tmp_path):
    words = words_of(GOLDEN / "clip_tiny")
    assert len(words) == 49408 and words[265] == "*" and words[49407] == "<|endoftext|>-"
    assert words_of(GOLDEN / "bert_tiny_tokenizer")[0] == "[PAD]"
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a</w>": 1, "b": 0}}}))
    assert words_of(tmp_path) == ["b-", "a"]


def test_folders_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(EmbeddingError, match="none of vocab.json, vocab.txt, tokenizer.json"):
        words_of(tmp_path)
    for content in ("[", "[1]", '{"a": "b"}', "{}", '{"a": -5}'):
        (tmp_path / "vocab.json").write_text(content)
        with pytest.raises(EmbeddingError, match="damaged or not a vocabulary"):
            words_of(tmp_path)


def test_each_encoder_is_compared_with_its_own_vocabulary():
    """Also where two have the same width: BERT of LDM, and the second of SDXL."""
    tables = {kind: vectors(100, width, seed) for seed, (kind, width) in enumerate(WIDTHS.items())}
    pair = (Concept("x", tables["clip_l"][[3]]), Concept("x", tables["clip_g"][[4]], "clip_g"))
    reports = inspect_concepts(
        LearnedEmbeddings(pair), {name: tables[name] for name in ("clip_l", "clip_g")}, None, 1
    )
    assert [report.nearest[0][0][0] for report in reports] == ["#3", "#4"]
    bert = LearnedEmbeddings((Concept("x", tables["bert"][[5]], "bert"),))
    assert inspect_concepts(bert, {"clip_g": tables["clip_g"]})[0].nearest is None
    assert inspect_concepts(bert, {"bert": tables["bert"]})[0].nearest[0][0][0] == "#5"
    unknown = LearnedEmbeddings((Concept("x", tables["bert"][[5]]),))
    assert inspect_concepts(unknown, {"bert": tables["bert"]})[0].nearest[0][0][0] == "#5"


def test_token_ids_are_those_of_whole_words():
    assert token_ids(words_of(GOLDEN / "clip_tiny"), ["*", "A", "<my-cat>", "a photo"]) == {
        "*": 265,
        "A": 320,
    }


WIDTHS = {"clip_l": 768, "clip_h": 1024, "clip_g": 1280, "bert": 1280}
LAYOUTS = {
    "SD1": {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": "clip_l"},
    "SD1 of old anime models": {"cond_stage_model.transformer.embeddings.token_embedding.weight": "clip_l"},
    "SD2": {"cond_stage_model.model.token_embedding.weight": "clip_h"},
    "SDXL": {
        "conditioner.embedders.1.model.token_embedding.weight": "clip_g",
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": "clip_l",
    },
    "LDM": {"cond_stage_model.transformer.token_emb.weight": "bert"},
    "an encoder alone": {"text_model.embeddings.token_embedding.weight": "clip_l"},
    "an encoder of transformers 5": {"embeddings.token_embedding.weight": "clip_l"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_token_tables_of_checkpoints(layout, suffix, tmp_path):
    tables = {name: vectors(200, WIDTHS[kind]) for name, kind in LAYOUTS[layout].items()}
    state = {**{name: table.half() for name, table in tables.items()}, "other.weight": torch.zeros(3, 3)}
    path = tmp_path / f"model{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    found = token_tables(path)
    assert list(found) == sorted(LAYOUTS[layout].values(), reverse=True)  # clip_l before clip_g
    for name, kind in LAYOUTS[layout].items():
        assert torch.equal(found[kind], tables[name].half().float())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.fp16.safetensors"])
def test_token_tables_of_diffusers_folders(name, tmp_path):
    folders = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    for folder, kind in folders.items():
        (tmp_path / folder).mkdir()
        state = {"text_model.embeddings.token_embedding.weight": vectors(200, WIDTHS[kind])}
        path = tmp_path / folder / name
        save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    assert {kind: len(table) for kind, table in token_tables(tmp_path).items()} == {
        "clip_l": 200,
        "clip_g": 200,
    }
    assert list(token_tables(tmp_path / "text_encoder_2")) == ["clip_g"]


def test_a_table_that_repeats_a_number_is_refused(tmp_path):
    state = {"text_model.embeddings.token_embedding.weight": torch.zeros(1).expand(2**20, 16384)}
    torch.save(state, tmp_path / "bomb.ckpt")
    with pytest.raises(EmbeddingError, match="bomb.ckpt' is damaged: 'text_model.*' repeats its numbers"):
        token_tables(tmp_path / "bomb.ckpt")


def test_models_without_a_text_encoder_are_refused(tmp_path):
    save_file({"model.diffusion_model.out.2.weight": torch.zeros(4, 4)}, tmp_path / "unet.safetensors")
    (tmp_path / "empty").mkdir()
    for name in ("unet.safetensors", "empty"):
        with pytest.raises(EmbeddingError, match=f"{name}' has no text encoder"):
            token_tables(tmp_path / name)
