from __future__ import annotations

import logging
import re

import pytest
import torch
from omegaconf import OmegaConf

import ldm.generate
from ldm.embeddings import Concept, LearnedEmbeddings, Metadata, write
from ldm.embeddings.method_files import CLASSES, MethodFile, check_dial, write_method_file
from ldm.generate import check_mentions, generate, load_embeddings, request
from ldm.generate.request import (
    check_sizes,
    check_start,
    class_words,
    of_own_class,
    read_all,
    takes_vectors,
    warn_unused,
)
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.methods import METHODS, CoRe, NeTI
from ldm.modules.personalization import Personalization
from ldm.util import UserError, stand_in
from tests.golden_record import Golden


@pytest.mark.parametrize(
    "prompt", ["a photo of *", "*, oil painting", "(<cat>) on <Cat>'s bed", "sky", "disk"]
)
def test_prompts_with_loaded_placeholders_pass(prompt: str) -> None:
    check_mentions([prompt], ["*", "<cat>"], ["*", "sk"])


@pytest.mark.parametrize("prompt", ["2*3", "a **bold** dog", "1 < 2 > 0", "5 <3"])
def test_other_uses_of_the_characters_pass(prompt: str) -> None:
    check_mentions([prompt], [])


@pytest.mark.done_or_said
@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a photo of <dog>", "<dog>"),
        ("a photo of *, in oil", r"\*"),
        ("an SK on a beach", "SK"),
        ("sk", "sk"),
    ],
)
def test_a_placeholder_that_is_not_loaded_is_named(prompt: str, name: str) -> None:
    with pytest.raises(UserError, match=rf"mentions '{name}', but no loaded .* \(loaded: '<cat>'\)"):
        check_mentions(["a <cat>", prompt], ["<cat>"], ["sk"])


@pytest.mark.done_or_said
@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"woman01.pt": ["*"]},
            "'woman01.pt' .* its word '*': write it in place of the file's name 'woman01'",
        ),
        ({"other.pt": ["<cat>"]}, "'other.pt' .* its word '<cat>': write it in the prompt"),
        ({"woman01.pt": ["woman01"]}, None),
        ({"a.pt": ["red", "<x>"]}, None),
        ({"five.pt": list("xyzuv")}, "one of its words 'x', 'y', 'z' and 2 more: write it in the prompt"),
        ({"long.pt": ["x" * 200]}, "its word 'xxx"),
    ],
)
def test_a_file_that_no_prompt_uses_is_told_with_the_word_to_write(files, said, caplog) -> None:
    warn_unused({"used.pt": ["photo"], **files}, ["a photo of woman01", "Red"])
    assert len(caplog.records) == (said is not None)
    if said is not None:
        message = caplog.records[0].message
        assert re.search(re.escape(said).replace(r"\ \.\*\ ", ".*"), message) and len(message) < 300


def test_a_prompt_that_is_no_text_is_refused() -> None:
    with pytest.raises(UserError, match="prompt 'a .*' is not valid text: it has bytes that are not UTF-8"):
        check_mentions(["a \udcc3\udca9"], [])


def test_a_loaded_name_may_contain_another() -> None:
    check_mentions(["a <my *> b", "my *"], ["my", "my *", "<my *>"])
    with pytest.raises(UserError, match=r"loaded: none"):
        check_mentions(["a <my *> b"], [])


def held(trigger="<cat>", initializer="cat", *more) -> LearnedEmbeddings:
    concepts = tuple(Concept(one, torch.zeros(1, 8)) for one in (trigger, *more))
    return LearnedEmbeddings(concepts, Metadata(initializer=initializer))


