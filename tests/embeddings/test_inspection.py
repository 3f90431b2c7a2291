from __future__ import annotations

import json

import pytest
import torch

from ldm.embeddings import Concept, EmbeddingError, LearnedEmbeddings
from ldm.embeddings.inspection import inspect_concepts, nearest_words, table_of, words_of
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
    [report] = inspect_concepts(found, table, words, 2)
    assert [near[0][0] for near in report.nearest] == ["word3", "word4"]
    assert report.norms == pytest.approx((2 * table[[3, 4]].norm(dim=1)).tolist())
    low, median, high = table.norm(dim=1).quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    spread = report.vocabulary_norms
    assert (spread.low, spread.median, spread.high) == pytest.approx((low, median, high))
    assert (report.vectors, report.width) == (2, 16)
    [report] = inspect_concepts(found, table)
    assert report.nearest[0][0][0] == "#3"


def test_a_table_of_another_width_is_not_compared(table):
    [report] = inspect_concepts(LearnedEmbeddings((Concept("x", vectors()),)), table)
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


@pytest.mark.parametrize(
    "key",
    [
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        "cond_stage_model.transformer.token_emb.weight",
        "text_model.embeddings.token_embedding.weight",
    ],
)
def test_the_table_in_a_checkpoint(key, table):
    assert table_of({"other.weight": torch.zeros(3), key: table.half()}, "x").shape == (20_000, 16)


def test_the_table_of_the_right_width(table):
    state = {"a.token_embedding.weight": table, "b.token_embedding.weight": table[:, :8]}
    assert table_of(state, "x", 8).shape[1] == 8
    with pytest.raises(EmbeddingError, match="'x' has no table"):
        table_of({"model.weight": table}, "x")
