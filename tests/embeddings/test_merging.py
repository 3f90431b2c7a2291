from __future__ import annotations

import dataclasses

import pytest
import torch

from ldm.embeddings import (
    Concept,
    EmbeddingError,
    LearnedEmbeddings,
    Metadata,
    Progress,
    merge,
    plan_renames,
    read,
    renames_from,
    split,
    write,
)
from ldm.util import UsageError
from tests.embeddings.samples import learned, progressive, vectors


def part(source: str, *triggers: str, seed: int = 0, **metadata) -> LearnedEmbeddings:
    concepts = tuple(Concept(t, vectors(seed=seed + i)) for i, t in enumerate(triggers))
    return LearnedEmbeddings(concepts, Metadata(**metadata), "original", source)


def test_different_triggers_are_merged_in_order():
    merged = merge([part("a.pt", "x", "y"), part("b.pt", "z", seed=7)])
    assert merged.triggers == ["x", "y", "z"]
    assert torch.equal(merged.only("z").concepts[0].vectors, vectors(seed=7))
    assert merged.source == "a.pt, b.pt"


def test_the_error_for_equal_triggers_names_the_files_and_the_remedy():
    with pytest.raises(EmbeddingError, match=r"'a.pt' and 'b.pt' both have the trigger '\*'.*renamed\("):
        merge([part("a.pt", "*"), part("b.pt", "*", seed=1)])


def test_equal_vectors_are_merged_into_one():
    assert merge([part("a.pt", "*"), part("b.pt", "*")]).triggers == ["*"]


def test_the_last_file_is_renamed():
    merged = merge([part("a.pt", "*"), part("b.pt", "*", seed=1)], {"*": "<dog>"})
    assert merged.triggers == ["*", "<dog>"]
    assert torch.equal(merged.only("<dog>").concepts[0].vectors, vectors(seed=1))


def test_several_names_go_to_several_files():
    parts = [part(f"{i}.pt", "*", seed=i) for i in range(3)]
    assert merge(parts, {"*": ["a", "b"]}).triggers == ["*", "a", "b"]
    assert merge(parts, {"*": ["a", "b", "c"]}).triggers == ["a", "b", "c"]
    with pytest.raises(EmbeddingError, match=r"there is no trigger '<cat>'; there is '\*'"):
        merge(parts, {"<cat>": "a"})
    with pytest.raises(EmbeddingError, match="given 4 times; the trigger is in 3 files"):
        merge(parts, {"*": ["a", "b", "c", "d"]})
    with pytest.raises(EmbeddingError, match="'0.pt' and '2.pt' both have the trigger 'a'"):
        merge(parts, {"*": ["a", "b", "a"]})


def test_automatic_renames_use_the_file_names():
    parts = [part("a.pt", "*"), part("my dog.pt", "*", seed=1), part("my dog.pt", "*", seed=2)]
    assert merge(parts, automatic=True).triggers == ["*", "<my_dog>", "<my_dog-2>"]
    plan = plan_renames(parts, automatic=True)
    assert [(step.index, step.old, step.new) for step in plan] == [
        (1, "*", "<my_dog>"),
        (2, "*", "<my_dog-2>"),
    ]


def test_an_automatic_name_is_never_one_that_exists():
    parts = [part("a.pt", "*"), part("dog.pt", "*", seed=1), part("c.pt", "<dog>", seed=2)]
    assert merge(parts, automatic=True).triggers == ["*", "<dog-2>", "<dog>"]
    with pytest.raises(EmbeddingError, match="both have the trigger '<dog>'"):
        merge(parts, {"*": "<dog>"})


def test_different_text_encoders_are_refused():
    with pytest.raises(EmbeddingError, match="different text encoders"):
        merge([part("a.pt", "x"), dataclasses.replace(learned("y", width=1280), source="b.pt")])
    both = [
        LearnedEmbeddings((Concept(t, vectors(width=1280), kind),))
        for t, kind in (("x", "bert"), ("y", "clip_g"))
    ]
    with pytest.raises(EmbeddingError, match="different text encoders"):
        merge(both)
    merge([both[0], LearnedEmbeddings((Concept("z", vectors(width=1280)),))])


def test_common_metadata_is_kept():
    merged = merge([part("a", "x", steps=5, base_model="m"), part("b", "y", steps=6, base_model="m")])
    assert merged.metadata == Metadata(base_model="m")