def test_class_words_come_from_the_file_or_the_user() -> None:
    assert class_words([held()], []) == {"<cat>": "cat"}
    assert class_words([held(), held("<dog>", None)], ["a <dog>"], ["<dog>=small dog"]) == {
        "<cat>": "cat",
        "<dog>": "small dog",
    }
    assert class_words([held("<a>", "cat, dog", "<b>")], ["<a>"]) == {"<a>": "cat", "<b>": "dog"}
    assert class_words([held("<a>", "cat, with spots")], ["<a>"]) == {"<a>": "cat, with spots"}
    assert class_words([held()], ["<cat>"], ["pet"]) == "pet" == class_words([], [], ["pet"])
    with pytest.raises(UserError, match="the class word of '<A>' is not in its file"):
        class_words([held("<A>", "cat", "<b>")], ["a cat", "an <a>"])


def test_a_word_that_no_prompt_holds_needs_no_class_word() -> None:
    assert class_words([held("<a>", None), held()], ["a <cat>"]) == {"<cat>": "cat"}


# -- what sources say of classes


@pytest.mark.parametrize("kind", [EmbeddingManager, CoRe, NeTI, Personalization])
def test_the_source_of_a_class_says_what_its_files_are(kind) -> None:
    source = stand_in(f"{kind.__module__}.{kind.__name__}")
    assert source is not kind and source.__name__ == kind.__name__
    assert takes_vectors(source) == takes_vectors(kind) == (kind in (EmbeddingManager, CoRe))
    assert source.method == kind.method


def test_the_methods_of_files_are_those_of_the_classes() -> None:
    assert {name: kind.__name__ for name, kind in METHODS.items()} == CLASSES


def config_of(target: str):
    node = {"target": target, "params": {"placeholder_strings": ["*"]}}
    encoder = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    unet = {"params": {"context_dim": 32}}
    names = {"personalization_config": node, "cond_stage_config": encoder, "unet_config": unet}
    return OmegaConf.create(
        {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": names}}
    )


VECTORS, NETI = "ldm.modules.embedding_manager.EmbeddingManager", "ldm.modules.methods.neti.NeTI"


def test_a_class_of_ones_own_alone_knows_its_files(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_words_of_a_user.py").write_text(
        "from ldm.modules.personalization import Personalization\n"
        "class Own(Personalization): pass\n"
        "class Taking(Personalization):\n    def take(self, vectors, source): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = "own_words_of_a_user.Own"
    assert of_own_class(config_of(own)) == own
    assert of_own_class(config_of("own_words_of_a_user.Taking")) is None
    assert of_own_class(config_of(VECTORS)) is of_own_class(config_of(NETI)) is None
    assert read_all(config_of(own), ["no such file"]) == ["no such file"]
    check_start(config_of(own), "no such file", ["*"], of_yaml=True)


@pytest.fixture
def files(tmp_path):
    def vectors(name: str, width: int = 32, number: float = 1.0):
        held = LearnedEmbeddings((Concept("<a>", torch.full((1, width), number)),))
        return write(held, tmp_path / name)

    method = MethodFile("neti", {"<a>": 1}, {"x": torch.ones(2)}, {"hidden": 32}, {}, "clip", 32)
    nan = write(LearnedEmbeddings((Concept("<a>", torch.ones(1, 32)),)), tmp_path / "nan.safetensors")
    data = nan.read_bytes()
    nan.write_bytes(data[:-4] + b"\0\0\xc0\x7f")
    return {
        "fits": vectors("fits.safetensors"),
        "wide": vectors("wide.safetensors", 768),
        "method": write_method_file(method, tmp_path / "method.safetensors"),
        "nan": nan,
    }


@pytest.mark.parametrize(
    ("target", "file", "words", "message"),
    [
        (VECTORS, "fits", ["*"], None),
        (VECTORS, "fits", ["<a>"], None),
        (VECTORS, "fits", ["<b>", "<c>"], "holds no '<b>', only '<a>'"),
        (VECTORS, "wide", ["*"], r"\(width 768\) is for Stable Diffusion 1.x"),
        (VECTORS, "method", ["*"], "holds words of the method 'neti'"),
        (NETI, "method", ["*"], None),
        (NETI, "method", ["<b>", "<c>"], "holds '<a>', and placeholder_strings are '<b>, <c>'"),
        (NETI, "fits", ["*"], "holds plain vectors, and NeTI needs a file of 'neti'"),
        ("ldm.modules.methods.grid.ProSpect", "method", ["*"], "and ProSpect needs a file of 'prospect'"),
    ],
)
def test_what_training_begins_from_is_checked_without_its_numbers(
    files, target, file, words, message
) -> None:
    if message is None:
        check_start(config_of(target), files[file], words, of_yaml=True)
        return
    with pytest.raises(UserError, match=message):
        check_start(config_of(target), files[file], words, of_yaml=True)


def test_a_model_with_other_sizes_than_its_yaml_is_left_to_the_run(files) -> None:
    check_start(config_of(VECTORS), files["wide"], ["*"], of_yaml=False)


def test_numbers_are_read_before_a_model_is(files) -> None:
    [held] = read_all(config_of(VECTORS), [files["fits"]])
    assert torch.equal(held.concepts[0].vectors, torch.ones(1, 32))
    with pytest.raises(UserError, match="NaN or infinity"):
        read_all(config_of(VECTORS), [files["nan"]])
    with pytest.raises(UserError, match="width 768"):
        read_all(config_of(VECTORS), [files["wide"]])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("strength", 2.5, "the dial strength is 2.5; use 0 to 2"),
        ("bypass", -0.1, "the dial bypass is -0.1; use 0 to 1"),
        ("truncation", 2.5, "the dial truncation is 2.5; use a whole number from 0 to 8"),
        ("truncation", 9, "the dial truncation is 9; use a whole number from 0 to 8"),
    ],
)
def test_dials_have_ranges(name, value, message) -> None:
    for possible in (0, 1):
        check_dial(name, possible, {"hidden": 8})
    with pytest.raises(UserError, match=re.escape(message)):
        check_dial(name, value, {"hidden": 8})


