from __future__ import annotations

import random
import re

import pytest

from ldm.data.creatures import captions
from ldm.data.creatures.captions import (
    NUMBERS,
    Description,
    caption,
    fix_articles,
    foil,
    full_caption,
    vocabulary,
)
from ldm.data.creatures.world import (
    BODY_COLORS,
    KINDS,
    NAMES,
    PLAIN_BACKGROUNDS,
    SCENES,
    SPECIES,
    SPLITS,
    creature,
    individual,
    scene,
)


def _captions(count: int):
    for seed in range(count):
        c = creature(seed)
        names = Description.of(c, scene(seed, c.color))
        yield names, caption(names, random.Random(seed))


def test_what_a_caption_names_is_true():
    numbers = {word: number for number, word in NUMBERS.items()}
    for names, text in _captions(2000):
        kind = [k for k in KINDS if re.search(rf"\b{k}\b", text)]
        assert kind in ([names.kind], ["creature"], []), text
        for color in re.findall(rf"\b({'|'.join(BODY_COLORS)}) (?:{'|'.join(KINDS)})\b", text):
            assert color == names.color, text
        for color, pattern in re.findall(r"(\w+) (stripes|spots|belly)\b", text):
            assert (color, pattern) == (names.second, names.pattern), text
        for word, pattern in (("striped", "stripes"), ("spotted", "spots"), ("plain", "plain")):
            assert word not in text or names.pattern == pattern, text
        for word in re.findall(r"(\w+) eyes?\b", text):
            assert numbers[word] == names.eyes, text
        for word in re.findall(r"(\w+) ears\b", text):
            assert word.replace("no", "none") == names.ears, text
        assert "horns" not in text or names.ears == "horns", text
        for word in re.findall(r"(\w+) background", text):
            assert word == names.background and word in PLAIN_BACKGROUNDS, text
        for word in SCENES:
            assert not re.search(rf"\b{word}\b", text) or names.background == word, text
        for word in ("sketch", "neon", "mosaic"):
            assert word not in text or names.style == word, text


def test_captions_vary_and_cover_the_short_and_the_long():
    texts = [text for _, text in _captions(2000)]
    assert "a photo of a creature" in texts
    assert len(set(texts)) > 1750
    assert any(text.startswith("a depiction of") for text in texts)
    second = [text for _, text in _captions(2000) if re.search(r"\w+ (stripes|spots|belly)\b", text)]
    assert len(second) > 600


@pytest.mark.parametrize("species", SPECIES)
def test_the_full_caption_names_everything(species):
    c = creature(5, kind=species, pattern="stripes", ears="long", eyes=3)
    text = full_caption(Description.of(c, scene(5, c.color, background="snow", style="photo")))
    for word in (c.color, species, f"{c.second} stripes", "three eyes", "long ears", "in the snow"):
        assert word in text


def test_articles():
    assert (
        fix_articles("a orange fox and a red one on an blue one")
        == "an orange fox and a red one on a blue one"
    )


def test_a_foil_differs_in_one_attribute_and_is_false():
    differing = 0
    for seed in range(500):
        c = creature(seed)
        names = Description.of(c, scene(seed, c.color))
        text, wrong = caption(names, random.Random(f"s {seed}")), foil(names, f"s {seed}")
        assert wrong == foil(names, f"s {seed}")
        differing += text != wrong
        assert "creature" in text or "creature" not in wrong, (text, wrong)
        patterned = re.compile("stripe|spot|belly")
        assert not patterned.search(text) or patterned.search(wrong), (text, wrong)
        if text != wrong and "style" not in text and "," not in text:
            changed = set(text.split()) ^ set(wrong.split())
            assert 1 <= len(changed - {"a", "an", "the", "on", "in", "at", "front", "of", "under"}) <= 5, (
                text,
                wrong,
            )
    assert differing > 450


def test_a_caption_with_a_name_names_no_attribute() -> None:
    who, by_name, articles = individual(3), 0, 0
    for seed in range(600):
        names = Description.of(who, scene(seed, who.color), NAMES[3])
        text = caption(names, random.Random(seed))
        if NAMES[3] not in text:
            continue
        by_name += 1
        articles += f"a {NAMES[3]}" in text
        rest = re.sub(r"(on a|in front of a)n? \w+ background| with a \w+ \w+$", "", text)
        for word in (*BODY_COLORS, *KINDS, "eye", "eyes", "ears", "horns", "striped", "spotted"):
            assert not re.search(rf"\b{word}\b", rest), text
    assert 300 < by_name < 450 and 0.2 < articles / by_name < 0.7


def test_names_of_individuals_are_no_other_words(monkeypatch) -> None:
    assert len(set(NAMES)) == len(NAMES) == len(SPLITS["individuals"]) == 512
    assert set(NAMES) < set(vocabulary())
    monkeypatch.setattr(captions, "NAMES", ())
    assert not set(NAMES) & set(vocabulary())
    assert NAMES[:3] == ("tufa", "vimi", "bome"), "the shipped tokenizer has them as tokens"
