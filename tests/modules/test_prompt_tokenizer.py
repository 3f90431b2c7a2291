from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.modules.prompt_tokenizer import CutOff, PromptTokenizer, embed_tokens
from ldm.util import UserError
from tests.golden_record import CASES, Golden

STAR, PHOTO_OF_A = 265, [320, 1125, 539, 320]


def content(tokenizer: PromptTokenizer, text: str, placeholders: dict[str, int]) -> list[int]:
    """The ids between start and end."""
    row = tokenizer.encode(text, placeholders)[0].tolist()
    assert row[0] == tokenizer.start_id
    return row[1 : row.index(tokenizer.end_id)]


@pytest.mark.parametrize("case", CASES)
def test_ids_are_the_originals_with_and_without_placeholders(case, request):
    golden = Golden(case)
    tokenizer = request.getfixturevalue("bert" if case.startswith("bert") else "clip").prompt_tokenizer
    ids = {"*": tokenizer.placeholder_id("*", 0)}
    for placeholders in (ids, {}, None):
        assert torch.equal(tokenizer.encode(golden.meta["prompts"], placeholders), golden.io["tokens"])


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a *",
        "a photo of a *,",
        "a photo of a (*)",
        "a photo of a *'s",
        'a photo of a "*".',
        "A Photo OF a*",
    ],
)
def test_a_placeholder_is_found_whatever_stands_beside_it(clip, text):
    ids = content(clip.prompt_tokenizer, text, {"*": STAR})
    assert ids[:4] == PHOTO_OF_A
    assert ids.count(STAR) == 1


def test_the_original_reading_of_a_star_and_comma_is_one_other_token(clip):
    assert clip.prompt_tokenizer.token_ids("*,") == [41895]
    rest = content(clip.prompt_tokenizer, "a photo of a *, dog", {"*": STAR})[5:]
    assert rest == clip.prompt_tokenizer.token_ids(", dog")


@pytest.mark.parametrize(
    "placeholder",
    ["<my-cat>", "my cat", "v1.5", "[x](y)", "émile", "猫", "a.b", "sks_dog", "\\d+", "C++", "🐈"],
)
def test_any_string_may_be_a_placeholder(encoder, placeholder):
    tokenizer = encoder.prompt_tokenizer
    token = tokenizer.placeholder_id(placeholder, 3)
    assert token == tokenizer.vocab_size + 3
    for text in (
        f"a photo of {placeholder}",
        f"{placeholder}, a photo",
        f'a "{placeholder}".',
        f"({placeholder})",
    ):
        ids = content(tokenizer, text, {placeholder: token})
        assert ids.count(token) == 1
        assert len(ids) == 1 + len(tokenizer.token_ids(text.split(placeholder)[0])) + len(
            tokenizer.token_ids(text.split(placeholder)[1])
        )


def test_words_need_a_boundary_and_symbols_do_not(clip):
    tokenizer = clip.prompt_tokenizer
    assert 999_999 not in content(tokenizer, "concatenate cats cat2 _cat", {"cat": 999_999})
    assert content(tokenizer, "cat's cat-like (cat)", {"cat": 999_999}).count(999_999) == 3
    assert content(tokenizer, "a***b", {"*": STAR}).count(STAR) == 3
    assert content(tokenizer, "x<a>y", {"<a>": 999_999}).count(999_999) == 1


def test_the_longest_placeholder_wins(clip):
    ids = {"*": STAR, "**": 999_998, "my cat": 999_997, "cat": 999_996}
    assert content(clip.prompt_tokenizer, "** my cat * cat", ids) == [999_998, 999_997, STAR, 999_996]


def test_case_spaces_and_composition_of_letters_do_not_matter(clip):
    ids = {"My Café": 999_999}
    assert content(clip.prompt_tokenizer, "MY  cafe\u0301", ids) == [999_999]


def test_a_tokenizer_that_minds_case_is_followed():
    class Letters:
        all_special_ids = ()

        def get_vocab(self):
            return {"x": 99}

        def __call__(self, text, **_):
            return {"input_ids": [ord(c) % 90 for c in text]}

    tokenizer = PromptTokenizer(Letters(), max_length=9, vocab_size=100, start_id=97, end_id=98, pad_id=99)
    assert tokenizer.encode("Xx", {}).shape == (1, 9)
    assert 500 in tokenizer.encode("Cat", {"Cat": 500})
    assert 500 not in tokenizer.encode("cat", {"Cat": 500})