def test_the_same_progress_is_kept_with_the_unused_vectors():
    merged = merge([progressive("x"), progressive("x", seed=1), progressive("y", seed=2)], {"x": "z"})
    assert merged.triggers == ["x", "z", "y"] and merged.progress == Progress(150, 100)
    for concept, seed in zip(merged.concepts, range(3), strict=True):
        assert torch.equal(concept.unused, vectors(4, seed=seed)[2:])


def test_different_progress_is_dropped_with_the_unused_vectors():
    for other in (progressive("y", step=250), part("b.pt", "y")):
        merged = merge([progressive("x"), other])
        assert merged.progress is None and [concept.unused for concept in merged.concepts] == [None, None]
        assert torch.equal(merged.concepts[0].vectors, vectors(4)[:2])
        assert torch.equal(merged.concepts[1].vectors, other.concepts[0].vectors)


def test_unused_vectors_are_compared_only_if_they_are_kept():
    first = progressive("x")
    concept = dataclasses.replace(first.concepts[0], unused=vectors(2, seed=9))
    second = dataclasses.replace(first, concepts=(concept,))
    with pytest.raises(EmbeddingError, match="both have the trigger 'x'"):
        merge([first, second])
    assert merge([first, progressive("x")]).triggers == ["x"]
    assert merge([first, second.without_progress()]).triggers == ["x"]


def test_merging_nothing_is_refused():
    with pytest.raises(EmbeddingError, match="at least one"):
        merge([])


def test_split_undoes_merge():
    parts = [part("a.pt", "x"), part("b.pt", "y", seed=1)]
    for one, again in zip(parts, split(merge(parts)), strict=True):
        assert one.triggers == again.triggers
        assert torch.equal(one.concepts[0].vectors, again.concepts[0].vectors)


def test_renames_from_a_command_line():
    assert renames_from(["*=<a>", "*=<b>", "x=y=z"]) == {"*": ["<a>", "<b>"], "x": ["y=z"]}
    assert renames_from(None) == {}
    for text in ("*", "=x", "x="):
        with pytest.raises(UsageError, match="old=new"):
            renames_from([text])


def test_the_two_files_of_an_sdxl_word_become_one():
    first = LearnedEmbeddings((Concept("<cat>", vectors()),), source="cat.safetensors")
    second = LearnedEmbeddings((Concept("<cat>", vectors(width=1280), "clip_g"),), source="cat_2.safetensors")
    for parts in ([first, second], [second, first]):
        merged = merge(parts)
        assert merged.source == ", ".join(part.source for part in parts)
        assert torch.equal(merged.vectors_for(768, "clip_l")["<cat>"], vectors())
        assert torch.equal(merged.vectors_for(1280, "clip_g")["<cat>"], vectors(width=1280))
    dog = [dataclasses.replace(part.renamed({"<cat>": "<dog>"}), source="dog") for part in (first, second)]
    both = merge([first, second, *dog])
    assert [(c.trigger, c.encoder) for c in both.concepts] == [
        ("<cat>", "clip_l"),
        ("<cat>", "clip_g"),
        ("<dog>", "clip_l"),
        ("<dog>", "clip_g"),
    ]
    with pytest.raises(EmbeddingError, match="different text encoders cannot be used together"):
        merge([first, dog[1]])
    with pytest.raises(
        EmbeddingError, match="'cat.safetensors' is for Stable Diffusion 1.*Stable Diffusion 2.x"
    ):
        merge([first, LearnedEmbeddings((Concept("<cat>", vectors(width=1024)),), source="x")])


def test_words_of_sd2_are_merged_and_named():
    parts = [
        LearnedEmbeddings((Concept(name, vectors(width=1024, seed=seed)),)) for seed, name in enumerate("ab")
    ]
    assert [(c.encoder, c.models) for c in merge(parts).concepts] == [("clip_h", "Stable Diffusion 2.x")] * 2


@pytest.mark.parametrize("format", ["original", "safetensors"])
def test_every_word_keeps_the_initializer_of_its_file(format, tmp_path):
    parts = [part("a.pt", "x", "y", initializer="cat, dog"), part("b.pt", "z", seed=7, initializer="bird")]
    merged = merge(parts, {"z": "w"})
    assert merged.initializers == {"x": "cat", "y": "dog", "w": "bird"}
    for word in split(merged):
        write(word, tmp_path / "a", format)
        assert read(tmp_path / "a").initializers == word.initializers


