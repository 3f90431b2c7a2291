from __future__ import annotations

import random
import re

import pytest

from ldm.data.creatures.captions import NUMBERS, Description, caption, fix_articles, foil, full_caption
from ldm.data.creatures.world import BODY_COLORS, KINDS, PLAIN_BACKGROUNDS, SCENES, SPECIES, creature, scene


def _told(count: int):
    for seed in range(count):
        c = creature(seed)
        names = Description.of(c, scene(seed, c.color))
        yield names, caption(names, random.Random(seed))


def test_what_a_caption_names_is_true():
    numbers = {word: number for number, word in NUMBERS.items()}
    for names, text in _told(2000):
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
    texts = [text for _, text in _told(2000)]
    assert "a photo of a creature" in texts
    assert len(set(texts)) > 1750
    assert any(text.startswith("a depiction of") for text in texts)
    second = [text for _, text in _told(2000) if re.search(r"\w+ (stripes|spots|belly)\b", text)]
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
