"""`load_embeddings` on the small model of a golden record, and the check of prompts."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.embeddings import FORMATS, Concept, LearnedEmbeddings, read, write
from ldm.embeddings.method_files import read_words
from ldm.generate import Settings, check_mentions, check_prompts, generate, load_embeddings
from ldm.generate.embeddings import encode
from ldm.generate.prompt_syntax import Segment, parse
from ldm.generate.request import check_dials, check_encoder
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.personalization import Personalization, TextEncoder
from ldm.util import UserError
from ldm.words import file_stem
from tests.golden_record import Golden
from tests.modules.conftest import build_encoder, manager_of
from tests.modules.methods.conftest import words
from tests.test_words import ALLOWED


@pytest.fixture(scope="module")
def weights():
    return Golden("clip_one_vector").model(load_embeddings=False)


@pytest.fixture
def model(weights):
    """The model with a manager as its config would make it: "*" is known and not learned."""
    weights.embedding_manager = EmbeddingManager(weights.cond_stage_model, ["*"], seed=1)
    return weights


def written(tmp_path, name: str, kind: str = "original", width: int = 32, **vectors: float):
    """An embedding file with, for each trigger, two rows of one number."""
    concepts = [Concept(trigger, torch.full((2, width), value)) for trigger, value in vectors.items()]
    path = tmp_path / name
    write(LearnedEmbeddings(tuple(concepts)), path, kind)
    return path


@pytest.mark.parametrize("kind", ["original", "safetensors", "diffusers", "a1111", "onetrainer"])
def test_a_file_of_any_format_replaces_the_learned_vectors(model, tmp_path, kind: str) -> None:
    path = written(tmp_path, "cat.pt", kind, **{"<cat>": 0.5})
    names = load_embeddings(model, path)
    assert len(names) == 1 and model.embedding_manager.placeholders == {names[0]: 2}
    torch.testing.assert_close(model.embedding_manager.export()[names[0]], torch.full((2, 32), 0.5))


def test_loaded_vectors_reach_the_prompt(model, tmp_path) -> None:
    load_embeddings(model, written(tmp_path, "cat.pt", **{"<cat>": 0.5}))
    cat = model.get_learned_conditioning(["a photo of <cat>"])
    load_embeddings(model, written(tmp_path, "dog.pt", **{"<cat>": -0.5}))
    assert not torch.allclose(cat, model.get_learned_conditioning(["a photo of <cat>"]))


@pytest.mark.parametrize("word", ALLOWED)
def test_an_allowed_word_works_from_learning_to_the_prompt(model, tmp_path, word: str) -> None:
    """Learned under a word, saved by the manager, converted to any format, loaded, and found in a prompt."""
    learner = EmbeddingManager(model.cond_stage_model, [word], num_vectors_per_token=2)
    learner.save(tmp_path / "learned.pt")
    for kind, format in FORMATS.items():
        path = write(read(tmp_path / "learned.pt"), tmp_path / f"{file_stem(word)}{format.suffix}", kind)
        assert read(path).triggers == [word]
    assert load_embeddings(model, tmp_path / "learned.pt") == [word]
    manager = model.embedding_manager
    manager.load_state_dict(learner.state_dict())  # as a resumed run does
    prompt = f"a photo, {word}, red"
    check_mentions([prompt], [word])
    for syntax in ("a1111", "comfyui"):
        assert [part.text for part in parse(f"a ({prompt}:1.2)", [word], syntax)[0]] == ["a ", prompt]
    ids = model.cond_stage_model.token_ids([prompt], manager)[0].tolist()
    assert ids.count(int(manager.string_to_token_dict[word])) == 1


def test_several_files_are_loaded_together(model, tmp_path) -> None:
    paths = [
        written(tmp_path, "cat.pt", **{"<cat>": 0.5}),
        written(tmp_path, "dog.safetensors", "safetensors", **{"<dog>": 0.1}),
        written(tmp_path, "cat-again.pt", **{"<cat>": 0.5}),
    ]
    assert load_embeddings(model, paths) == ["<cat>", "<dog>"]


def test_two_concepts_of_one_name_are_an_error_with_a_remedy(model, tmp_path) -> None:
    paths = [written(tmp_path, "cat.pt", **{"*": 0.5}), written(tmp_path, "dog.pt", **{"*": 0.1})]
    with pytest.raises(UserError, match=r"'cat.pt' and 'dog.pt' both have the trigger '\*'.*renamed\("):
        load_embeddings(model, paths)


@pytest.mark.parametrize("kind", ["original", "safetensors"])
def test_vectors_of_another_width_are_named(model, tmp_path, kind: str) -> None:
    path = written(tmp_path, "wide.pt", kind, width=768, **{"<cat>": 0.5})
    with pytest.raises(UserError, match=r"wide.pt.*'<cat>'.*768.*width 32") as error:
        load_embeddings(model, path)
    assert "\n" not in str(error.value)


def test_a_file_without_embedding_is_named(model, tmp_path) -> None:
    (tmp_path / "page.pt").write_text("<html>")
    for name in ("page.pt", "missing.pt"):
        with pytest.raises(UserError, match=name):
            load_embeddings(model, tmp_path / name)


def test_a_file_for_another_family_of_text_encoders_is_refused(tmp_path) -> None:
    bert = Golden("bert_one_vector").model(load_embeddings=False)
    assert load_embeddings(bert, written(tmp_path, "cat.pt", width=64, **{"*": 0.5})) == ["*"]
    concept = Concept("<cat>", torch.ones(1, 64), encoder="clip")
    path = write(LearnedEmbeddings((concept,)), tmp_path / "clip.safetensors")
    with pytest.raises(UserError, match="CLIP text encoder"):
        load_embeddings(bert, path)


class WideEncoder(nn.Module, TextEncoder):
    """A text encoder as wide as LDM's BERT, without its weights."""

    family, width = "bert", 1280


