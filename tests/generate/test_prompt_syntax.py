"""Weighted prompts: what is parsed, and what the encoder makes of it."""

from __future__ import annotations

import pytest
import torch

from ldm.generate.prompt_syntax import Segment, encode, parse
from ldm.util import UserError
from tests.modules.conftest import build_encoder, manager_of


@pytest.fixture(scope="module")
def clip():
    return build_encoder("clip_one_vector").freeze()


def parts(
    clip, prompt: str, syntax: str = "a1111", words: tuple[str, ...] = ()
) -> list[list[tuple[str, float]]]:
    chunks = parse(prompt, clip.prompt_tokenizer, words, syntax)
    return [[(segment.text, round(segment.weight, 4)) for segment in chunk] for chunk in chunks]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a photo", [("a photo", 1)]),
        ("a (photo:1.3) of", [("a ", 1), ("photo", 1.3), (" of", 1)]),
        ("a ((b)) c", [("a ", 1), ("b", 1.21), (" c", 1)]),
        ("[a] b", [("a", 0.9091), (" b", 1)]),
        ("a (b [c] d:2)", [("a ", 1), ("b ", 2), ("c", 1.8182), (" d", 2)]),
        ("(a (b:0.5):2)", [("a ", 2), ("b", 1)]),
        ("a (b: 1.5 )", [("a ", 1), ("b", 1.5)]),
        (r"a \(b\) \[c\]", [("a (b) [c]", 1)]),
        ("a (b", [("a ", 1), ("b", 1.1)]),
        ("a [b", [("a ", 1), ("b", 0.9091)]),
        ("a) :) b]", [("a) :) b]", 1)]),
        ("ratio 2:1, (a:b:1.2)", [("ratio 2:1, ", 1), ("a:b", 1.2)]),
        ("", [("", 1)]),
    ],
)
def test_weights_of_automatic1111(clip, prompt, expected):
    assert parts(clip, prompt) == [expected]


def test_square_brackets_are_text_in_comfyui(clip):
    assert parts(clip, "[a] (b:0.8)", "comfyui") == [[("[a] ", 1), ("b", 0.8)]]


def test_plain_takes_everything_as_text(clip):
    assert parts(clip, "[a|b] (c:1.2) BREAK", "plain") == [[("[a|b] (c:1.2) BREAK", 1)]]


def test_break_begins_a_chunk(clip):
    assert parts(clip, "a BREAK (b:2) BREAK BREAKING") == [
        [("a ", 1)],
        [(" ", 1), ("b", 2), (" ", 1)],
        [(" BREAKING", 1)],
    ]
    assert parts(clip, "BREAK") == [[("", 1)]]


def test_placeholders_are_not_syntax(clip):
    assert parts(clip, "([x]:1.5) [y|z]", words=("[x]", "[y|z]")) == [[("[x]", 1.5), (" [y|z]", 1)]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a [b:c:0.5] d", r"contains '\[b:c:0.5\]': prompt editing"),
        ("[a|b]", r"contains '\[a\|b\]'"),
        ("[a:0.5]", r"contains '\[a:0.5\]'"),
        ("(a:99)", "weight 99 in the prompt is beyond -10 to 10"),
    ],
)
def test_syntax_without_a_meaning_here_is_refused(clip, prompt, message):
    with pytest.raises(UserError, match=message):
        parts(clip, prompt)


# -- the encoder's output --


def chunks(clip, prompt: str, words=(), syntax="a1111"):
    return parse(prompt, clip.prompt_tokenizer, words, syntax)


@pytest.mark.parametrize("syntax", ["a1111", "comfyui"])
def test_without_weights_the_context_is_the_encoders(clip, syntax):
    prompts = ["a photo of a dog", ""]
    encoded = encode(clip, None, [chunks(clip, prompt) for prompt in prompts], syntax)
    assert torch.equal(encoded, torch.cat([clip.encode([prompt]) for prompt in prompts]))


def test_comfyui_scales_the_distance_to_the_empty_prompt(clip):
    plain, empty = clip.encode(["a photo of a dog"])[0], clip.encode([""])[0]
    weighted = encode(clip, None, [chunks(clip, "a (photo:1.5) of a dog")], "comfyui")[0]
    expected = plain.clone()
    expected[2] = empty[2] + 1.5 * (plain[2] - empty[2])  # start, a, photo
    torch.testing.assert_close(weighted, expected)


def test_a1111_scales_the_output_and_restores_its_mean(clip):
    plain = clip.encode(["a photo of a dog"])[0]
    weighted = encode(clip, None, [chunks(clip, "a (photo:1.5) of a dog")])[0]
    scaled = plain.clone()
    scaled[2] *= 1.5
    torch.testing.assert_close(weighted, scaled * plain.mean() / scaled.mean())
    torch.testing.assert_close(weighted.mean(), plain.mean())


def test_all_vectors_of_a_placeholder_have_its_weight(clip):
    manager = manager_of(clip, "*", num_vectors_per_token=3)
    _, weights = clip.prompt_tokenizer.encode_weighted(
        [("a ", 1.0), ("*", 2.0), (" dog", 0.5)], {"*": 265}, {"*": 3}
    )
    assert weights[:8].tolist() == [1, 1, 2, 2, 2, 0.5, 1, 1]
    plain, empty = clip.encode(["a * dog"], manager)[0], clip.encode([""], manager)[0]
    weighted = encode(clip, manager, [chunks(clip, "a (*:2) dog", ["*"])], "comfyui")[0]
    torch.testing.assert_close(weighted[2:5], (empty + 2 * (plain - empty))[2:5])
    torch.testing.assert_close(weighted[5:], plain[5:])


def test_chunks_are_encoded_one_by_one_and_prompts_filled_up(clip):
    encoded = encode(clip, None, [chunks(clip, "a dog BREAK a photo"), [[Segment("a dog")]]])
    assert encoded.shape == (2, 2 * 77, 32)
    assert torch.equal(encoded[0], torch.cat([*clip.encode(["a dog"]), *clip.encode(["a photo"])]))
    assert torch.equal(encoded[1], torch.cat([*clip.encode(["a dog"]), *clip.encode([""])]))
