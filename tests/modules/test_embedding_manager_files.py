"""The manager's own files, written and read."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm.embeddings import Concept, LearnedEmbeddings, merge, read, write
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.personalization import TextEncoder
from ldm.modules.prompt_tokenizer import PromptTokenizer
from ldm.util import UserError
from tests.golden_record import GOLDEN, Golden
from tests.modules.conftest import manager_of

OLD_LAYOUT = GOLDEN / "embeddings_torch_1_10_layout.pt"


@pytest.mark.one_reader
def test_files_of_torch_1_10_are_read(clip):
    manager = manager_of(clip, "*")
    manager.load(OLD_LAYOUT)
    assert manager.placeholders == {"*": 2, "@": 1}
    assert manager.vectors("*").sum().item() == pytest.approx(-0.16457687, abs=1e-6)
    assert manager.vectors("@").sum().item() == pytest.approx(-0.02920608, abs=1e-6)


def test_saved_files_have_the_originals_structure(clip, tmp_path):
    manager = manager_of(clip, "*", "<my-cat>", "my.cat", num_vectors_per_token=[2, 1, 1])
    manager.save(tmp_path / "new" / "e.pt")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["e.pt"]
    with torch.serialization.safe_globals([nn.ParameterDict]):
        data = torch.load(tmp_path / "new" / "e.pt")
    assert list(data) == ["string_to_token", "string_to_param", "textual_inversion"]
    tokens, params = data["string_to_token"], data["string_to_param"]
    assert type(params) is nn.ParameterDict
    assert {string: token.item() for string, token in tokens.items()} == {
        "*": 265,
        "<my-cat>": -1,
        "my.cat": -1,
    }
    assert all(token.dim() == 0 and token.dtype == torch.int64 for token in tokens.values())
    # as the original reads it: one key after the other
    assert all(torch.equal(params[string], manager.vectors(string)) for string in tokens)
    assert isinstance(params["*"], nn.Parameter)


def test_what_a_vector_begins_at_follows_the_count_of_a_file(clip):
    manager = manager_of(clip, "*", initializer_words=["dog"], num_vectors_per_token=2)
    assert manager.embedding_to_coarse_loss() == 0
    manager.load(Golden("clip_three_vectors").embeddings)
    assert manager.initial_embeddings.get_buffer("*").shape == (3, 32)
    assert manager.embedding_to_coarse_loss() > 0


def test_vectors_of_another_width_are_refused(bert):
    manager = manager_of(bert, "*")
    before = manager.export()
    with pytest.raises(UserError, match="'\\*' \\(width 32\\) is for .* text encoder has width 64"):
        manager.load(Golden("clip_one_vector").embeddings)
    assert torch.equal(manager.export()["*"], before["*"])


@pytest.mark.done_or_said
def test_a_file_to_begin_from_brings_its_number_of_vectors(clip, caplog):
    path = Golden("clip_three_vectors").embeddings
    assert manager_of(clip, "*", embedding_manager_ckpt=path).placeholders == {"*": 3}
    assert manager_of(clip, "*", embedding_manager_ckpt=path, num_vectors_per_token=4).placeholders == {
        "*": 3
    }
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "'*' has the 3 vectors of" in warning and "which is 4, is not used" in warning
    assert manager_of(clip, "<cat>", embedding_manager_ckpt="").placeholders == {"<cat>": 1}


def file_of(path, format="original", **words):
    concepts = (Concept(word, torch.full((2, 32), value)) for word, value in words.items())
    return write(LearnedEmbeddings(tuple(concepts)), path, format)


@pytest.mark.one_reader
@pytest.mark.parametrize(
    "format", ["original", "safetensors", "diffusers", "a1111", "a1111-png", "onetrainer"]
)
def test_a_single_word_continues_as_the_placeholder(clip, tmp_path, format):
    path = file_of(tmp_path / "file", format, sculpture=0.5)
    manager = manager_of(clip, "<my cat>", embedding_manager_ckpt=path)
    assert manager.placeholders == {"<my cat>": 2} and manager.loaded
    assert torch.equal(manager.export()["<my cat>"], torch.full((2, 32), 0.5))


@pytest.mark.one_reader
def test_of_several_words_the_placeholders_are_taken_by_name(clip, tmp_path, caplog):
    path = file_of(tmp_path / "e.pt", dog=1.0, cat=2.0, house=3.0)
    with caplog.at_level(logging.INFO):
        manager = manager_of(clip, "cat", "dog", embedding_manager_ckpt=path)
    assert list(manager.placeholders) == ["cat", "dog"]
    assert [float(v[0, 0]) for v in manager.export().values()] == [2.0, 1.0]
    assert "'house' of" in caplog.text and "left out" in caplog.text
    with pytest.raises(UserError, match="holds no 'bird', only 'dog', 'cat', 'house'; give") as caught:
        manager_of(clip, "bird", embedding_manager_ckpt=path)
    assert len(str(caught.value)) < 300


def test_words_of_single_images_that_a_file_lacks_begin_anew(clip, tmp_path):
    path = file_of(tmp_path / "e.pt", sculpture=0.5)
    manager = manager_of(clip, "*", embedding_manager_ckpt=path, per_image_tokens=True)
    assert manager.placeholders["*"] == 2 and len(manager.placeholders) == 23
    manager.save(tmp_path / "all.pt")
    again = manager_of(clip, "*", embedding_manager_ckpt=tmp_path / "all.pt", per_image_tokens=True, seed=5)
    assert all(torch.equal(v, manager.export()[s]) for s, v in again.export().items())


@pytest.mark.one_reader
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "it is a model checkpoint, not an embedding"),
        ([1, 2], "not a known embedding format: it is a list"),
        ({"string_to_param": {}}, "it holds no concept"),
        ({"string_to_param": {"*": torch.zeros(3, 2, 32)}}, r"'\*' has the shape \[3, 2, 32\]"),
        ({"string_to_param": {"*": torch.zeros(2, 32, dtype=torch.long)}}, "type int64"),
        ({"string_to_param": {"*": "text"}}, "does not map words to tensors"),
        ({"string_to_param": {"*": torch.full((1, 32), float("nan"))}}, "NaN or infinity"),
        ({"string_to_param": {"*": torch.zeros(0, 32)}}, r"'\*' has the shape \[0, 32\]"),
        ({"string_to_param": {"*": torch.zeros(76, 32)}}, "has 76 vectors, a prompt has room for 75"),
    ],
)
def test_files_that_hold_something_else_are_refused(clip, tmp_path, content, message):
    torch.save(content, tmp_path / "e.pt")
    with pytest.raises(UserError, match=message):
        manager_of(clip, "*").load(tmp_path / "e.pt")


@pytest.mark.one_reader
def test_plain_dicts_and_single_vectors_are_read(clip, tmp_path):
    torch.save({"string_to_param": {"*": torch.ones(32)}}, tmp_path / "e.pt")
    manager = manager_of(clip, "*")
    manager.load(tmp_path / "e.pt")
    assert manager.placeholders == {"*": 1}


def test_a_state_dict_brings_its_vector_count(clip):
    trained = manager_of(clip, "*", "<cat>", initializer_words=["dog"], num_vectors_per_token=[3, 1])
    fresh = manager_of(clip, "*", "<cat>", initializer_words=["dog"])
    holder = nn.Module()
    holder.embedding_manager = fresh
    state = {f"embedding_manager.{key}": value for key, value in trained.state_dict().items()}
    assert not any(holder.load_state_dict(state))
    assert fresh.placeholders == {"*": 3, "<cat>": 1}
    assert torch.equal(fresh.vectors("*"), trained.vectors("*"))


class TwoTowers(nn.Module, TextEncoder):
    """A text encoder as wide as Stable Diffusion XL's two, without their weights."""

    family, width, widths, max_length = "sdxl", 2048, (768, 1280), 77

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        super().__init__()
        self.prompt_tokenizer = tokenizer
        generator = torch.Generator().manual_seed(0)
        scale = torch.cat([torch.full((768,), 0.01), torch.full((1280,), 0.03)])
        self.table = nn.Embedding.from_pretrained(scale * torch.randn(9, 2048, generator=generator))

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.table


