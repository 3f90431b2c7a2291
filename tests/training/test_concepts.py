"""Learned words in Python: `ldm.load`, `ldm.load_all`, `ldm.interpolate`, and what a `Concept` does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from tests.embeddings.samples import learned as vectors_of


@pytest.fixture
def learned(tmp_path, monkeypatch) -> ldm.Concept:
    """A word of a small text encoder; the working directory is the test's own."""
    monkeypatch.chdir(tmp_path)
    return ldm.Concept(vectors_of("<toy>", width=32))


def test_interpolation(learned):
    other = learned.renamed("<other>")
    half = ldm.interpolate(learned, other, 0.5, "<half>")
    assert half.word == "<half>" and torch.allclose(half.vectors, learned.vectors)
    wide = ldm.Concept(learned.embeddings.renamed({"<toy>": "a"}))
    object.__setattr__(wide.embeddings.concepts[0], "vectors", torch.zeros(3, 32))
    with pytest.raises(ldm.UserError, match="cannot be interpolated"):
        ldm.interpolate(learned, wide, 0.5)
    for share in (float("nan"), "a", None):
        with pytest.raises(ldm.UserError, match="share is .*; give a number"):
            ldm.interpolate(learned, other, share)
    assert torch.equal(ldm.interpolate(learned, other, np.float32(1)).vectors, other.vectors)
    with pytest.raises(ldm.UserError, match="int is no concept"):
        ldm.interpolate(learned, 3, 0.5)


def test_a_repository_on_the_hub(monkeypatch, tmp_path, learned):
    repository, fetched = tmp_path / "repository", []
    learned.save(repository / "learned_embeds.safetensors")
    (repository / "learned_embeds-steps-500.safetensors").write_bytes(b"unfinished")
    (repository / "token_identifier.txt").write_text("<cat>")

    def download(name, local_files_only=False, allow_patterns=None):
        if local_files_only:
            raise OSError("nothing is here")
        fetched.append(sorted(allow_patterns))
        return repository

    def listed(api, name, files_metadata):
        entries = {path.name: path.stat().st_size for path in repository.iterdir()} | {
            "unet.safetensors": 2**31
        }
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in entries.items()])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", listed)
    assert ldm.load("someone/cat").word == "<toy>"
    assert "unet.safetensors" not in fetched[0] and "token_identifier.txt" in fetched[0]
    assert ldm.load("someone/cat/learned_embeds.safetensors").word == "<toy>"
    with pytest.raises(ldm.UserError, match="holds no file 'other.bin'"):
        ldm.load("someone/cat/other.bin")

    def offline(api, name, files_metadata):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    with pytest.raises(ldm.UserError, match="nor readable from the Hugging Face hub"):
        ldm.load("someone/cat")


def test_a_repository_of_which_one_file_was_fetched_before(monkeypatch, tmp_path, learned):
    repository = tmp_path / "repository"
    learned.save(repository / "a.safetensors")

    def download(name, local_files_only=False, allow_patterns=None):
        if not local_files_only:
            learned.renamed("<other>").save(repository / "b.safetensors")
        return repository

    def listed(api, name, files_metadata):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f"{n}.safetensors", size=9) for n in "ab"])

    def offline(api, name, files_metadata):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    assert [concept.word for concept in ldm.load_all("someone/words")] == ["<toy>"], "what is there"
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", listed)
    assert [concept.word for concept in ldm.load_all("someone/words")] == ["<toy>", "<other>"]


def test_folders_hold_several_words(learned, tmp_path):
    other = learned.renamed("<other>")
    for concept in (learned, other):
        concept.save(tmp_path)
    assert [concept.word for concept in ldm.load_all(tmp_path)] == ["<other>", "<toy>"]
    file = tmp_path / "toy.safetensors"
    assert [concept.word for concept in ldm.load_all(iter([tmp_path, file]))][2:] == ["<toy>"]
    with pytest.raises(ldm.UserError, match="holds 2 embedding files"):
        ldm.load(tmp_path)


def test_a_folder_of_runs_is_named_for_what_it_is(learned, tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / "logs" / name / "checkpoints").mkdir(parents=True)
    with pytest.raises(ldm.UserError, match="'logs' holds no learned word; name one of its 2 run folders"):
        ldm.load("logs")
    with pytest.raises(ldm.UserError, match="holds no learned word yet"):
        ldm.load("logs/a")


@pytest.mark.refused_first
@pytest.mark.parametrize("source", [None, 3, "", b"x", object(), ["x.pt"], {}])
def test_what_is_no_source_is_refused(source) -> None:
    with pytest.raises(ldm.UserError, match="the source of a word is .*; name an embedding file"):
        ldm.load(source)
    if not isinstance(source, (list, dict)):
        with pytest.raises(ldm.UserError, match="the source of a word is"):
            ldm.load_all(source)
    assert ldm.load_all([]) == []


@pytest.mark.refused_first
@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "a prompt in place of a path " * 20])
def test_a_text_that_is_no_path_is_one_line(source, tmp_path) -> None:
    for call in (ldm.load, lambda text: ldm.invert(text, logdir=tmp_path)):
        with pytest.raises(ldm.UserError) as error:
            call(source)
        assert len(str(error.value)) < 300


def test_the_format_of_a_saved_file_is_that_of_its_suffix(learned) -> None:
    for name, format in (
        ("a.safetensors", "safetensors"),
        ("a.pt", "original"),
        ("a.png", "a1111-png"),
        ("a", "safetensors"),
    ):
        assert ldm.load(learned.save(name)).embeddings.format == format
    assert ldm.load(learned.save("a.pt", "a1111")).embeddings.format == "a1111"
    assert learned.save("new/") == Path("new/toy.safetensors")
    assert learned.save() == Path("toy.safetensors")


def test_several_words_are_saved_in_the_format_that_holds_them(learned) -> None:
    both = ldm.Concept(
        ldm.load_all([learned.save("a.pt"), learned.renamed("<x>").save("b.pt")])[0].embeddings
    )
    pair = ldm.Concept(
        type(both.embeddings)((*both.embeddings.concepts, *learned.renamed("<toy>-neg").embeddings.concepts))
    )
    assert pair.words == ["<toy>", "<toy>-neg"] and pair.save() == Path("toy.pt")
    assert ldm.load("toy.pt").words == pair.words
    # The negative word joins the negative prompts of its word alone.
    assert pair.renamed("<y>").words == ["<y>", "<y>-neg"]
    with pytest.raises(ldm.UserError, match="holds one trigger"):
        pair.save("both.safetensors")


@pytest.mark.refused_first
def test_what_cannot_be_saved_is_said(learned, tmp_path) -> None:
    for arguments, said in (
        ((3,), "path is 3"),
        (("x.pt", 3), "format is 3"),
        (("x.pt", "webp"), "unknown embedding format 'webp'"),
        (("a\0b.pt",), "null character"),
        (("x.png", None, 3), "int is no type of images"),
        (("x.png", None, np.zeros((8, 8, 3))), "ndarray is no type of images"),
        (("x.png", None, "absent.png"), "image not found"),
    ):
        with pytest.raises(ldm.UserError, match=said):
            learned.save(*arguments)
    assert not any(tmp_path.iterdir())
    learned.save("x.png", preview=Image.new("LA", (300, 200)))
    with pytest.raises(ldm.UserError, match="int holds no learned word"):
        ldm.Concept(3)
    with pytest.raises(ldm.UserError, match="3 is not a text"):
        learned.renamed(3)