def test_size_conditions_are_those_of_stable_diffusion_xl() -> None:
    plain, xl = config_of(VECTORS), config_of(VECTORS)
    xl.model.target = "ldm.models.diffusion.sdxl.LatentDiffusionXL"
    check_sizes(plain, {})
    check_sizes(xl, {"crop": (0, 0), "target_size": (1, 1)})
    with pytest.raises(UserError, match="--crop is for Stable Diffusion XL"):
        check_sizes(plain, {"crop": (0, 0)})
    with pytest.raises(UserError, match="--target_size is 0 1; use two numbers from 1"):
        check_sizes(xl, {"target_size": (0, 1)})


def test_a_strength_that_changes_nothing_is_said(tmp_path, caplog) -> None:
    model = Golden("clip_one_vector").model()
    held = LearnedEmbeddings((Concept("<a>", torch.ones(1, 32)),))
    load_embeddings(model, held)
    for prompt, said in (("a photo", True), ("a <a>", False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            generate(model, [prompt], steps=1, concept_strength=0.5, class_words={"<a>": "cat"})
        assert (
            "the concept strength 0.5 changes nothing: no prompt contains a learned word" in caplog.messages
        ) == said


class NoPersonalization:
    method = ""


def test_what_is_no_class_of_personalizations_is_left_to_the_model(monkeypatch) -> None:
    def make(*_: object) -> None: ...

    for target in (make, NoPersonalization):
        monkeypatch.setattr(request, "_class_at", lambda _, target=target: target)
        assert of_own_class(config_of("own.thing")) == "own.thing"
        assert read_all(config_of("own.thing"), "a file") == ["a file"]


def test_a_class_of_the_same_name_as_the_base_is_another() -> None:
    named = type("Personalization", (EmbeddingManager,), {"take": lambda self, vectors, source: None})
    assert takes_vectors(named) and not takes_vectors(Personalization)


def test_the_package_has_its_modules_and_can_be_replaced(monkeypatch) -> None:
    assert ldm.generate.session.Session is ldm.generate.Session
    monkeypatch.setattr(ldm.generate, "text_to_image", lambda *prompts, **settings: (prompts, settings))
    assert ldm.generate("a", steps=3) == (("a",), {"steps": 3})
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        ldm.generate.nothing  # noqa: B018