class TakingPersonalization(nn.Module, Personalization):
    """A personalization that consists of vectors."""

    def take(self, vectors, source: str) -> None:
        self.string_to_token_dict = dict.fromkeys(vectors, torch.tensor(0))


def test_a_file_of_width_1280_must_name_its_encoder(tmp_path) -> None:
    """1280 is the width of LDM's BERT and of one of SDXL's encoders; most formats do not distinguish them."""
    model = SimpleNamespace(
        embedding_manager=TakingPersonalization(),
        cond_stage_model=WideEncoder(),
        alphas_cumprod=torch.ones(1),
    )
    torch.save({"<cat>": torch.ones(1, 1280)}, tmp_path / "learned_embeds.bin")
    with pytest.raises(UserError, match="SDXL or .*BERT.* does not say which.*--encoder bert"):
        load_embeddings(model, tmp_path / "learned_embeds.bin")
    named = write(read(tmp_path / "learned_embeds.bin").with_encoder("bert"), tmp_path / "named.safetensors")
    assert load_embeddings(model, named) == ["<cat>"]


def test_only_vectors_in_use_come_from_a_progressive_file(model, tmp_path) -> None:
    manager = EmbeddingManager(
        model.cond_stage_model,
        ["*"],
        num_vectors_per_token=3,
        progressive_words=True,
        progressive_scale=10,
    )
    manager.on_optimizer_step(15)
    manager.save(tmp_path / "half.pt")
    load_embeddings(model, [tmp_path / "half.pt", written(tmp_path, "cat.pt", **{"<cat>": 0.5})])
    assert model.embedding_manager.placeholders == {"*": 2, "<cat>": 2}


def test_a_progressive_config_uses_all_vectors_of_a_file(model, tmp_path) -> None:
    encoder = model.cond_stage_model
    model.embedding_manager = EmbeddingManager(
        encoder, ["*"], num_vectors_per_token=3, progressive_words=True
    )
    load_embeddings(model, written(tmp_path, "cat.safetensors", "safetensors", **{"<cat>": 0.5}))
    assert model.embedding_manager.placeholders == {"<cat>": 2}


