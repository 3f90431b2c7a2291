"""Weighted prompts: what is parsed, and what the encoder makes of it."""

from __future__ import annotations

import random
import re

import pytest

from ldm.generate.prompt_syntax import parse
from ldm.util import UserError

pytestmark = pytest.mark.done_or_said


def parts(prompt: str, syntax: str = "a1111", words: tuple[str, ...] = ()) -> list[list[tuple[str, float]]]:
    chunks = parse(prompt, words, syntax)
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
        # The examples in AUTOMATIC1111's own documentation of its parser.
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
            ]
            + [("sky", 1.4641), (".", 1.1)],
        ),
    ],
)
def test_weights_of_automatic1111(prompt, expected):
    assert parts(prompt) == [expected]


def test_square_brackets_are_text_in_comfyui():
    assert parts("[a] (b:0.8)", "comfyui") == [[("[a] ", 1), ("b", 0.8)]]


def test_plain_takes_everything_as_text():
    assert parts("[a|b] (c:1.2) BREAK", "plain") == [[("[a|b] (c:1.2) BREAK", 1)]]


def test_break_begins_a_chunk():
    assert parts("a BREAK (b:2) BREAK BREAKING") == [
        [("a ", 1)],
        [(" ", 1), ("b", 2), (" ", 1)],
        [(" BREAKING", 1)],
    ]
    assert parts("BREAK") == [[("", 1)]]


def test_placeholders_are_not_syntax():
    assert parts("([x]:1.5) [y|z]", words=("[x]", "[y|z]")) == [[("[x]", 1.5), (" [y|z]", 1)]]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("(a:1.3)", [("a", 1.3)]),
        ("((a))", [("a", 1.21)]),
        # A number is the weight itself, whatever stands around it.
        ("((a:1.5):2)", [("a", 1.5)]),
        ("((a:1.5))", [("a", 1.5)]),
        ("(b (a:0.5) c:2)", [("b ", 2), ("a", 0.5), (" c", 2)]),
        ("(b (a) c:2)", [("b ", 2), ("a", 2.2), (" c", 2)]),
        ("(a: 1.5 ) b", [("a", 1.5), (" b", 1)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("(a:1e-1)", [("a", 0.1)]),
        (r"a \(b\) (c\):2)", [("a (b) ", 1), ("c)", 2)]),
        (r"\[a\]", [(r"\[a\]", 1)]),
        ("a (b", [("a (b", 1)]),
        ("a) (b:2)", [("a) ", 1), ("b", 2)]),
        ("[a|b] AND", [("[a|b] AND", 1)]),
        ("", [("", 1)]),
    ],
)
def test_weights_of_comfyui(prompt, expected):
    assert parts(prompt, "comfyui") == [expected]


def by_the_rules(prompt: str, syntax: str) -> list[tuple[str, float]]:
    """The letters of a balanced prompt with their weights, from the brackets around each letter."""
    letters: list[str] = []
    around: list[list[float | str]] = []  # of each letter, the innermost bracket first
    opened: list[int] = []
    for token in re.findall(r":[\d.]+\)|.", prompt):
        if token in "([":
            opened.append(len(letters))
        elif token[-1] in ")]":
            factor = token[1:-1] or {")": 1.1, "]": 1 / 1.1}[token]  # a number stays a text here
            for brackets in around[opened.pop() :]:
                brackets.append(factor)
        else:
            letters.append(token)
            around.append([])
    weights = []
    for brackets in around:
        weight = 1.0
        for factor in brackets:
            weight *= float(factor)
            if syntax == "comfyui" and isinstance(factor, str):
                break  # what stands around a number has no effect
        weights.append(weight)
    return list(zip(letters, weights, strict=True))


def random_prompt(rng: random.Random, syntax: str, depth: int = 0) -> str:
    text = ""
    for _ in range(rng.randint(1, 3)):
        kind = rng.randint(0, 3 if depth < 3 else 0)
        inner = random_prompt(rng, syntax, depth + 1) if kind else rng.choice("abcdef")
        number = f":{rng.choice(('0.5', '1.3', '2'))}" if kind == 2 else ""
        opening, closing = "[]" if kind == 3 and syntax == "a1111" else "()"
        text += f"{opening}{inner}{number}{closing}" if kind else inner
    return text