@pytest.fixture
def towers(clip) -> TwoTowers:
    return TwoTowers(clip.prompt_tokenizer)


@pytest.mark.parametrize("name", ["word.pt", "word.safetensors"])
def test_a_word_of_stable_diffusion_xl_has_a_part_for_each_tower(towers, tmp_path, name: str) -> None:
    manager = EmbeddingManager(towers, ["<cat>"], num_vectors_per_token=3)
    manager.save(tmp_path / "word.pt")
    held = read(tmp_path / "word.pt")
    assert [(c.encoder, tuple(c.vectors.shape)) for c in held.concepts] == [
        ("clip_l", (3, 768)),
        ("clip_g", (3, 1280)),
    ]
    path = write(held, tmp_path / name, "original" if name.endswith("pt") else "safetensors")
    if path.suffix == ".safetensors":
        assert sorted(load_file(path)) == [
            "clip_g",
            "clip_l",
        ]  # as kohya, AUTOMATIC1111 and ComfyUI name them
    other = EmbeddingManager(towers, ["<cat>"], seed=5, embedding_manager_ckpt=path)
    assert torch.equal(other.vectors("<cat>"), manager.vectors("<cat>"))


def test_unused_vectors_of_both_towers_come_back(towers, tmp_path) -> None:
    options = {"num_vectors_per_token": 3, "progressive_words": True, "progressive_scale": 10}
    manager = EmbeddingManager(towers, ["<cat>", "<dog>"], **options)
    manager.on_optimizer_step(10)
    manager.save(tmp_path / "words.pt")
    other = EmbeddingManager(towers, ["<cat>", "<dog>"], seed=5, **options)
    other.load(tmp_path / "words.pt")
    assert other.placeholders == {"<cat>": 2, "<dog>": 2}
    for word in ("<cat>", "<dog>"):
        assert torch.equal(other.vectors(word), manager.vectors(word))