def test_a_model_without_personalization_gets_a_manager(model, tmp_path) -> None:
    model.embedding_manager = None
    plain = model.get_learned_conditioning(["a <cat>"])
    assert load_embeddings(model, written(tmp_path, "cat.pt", **{"<cat>": 0.5})) == ["<cat>"]
    assert not torch.allclose(plain, model.get_learned_conditioning(["a <cat>"]))


def test_vectors_are_on_the_device_of_the_model(tmp_path) -> None:
    model = Golden("clip_one_vector").model(load_embeddings=False).to("meta")
    model.embedding_manager = None
    load_embeddings(model, written(tmp_path, "cat.pt", **{"<cat>": 0.5}))
    assert model.embedding_manager.vectors("<cat>").is_meta


def test_a_model_without_text_encoder_is_an_error(tmp_path) -> None:
    model = nn.Module()
    model.cond_stage_model = nn.Identity()
    with pytest.raises(UserError, match=r"no text encoder that takes embeddings \(Identity\)"):
        load_embeddings(model, written(tmp_path, "cat.pt", **{"<cat>": 0.5}))


class OwnPersonalization(nn.Module, Personalization):
    """A user's class that does not consist of vectors: it has no `take`."""

    def load(self, path) -> None:
        self.path, self.string_to_token_dict = path, {"<own>": torch.tensor(0)}


def test_a_personalization_without_take_loads_one_file_of_its_own(model) -> None:
    """Whatever is in the file: it is not read here."""
    model.embedding_manager = OwnPersonalization()
    assert load_embeddings(model, "own.bin") == ["<own>"] and model.embedding_manager.path == "own.bin"
    with pytest.raises(UserError, match="OwnPersonalization loads one embedding file, not 2"):
        load_embeddings(model, ["a.bin", "b.bin"])


@pytest.mark.done_or_said
def test_prompts_are_checked_against_the_placeholders_of_the_model(model) -> None:
    check_prompts(model, ["a photo of *"])
    with pytest.raises(UserError, match=r"mentions '\*'"):
        check_prompts(model, ["a photo of *"], learned=[])
    with pytest.raises(UserError, match="mentions '<dog>'"):
        check_prompts(model, ["a photo of <dog>"])
    model.embedding_manager = EmbeddingManager(model.cond_stage_model, ["sculpture"])
    with pytest.raises(UserError, match="mentions 'sculpture'"):
        check_prompts(model, ["a sculpture"], learned=[])


@pytest.fixture
def neti(model, tmp_path):
    """The files of two words of NeTI with eight hidden units, and one of vectors."""
    for name, kept in (("a", 5), ("b", 3)):
        made = words(model, "neti", f"<{name}>")
        made.set_dial("truncation", kept)
        made.save(tmp_path / f"{name}.safetensors")
    written(tmp_path, "cat.pt", **{"<cat>": 0.5})
    return [tmp_path / name for name in ("a.safetensors", "b.safetensors", "cat.pt")]


def own_dials(model) -> list[dict[str, float]]:
    return [part.dials() for part in model.embedding_manager.members]


def test_dials_change_the_image_are_in_its_settings_and_return(model, neti) -> None:
    load_embeddings(model, neti)
    before = own_dials(model)
    assert [one.get("truncation") for one in before] == [5, 3, None]
    prompt, quick = "<a> with <b> and <cat>", {"steps": 1, "scale": 2.0}
    plain = generate(model, prompt, **quick)[0]
    dials = {"truncation": np.int64(8), "bypass": 0.25}
    changed, again = (generate(model, prompt, dials=dials, **quick)[0] for _ in range(2))
    assert own_dials(model) == before, "each word has its own values again"
    assert plain.tobytes() != changed.tobytes() == again.tobytes()
    settings = Settings.from_text(changed.info["parameters"])
    assert settings.labels["Dials"] == "truncation=8, bypass=0.25" and "Dials" not in plain.info["parameters"]
    for name, value in dials.items():
        model.embedding_manager.set_dial(name, value)
    assert generate(model, prompt, **quick)[0].tobytes() == changed.tobytes()