def test_only_a_single_token_that_spells_the_placeholder_lends_its_id(clip, bert):
    assert clip.prompt_tokenizer.placeholder_id("*", 7) == STAR
    assert clip.prompt_tokenizer.placeholder_id("dog", 7) == 1929
    # unknown to BERT, so [UNK]; an accent that BERT drops; a special token
    assert bert.prompt_tokenizer.placeholder_id("猫", 7) == 135 + 7
    assert bert.prompt_tokenizer.placeholder_id("á", 7) == 135 + 7
    assert clip.prompt_tokenizer.placeholder_id("<|endoftext|>", 7) == 49408 + 7


def test_words_are_told_from_symbols(clip):
    assert clip.prompt_tokenizer.is_word("dog")
    assert not clip.prompt_tokenizer.is_word("*")
    assert not clip.prompt_tokenizer.is_word("zzyx")


def test_long_prompts_are_cut_before_the_end_token(encoder):
    tokenizer = encoder.prompt_tokenizer
    row = tokenizer.encode("a " * 200)[0]
    assert row.shape == (77,)
    assert row[-1] == tokenizer.end_id
    assert tokenizer.encode(["", "a dog"]).shape == (2, 77)


def test_what_the_limit_cuts_off_is_told(clip):
    tokenizer, ids = clip.prompt_tokenizer, {"*": STAR, "<my-cat>": 49408}
    assert tokenizer.truncated("a photo of *", ids, {"*": 3}) == []
    assert tokenizer.truncated("* " + "a " * 74 + "<my-cat>", ids, {"*": 1}) == [CutOff("<my-cat>", 1, 0, 1)]
    # 1 start + 70 words + 2 placeholders of 3 vectors are 77 places; one word more leaves 2 for the last
    assert tokenizer.truncated("a " * 70 + "* *", ids, {"*": 3}) == []
    assert tokenizer.truncated("a " * 71 + "* *", ids, {"*": 3}) == [CutOff("*", 2, 2, 3)]
    assert tokenizer.truncated("*", ids, {"*": 80}) == [CutOff("*", 1, 76, 80)]


def test_text_beyond_the_limit_is_named(clip):
    tokenizer = clip.prompt_tokenizer
    assert tokenizer.overflow("a dog", {}, {}) == ""
    assert tokenizer.overflow("a " * 75, {}, {}) == ""
    assert tokenizer.overflow("a " * 75 + "photo", {}, {}) == "photo"
    assert tokenizer.overflow("* " + "a " * 73 + "photo", {"*": 265}, {"*": 2}) == ""
    assert tokenizer.overflow("* " + "a " * 73 + "photo", {"*": 265}, {"*": 3}) == "photo"


def test_virtual_ids_are_looked_up_as_something_and_the_manager_sees_them():
    table, seen = nn.Embedding(5, 2), []
    ids = torch.tensor([[1, 5, 900]])
    embedded = embed_tokens(table, ids, lambda i, e: seen.append(i) or e)
    assert torch.equal(embedded, table(torch.tensor([[1, 0, 0]])))
    assert torch.equal(seen[0], ids)


def test_a_tokenizer_of_another_encoder_is_refused(clip):
    with pytest.raises(UserError, match="ids up to 49407 but the text encoder only 100 embeddings"):
        PromptTokenizer(clip.tokenizer, max_length=77, vocab_size=100, start_id=0, end_id=1, pad_id=2)


def test_a_text_is_tokenised_once(clip, monkeypatch):
    tokenizer, read = PromptTokenizer.__new__(PromptTokenizer), []
    tokenizer.__dict__ |= {**clip.prompt_tokenizer.__dict__, "_known": {}}
    tokenizer.tokenizer = lambda text, **options: read.append(text) or clip.tokenizer(text, **options)
    first = tokenizer.token_ids("a dog")
    first.append(0)  # a list of its own
    assert tokenizer.token_ids("a dog") == first[:-1] == clip.prompt_tokenizer.token_ids("a dog")
    assert read == ["a dog"]
    monkeypatch.setattr("ldm.modules.prompt_tokenizer.MOST_KNOWN", 2)
    for text in ("a cat", "a cow", "a dog"):
        tokenizer.token_ids(text)
    assert len(tokenizer._known) == 2 and read == ["a dog", "a cat", "a cow", "a dog"]
