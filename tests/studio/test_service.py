"""What the page does without the page: plans of runs, images of a set, and words of all kinds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.embeddings import Concept, LearnedEmbeddings, read, write
from ldm.embeddings.method_files import MethodFile, read_method_file, write_method_file
from ldm.studio.service import Service
from ldm.studio.workspace import Workspace
from ldm.util import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def service(tmp_path, monkeypatch) -> Service:
    monkeypatch.chdir(tmp_path)  # as the page's server does
    return Service(Workspace(tmp_path))


def form(**further: str) -> dict[str, str]:
    folder = str(ROOT / "data" / "concepts" / "bobo")
    return {"folder": folder, "placeholder": "<bobo>", "init": "bear", "kind": "object"} | further


def test_a_plan_says_what_the_yamls_decide(service):
    plan = service.plan(form())
    assert plan.command.startswith("python main.py --base ") and "--num_vectors" not in plan.command
    assert (plan.steps, plan.batch, plan.vectors, plan.size) == ("240", "8", 1, 32)
    plan = service.plan(form(recipe="fast", personalization="configs/personalization/core.yaml"))
    assert plan.steps != "240" and plan.vectors == 8
    assert plan.about[0].startswith("Few steps") and plan.about[1].startswith("Eight vectors")
    assert "python" not in "".join(plan.about)
    assert service.plan(form(vectors="3", steps="7")).vectors == 3


def test_the_weight_outside_of_masks(service):
    assert service.plan(form()).mask_weight == "masks are ignored"
    assert "mask_weight" not in service.plan(form(mask_weight="")).command
    plan = service.plan(form(mask_weight="0.25"))
    assert "data.params.train.params.mask_weight=0.25" in plan.command and plan.mask_weight == "0.25"
    masked = "configs/personalization/core_masked.yaml"
    assert service.plan(form(personalization=masked)).mask_weight == "0.1"
    assert service.plan(form(personalization=masked, mask_weight="0", kind="style")).mask_weight == "0"
    for text in ("2", "some", "nan"):
        with pytest.raises(UserError, match="the weight outside of masks is .*; give a number from 0 to 1"):
            service.plan(form(mask_weight=text))


def test_words_of_several_folders_are_refused(service):
    with pytest.raises(UserError, match="one word"):
        service.plan(form(personalization="configs/personalization/two_concepts.yaml"))


def test_thumbnails_are_what_training_sees(service):
    images, found = service.thumbnails(form())
    assert [one.side for one in images] == [32] * 5 and found == []
    assert images[0].address.startswith("data:image/webp;base64,") and "[name]" in images[0].caption
    folder = service.workspace.root / "few"
    folder.mkdir()
    Image.new("RGB", (20, 48), "red").save(folder / "a.png")
    (folder / "a.txt").write_bytes(b"caf\xe9")
    images, found = service.thumbnails(form(folder="few"))
    said = " ".join(one.text for one in found)
    assert images[0].caption == "" and not any(one.bad for one in found)
    assert "enlarged to 32" in said and "as long as wide" in said and "UTF-8" in said
    assert service.thumbnails(form(folder="few", vectors="none"))[0]  # the form says what is wrong with it


def run_with(service: Service, name: str) -> Path:
    checkpoints = service.workspace.logs / name / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints.parent / "configs").mkdir()
    return checkpoints / "embeddings.pt"


def test_words_that_are_more_than_vectors(service):
    content = MethodFile("neti", {"<a>": 1}, {"0.weight": torch.ones(2, 2)}, {"hidden": 2}, {}, "clip", 128)
    path = write_method_file(content, run_with(service, "one"))
    (word,) = service.workspace.words()[0]
    assert word.norm is None and "neti" in word.models
    assert service.method(word.source) == {"method": "neti", "hidden": 2}
    assert "diffusers" not in service.lines(word.source, "<a>")
    with pytest.raises(UserError, match="neti"):
        service.convert([word.source], "safetensors")
    kept = service.keep("one", "last", "<b>")
    again = read_method_file(kept)
    assert again is not None and again.words == {"<b>": 1} and kept.suffix == ".safetensors"
    assert service.keep("one", "last", "").stem == "a" and service.keep("one", "last", "").stem == "a-2"
    assert path.is_file()


def test_vectors_that_are_kept(service):
    concepts = (Concept("<a>", torch.ones(2, 8)), Concept("א", torch.ones(1, 8)))
    write(LearnedEmbeddings(concepts), run_with(service, "two"), "original")
    (word,) = service.workspace.words()[0]  # the words of single images are left out
    assert word.trigger == "<a>" and word.norm == pytest.approx(8**0.5)
    assert service.method(word.source) == {} and "diffusers" in service.lines(word.source, "<a>")
    assert service.keep("two", "last", "").suffix == ".pt"
    with pytest.raises(UserError, match="2 words; a new name fits one"):
        service.keep("two", "last", "<b>")
    pair = (concepts[0], dataclasses.replace(concepts[0], trigger="<a>-neg"))
    write(LearnedEmbeddings(pair), run_with(service, "pair"), "original")
    assert read(service.keep("pair", "last", "<b>")).triggers == ["<b>", "<b>-neg"]
    write(LearnedEmbeddings(concepts[:1]), run_with(service, "three"), "original")
    assert service.keep("three", "last", "<b>").name == "b.safetensors"