def test_dials_return_after_an_error(model, neti) -> None:
    load_embeddings(model, neti)
    before = own_dials(model)

    def stop(done: int, total: int) -> None:
        assert [one.get("truncation") for one in own_dials(model)] == [1, 1, None]
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        generate(model, "<a>", dials={"truncation": 1}, progress=stop, steps=1)
    with pytest.raises(UserError, match="the dial bypass is 7; use 0 to 1"):
        generate(model, "<a>", dials={"truncation": 1, "bypass": 7}, steps=1)
    assert own_dials(model) == before


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ("truncation=8", "dials is truncation=8; give a dictionary, such as"),
        ({"truncation": "8"}, "the dial truncation is '8'; it must be a number"),
        ({"truncation": True}, "the dial truncation is true; it must be a number"),
        ({"truncation": math.nan}, "the dial truncation is nan; it must be a number"),
        ({"truncation": math.inf}, "the dial truncation is inf"),
        ({"truncation": 10**400}, "the dial truncation is 1000"),
        ({"truncation": None}, "the dial truncation is null"),
        ({"truncation": 9}, "the dial truncation is 9; use a whole number from 0 to 8"),
        ({"size": 1}, "there is no dial 'size' of NeTI; known are: truncation, bypass"),
    ],
)
def test_a_wrong_dial_is_one_line(model, neti, dials, message: str) -> None:
    load_embeddings(model, neti[0])
    with pytest.raises(UserError, match=message) as caught:
        generate(model, "<a>", dials=dials, steps=1)
    assert len(str(caught.value)) < 300
    assert model.embedding_manager.dials() == {"truncation": 5, "bypass": 0.2}


def test_names_of_dials_are_known_from_files(neti) -> None:
    config = OmegaConf.create({"model": {"params": {}}})
    check_dials(config, neti, {"truncation": 1, "bypass": 0})
    check_dials(config, [read_words(neti[0])], {"bypass": 0})
    check_dials(config, [], None)
    for files, known in (
        (neti, "'size' of NeTI; known are: bypass, truncation"),
        (neti[2:], "'size' of plain vectors; there are none, so leave it out"),
        ([], "'size' of plain vectors; there are none"),
    ):
        with pytest.raises(UserError, match=re.escape(f"there is no dial {known}")):
            check_dials(config, files, {"size": 1})


def test_the_encoder_of_every_file_is_checked_without_a_model(neti, tmp_path) -> None:
    def config(width: int):
        target = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
        params = {"cond_stage_config": {"target": target}, "unet_config": {"params": {"context_dim": width}}}
        return OmegaConf.create({"model": {"params": params}})

    check_encoder(config(32), neti)
    for files in (neti[:1], neti[2:], neti):
        with pytest.raises(UserError, match="width 48"):
            check_encoder(config(48), files)
    unknown = replace(read_words(neti[0]), method="other")
    with pytest.raises(UserError, match="is of the method 'other'; known are"):
        check_encoder(config(32), [unknown])


def test_only_an_object_of_a_yaml_knows_its_dials() -> None:
    for target, known in (("ldm.modules.methods.NeTI", True), ("ldm.modules.methods.CoRe", False)):
        config = OmegaConf.create({"model": {"params": {"personalization_config": {"target": target}}}})
        if known:
            check_dials(config, [], {"size": 1})
        else:
            with pytest.raises(UserError, match="no dial 'size'"):
                check_dials(config, [], {"size": 1})


# -- prompts encoded


@pytest.fixture(scope="module")
def clip():
    return build_encoder("clip_one_vector").freeze()