def names_of(parts, **options) -> list[str]:
    """The words of a merge, in the order of the vectors of `part`."""
    merged = merge(parts, **options)
    order = [vectors(seed=seed) for seed in range(20)]
    number = [next(n for n, v in enumerate(order) if torch.equal(v, c.vectors)) for c in merged.concepts]
    return [merged.triggers[number.index(n)] for n in sorted(number)]


def test_the_negative_of_a_word_is_renamed_with_it():
    pair = part("a.pt", "*", "*-neg")
    assert pair.renamed({"*": "<a>"}).triggers == ["<a>", "<a>-neg"]
    assert pair.renamed({"*": "<a>", "*-neg": "<b>"}).triggers == ["<a>", "<b>"]
    assert pair.renamed({"*-neg": "<b>"}).triggers == ["*", "<b>"]
    assert part("a.pt", "-neg", "<x>-neg").renamed({"-neg": "y"}).triggers == ["y", "<x>-neg"]
    assert names_of([pair], rename={"*": "<a>"}) == ["<a>", "<a>-neg"]
    assert names_of([pair], rename={"*": "<a>", "*-neg": "<b>"}) == ["<a>", "<b>"]
    plan = plan_renames([pair], {"*": "<a>"})
    assert [(step.old, step.new) for step in plan] == [("*", "<a>"), ("*-neg", "<a>-neg")]


def test_only_the_negative_of_the_renamed_file_is_renamed():
    first, second = part("a.pt", "*", "*-neg"), part("b.pt", "*", "*-neg", seed=2)
    assert names_of([first, second], rename={"*": "<b>"}) == ["*", "*-neg", "<b>", "<b>-neg"]
    both = {"*": ["<a>", "<b>"]}
    assert names_of([first, second], rename=both) == ["<a>", "<a>-neg", "<b>", "<b>-neg"]
    plain = part("b.pt", "*", seed=2)
    assert names_of([first, plain], rename={"*": "<b>"}) == ["*", "*-neg", "<b>"]
    assert names_of([second, part("c.pt", "*")], rename={"*": "<b>"}) == ["<b>", "*", "*-neg"]


def test_a_negative_in_a_file_of_its_own_is_renamed_with_the_word_before_it():
    files = [part("a.pt", "*"), part("a-neg.pt", "*-neg", seed=1)]
    files += [part("b.pt", "*", seed=2), part("b-neg.pt", "*-neg", seed=3)]
    assert names_of(files, rename={"*": "<b>"}) == ["*", "*-neg", "<b>", "<b>-neg"]
    assert names_of(files[2:], rename={"*": "<b>"}) == ["<b>", "<b>-neg"]
    assert names_of(files[3:1:-1], rename={"*": "<b>"}) == ["<b>", "<b>-neg"]
    assert names_of(files[:3], rename={"*": "<b>"}) == ["*", "*-neg", "<b>"]


def test_an_automatic_name_is_the_negatives_too():
    first = part("a.pt", "*", "*-neg")
    for other in (part("b.pt", "*", "*-neg", seed=2), part("b.pt", "*-neg", "*", seed=2)):
        found = names_of([first, other], automatic=True)
        assert set(found[2:]) == {"<b>", "<b>-neg"} and found[:2] == ["*", "*-neg"]
    files = [first, part("b.pt", "*", seed=2), part("b-neg.pt", "*-neg", seed=3)]
    assert names_of(files, automatic=True) == ["*", "*-neg", "<b>", "<b>-neg"]
    held = part("c.pt", "<b>-neg", seed=5)
    assert names_of([first, files[1], held], automatic=True) == ["*", "*-neg", "<b-2>", "<b>-neg"]


def test_words_whose_negatives_differ_are_different():
    first, other = part("a.pt", "*", "*-neg"), part("b.pt", "*", seed=0)
    negative = dataclasses.replace(other.concepts[0], trigger="*-neg", vectors=vectors(seed=5))
    other = dataclasses.replace(other, concepts=(*other.concepts, negative))
    assert merge([first, other], automatic=True).triggers == ["*", "*-neg", "<b>", "<b>-neg"]
    with pytest.raises(EmbeddingError, match=r"both have the trigger '\*'"):
        merge([first, other])
    with pytest.raises(EmbeddingError, match=r"both have the trigger '<b>-neg'"):
        merge([part("c.pt", "<b>-neg", seed=5), first], {"*": "<b>"})
