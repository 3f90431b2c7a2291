from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import CLIPTextConfig, CLIPTokenizer

from ldm.data.creatures.captions import Description, caption, full_caption, vocabulary
from ldm.data.creatures.tokenizer import MAX_TOKENS, learn_merges, write_tokenizer
from ldm.data.creatures.world import creature, scene
from ldm.prompts import OBJECT_DUAL_TEMPLATES, OBJECT_TEMPLATES, STYLE_DUAL_TEMPLATES, STYLE_TEMPLATES

SHIPPED = Path(__file__).parents[3] / "models/ldm/creatures/text_encoder"
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "config.json")


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(SHIPPED)


def test_the_shipped_files_are_what_the_command_writes(tmp_path):
    write_tokenizer(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes(), name


def test_every_word_digit_and_mark_is_one_token(tokenizer):
    marks = "0123456789*@&#$%!?.,;:+=<>()[]{}/\\'\"~^_-|"
    for word in (*vocabulary(), *marks, *"abcdefghijklmnopqrstuvwxyz"):
        assert len(tokenizer.tokenize(word)) == 1, word
    template_words = " ".join(
        (*OBJECT_TEMPLATES, *OBJECT_DUAL_TEMPLATES, *STYLE_TEMPLATES, *STYLE_DUAL_TEMPLATES)
    ).replace("{}", "")
    for word in set(template_words.replace("-", " ").split()):
        assert tokenizer.tokenize(word) == [word + "</w>"]


def test_unknown_words_and_letters_are_split_into_known_pieces(tokenizer):
    assert len(tokenizer.tokenize("unicorn")) > 1
    ids = tokenizer("zebra é א").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.eos_token_id) == 1


def test_captions_fit_and_hold_only_known_words(tokenizer):
    known = {word + "</w>" for word in vocabulary()}
    for seed in range(1000):
        c = creature(seed)
        names = Description.of(c, scene(seed, c.color))
        for text in (caption(names, random.Random(seed)), full_caption(names)):
            pieces = tokenizer.tokenize(text)
            assert len(pieces) + 2 <= 30, text
            assert set(pieces) <= known, text


def test_the_end_is_the_highest_id_where_clip_pools():
    config = CLIPTextConfig.from_pretrained(SHIPPED)
    vocabulary = json.loads((SHIPPED / "vocab.json").read_text(encoding="utf-8"))
    assert config.eos_token_id == max(vocabulary.values()) == config.vocab_size - 1
    assert config.bos_token_id == config.eos_token_id - 1 and config.eos_token_id != 2
    assert config.max_position_embeddings == MAX_TOKENS
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def test_merges_are_learnt_from_the_most_frequent_pair():
    assert learn_merges(["ab", "abc", "abab"])[0] == ("a", "b")
    assert learn_merges(["a"]) == []