@pytest.mark.parametrize("syntax", ["a1111", "comfyui"])
def test_random_prompts_are_weighted_by_the_published_rules(syntax):
    rng = random.Random(0)
    for prompt in (random_prompt(rng, syntax) for _ in range(300)):
        (chunk,) = parse(prompt, [], syntax)
        weights = [(c, segment.weight) for segment in chunk for c in segment.text]
        expected = by_the_rules(prompt, syntax)
        assert [c for c, _ in weights] == [c for c, _ in expected], prompt
        assert [w for _, w in weights] == pytest.approx([w for _, w in expected]), prompt


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a [b:c:0.5] d", r"contains '\[b:c:0.5\]': prompt editing"),
        ("[a|b]", r"contains '\[a\|b\]'"),
        ("[a:0.5]", r"contains '\[a:0.5\]'"),
        ("[a::3]", r"contains '\[a::3\]'"),
        ("[a:(b:1.2):0.5]", r"contains '\[a:\(b:1.2\):0.5\]'"),
        ("[[a]:b:0.5]", r"contains '\[\[a\]:b:0.5\]'"),
        ("[(a)|b]", "alternation"),
        ("(x [a|b]:1.2)", "alternation"),
        ("a cat AND a dog", "contains 'AND': prompts of AUTOMATIC1111 joined by AND .*write 'and'"),
        ("a {red|blue} cat", r"contains '{red\|blue}': random choices"),
        ("a __colour__ cat", "contains '__colour__': wildcards"),
        ("(cat)1.3", "weights of InvokeAI are written"),
        ("(a cat)++, red", "weights of InvokeAI"),
        ("a cat++ on a mat", "'cat\\+\\+': weights of InvokeAI"),
        ("a dog--", "weights of InvokeAI"),
        ('("a cat", "a dog").blend(0.5, 0.5)', "prompts of InvokeAI are not combined here"),
        ("a cat.swap(dog)", "prompts of InvokeAI"),
        ("{{masterpiece}}, a cat", "'{masterpiece}': weights of NovelAI"),
        ("a photo of {}", "the slot of templates; write the word"),
        ("tabby cat:0.25 white duck:0.75", "'t:0.25': weights of words without parentheses"),
        ("hot:: dog::2", "'::2': weights of words without parentheses"),
        ("a cat --ar 16:9", "'--ar 16:9': options of Midjourney"),
        ("(a:1,3)", r"contains ':1,3\)': it is not a number; write a weight as \(words:1.3\)"),
        ("(a:1.3.1)", "is not a number"),
        ("(a:99)", "weight 99 in the prompt is beyond -10 to 10"),
    ],
)
def test_syntax_without_a_meaning_here_is_refused(prompt, message):
    with pytest.raises(UserError, match=message) as caught:
        parts(prompt)
    assert len(str(caught.value)) < 300
    if "[" not in prompt and "AND" not in prompt:
        with pytest.raises(UserError, match=message):
            parts(prompt, "comfyui")
    assert parts(prompt, "plain") == [[(prompt, 1)]]


@pytest.mark.parametrize("number", ["nan", "-inf", "1e400", "1e-1"])
def test_numbers_that_automatic1111_takes_for_text_are_refused(number):
    with pytest.raises(UserError, match="it is not a number; write a weight as"):
        parts(f"a (cat:{number}) on a mat")


@pytest.mark.parametrize("prompt", ["(a:nan)", "(a:inf)", "(a:-11)"])
def test_weights_of_comfyui_have_a_range(prompt):
    with pytest.raises(UserError, match="beyond -10 to 10"):
        parts(prompt, "comfyui")


@pytest.mark.parametrize(
    "prompt",
    ["Sand and ANDROID", "(2020) - a portrait", "[a:b]", "a | b", r"\[a\|b\]", "C++ (red)", "a:0.5]"]
    + [
        "at 3:30",
        "a cat - a dog",
        "no. 5 -- red",
        "vitamin B+",
        "a (cat:1.3) dog",
        "16:9 photo",
        "4.5 stars",
        "a.and b",
    ],
)
def test_ordinary_text_is_not_taken_for_syntax_of_others(prompt):
    parts(prompt)


# -- the encoder's output --