@pytest.mark.one_reader
def test_files_of_diffusers_with_a_tower_each_are_joined(towers, tmp_path) -> None:
    manager = EmbeddingManager(towers, ["<cat>"])
    manager.save(tmp_path / "word.pt")
    first = write(read(tmp_path / "word.pt"), tmp_path / "cat.safetensors", "diffusers")
    merged = merge([read(first), read(tmp_path / "cat_2.safetensors")])
    assert torch.equal(merged.vectors_for(2048, "sdxl")["<cat>"], manager.vectors("<cat>"))


def test_a_word_without_vectors_for_one_tower_is_one_line(towers, tmp_path) -> None:
    manager = EmbeddingManager(towers, ["<cat>"])
    for kind, width, message in (
        ("clip_l", 768, r"is for Stable Diffusion 1.x.*without vectors for the second encoder of SDXL"),
        ("clip_g", 1280, r"second encoder of SDXL, without vectors for Stable Diffusion 1.x"),
        ("clip_h", 1024, r"is for Stable Diffusion 2.x; Stable Diffusion XL needs"),
    ):
        concept = Concept("<cat>", torch.ones(1, width), kind)
        write(LearnedEmbeddings((concept,)), tmp_path / "one.safetensors")
        with pytest.raises(UserError, match=message) as error:
            manager.load(tmp_path / "one.safetensors")
        assert len(str(error.value)) < 300
    pair = (Concept("<cat>", torch.ones(1, 768), "clip_l"), Concept("<cat>", torch.ones(2, 1280), "clip_g"))
    write(LearnedEmbeddings(pair), tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="has 1 vectors for the first .* and 2 for the second"):
        manager.load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("kind", ["fixed", "limited"])
def test_the_norm_of_each_tower_is_controlled(towers, kind: str) -> None:
    manager = EmbeddingManager(towers, ["<cat>"], norm_control=kind)
    with torch.no_grad():
        manager.vectors("<cat>").mul_(9)
    manager.on_optimizer_step(1)
    words = towers.table.weight.split((768, 1280), dim=1)
    for part, word in zip(manager.vectors("<cat>").split((768, 1280), dim=1), words, strict=True):
        assert part.norm().item() == pytest.approx(word.norm(dim=1).mean().item(), rel=1e-5)
    (group,) = manager.parameter_groups()
    assert group["parts"] == (768, 1280)