def chunks(prompt: str, words=(), syntax="a1111"):
    return parse(prompt, words, syntax)


@pytest.mark.parametrize("syntax", ["a1111", "comfyui"])
def test_without_weights_the_context_is_the_encoders(clip, syntax):
    prompts = ["a photo of a dog", ""]
    encoded = encode(clip, None, [chunks(prompt) for prompt in prompts], syntax)
    assert torch.equal(encoded, torch.cat([clip.encode([prompt]) for prompt in prompts]))


def test_comfyui_scales_the_distance_to_the_empty_prompt(clip):
    plain, empty = clip.encode(["a photo of a dog"])[0], clip.encode([""])[0]
    weighted = encode(clip, None, [chunks("a (photo:1.5) of a dog")], "comfyui")[0]
    expected = plain.clone()
    expected[2] = empty[2] + 1.5 * (plain[2] - empty[2])  # start, a, photo
    torch.testing.assert_close(weighted, expected)


def test_a1111_scales_the_output_and_restores_its_mean(clip):
    plain = clip.encode(["a photo of a dog"])[0]
    weighted = encode(clip, None, [chunks("a (photo:1.5) of a dog")])[0]
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
    weighted = encode(clip, manager, [chunks("a (*:2) dog", ["*"])], "comfyui")[0]
    torch.testing.assert_close(weighted[2:5], (empty + 2 * (plain - empty))[2:5])
    torch.testing.assert_close(weighted[5:], plain[5:])


def test_chunks_are_encoded_one_by_one_and_prompts_filled_up(clip):
    encoded = encode(clip, None, [chunks("a dog BREAK a photo"), [[Segment("a dog")]]])
    assert encoded.shape == (2, 2 * 77, 32)
    assert torch.equal(encoded[0], torch.cat([*clip.encode(["a dog"]), *clip.encode(["a photo"])]))
    assert torch.equal(encoded[1], torch.cat([*clip.encode(["a dog"]), *clip.encode([""])]))


def published(plain: torch.Tensor, empty: torch.Tensor, weights: torch.Tensor, syntax: str) -> torch.Tensor:
    """What the tools do to the output [L, d] of one chunk, number by number."""
    rows = []
    for row, nothing, weight in zip(plain.tolist(), empty.tolist(), weights.tolist(), strict=True):
        if syntax == "a1111":
            rows.append([value * weight for value in row])
        else:
            rows.append([base + (value - base) * weight for value, base in zip(row, nothing, strict=True)])
    if syntax == "a1111":
        before = sum(map(sum, plain.tolist()))
        after = sum(map(sum, rows))
        rows = [[value * before / after for value in row] for row in rows]
    return torch.tensor(rows)


@pytest.mark.parametrize("syntax", ["a1111", "comfyui"])
def test_chunks_with_weights_and_placeholders_are_those_of_the_tools(clip, syntax):
    manager = manager_of(clip, "<my-cat>", num_vectors_per_token=2)
    prompt = "a (photo:1.4) of (<my-cat>, (red:0.5):1.2) BREAK a photo of (dog)"
    inner = 0.6 if syntax == "a1111" else 0.5
    positions = [  # start, the words, and for the placeholder one position for each vector
        [1, 1, 1.4, 1, 1.2, 1.2, 1.2, inner],
        [1, 1, 1, 1, 1.1],
    ]
    texts = ["a photo of <my-cat>, red", "a photo of dog"]
    expected = []
    for text, weights in zip(texts, positions, strict=True):
        padded = torch.tensor(weights + [1.0] * (77 - len(weights)))
        plain, empty = clip.encode([text], manager)[0], clip.encode([""], manager)[0]
        expected.append(published(plain, empty, padded, syntax))
    encoded = encode(clip, manager, [chunks(prompt, ["<my-cat>"], syntax)], syntax)[0]
    torch.testing.assert_close(encoded, torch.cat(expected), rtol=1e-4, atol=1e-5)
