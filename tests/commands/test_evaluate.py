"""The command line of scripts/evaluate_model.py, on the model of a golden record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm import base_models
from ldm.commands import evaluate
from ldm.data.creatures.world import SPLITS
from ldm.embeddings import Concept, LearnedEmbeddings, write
from ldm.evaluation.judge import AttributeJudge
from ldm.images import open_image
from scripts.make_concepts import creature_concept, style_concept, write_concept
from tests.evaluation.stand_ins import FixedJudge, use_few_renderings
from tests.golden_record import Golden
from tests.modules.methods.conftest import words

QUICK = ["--samples", "2", "--ddim_steps", "1", "--scale", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, three concepts, and an embedding for each."""
    folder = tmp_path_factory.mktemp("evaluated")
    Golden("clip_one_vector").write_model(folder)
    write_concept(folder / "concepts" / "zuzu", *creature_concept(43), 32)
    write_concept(folder / "concepts" / "draft", *style_concept(0, "blueprint"), 32)
    (folder / "concepts" / "mine").mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "concepts" / "mine" / "cat.png")
    for name in ("zuzu", "draft", "mine"):
        concept = Concept(f"<{name}>", torch.full((1, 32), 0.1))
        write(LearnedEmbeddings((concept,)), folder / "learned" / f"{name}.pt", "original")
    return folder


@pytest.fixture
def run(folder, tmp_path, capsys):
    """Run the command; returns its exit code, its output, and the JSON that it wrote."""

    def run(*arguments: str | Path):
        base = ["--ckpt_path", str(folder / "model.ckpt"), "--outdir", str(tmp_path / "out"), *QUICK]
        code = evaluate.main([*base, *map(str, arguments)])
        written = tmp_path / "out" / "evaluation.json"
        return code, capsys.readouterr(), json.loads(written.read_text()) if written.is_file() else None

    return run


def test_concepts_of_a_folder_are_measured_by_their_descriptions(run, folder, tmp_path, monkeypatch) -> None:
    use_few_renderings(monkeypatch)
    judge = FixedJudge(SPLITS["concepts"][43])
    monkeypatch.setattr(AttributeJudge, "load", lambda folder: judge)
    arguments = [
        "--concept",
        folder / "concepts",
        "--embedding_path",
        folder / "learned",
        "--judge",
        tmp_path,
    ]
    code, output, found = run(*arguments)
    assert code == 0, output.err
    assert output.out.split() == [
        str(tmp_path / "out" / f"evaluation.{kind}") for kind in ("json", "md", "png")
    ]
    concepts = found["concepts"]
    assert {name: one["truth"] for name, one in concepts.items()} == {
        "draft": "style",
        "mine": "none",
        "zuzu": "creature",
    }
    zuzu = concepts["zuzu"]["prompts"]
    assert len(zuzu) == 11 and zuzu["a photo of <zuzu>"]["attributes"] == 1
    assert concepts["zuzu"]["references"]["redrawn"]["identity"] == pytest.approx(1, abs=1e-3)
    assert set(concepts["mine"]["prompts"]["a photo of <mine>"]) == {"palette_overlap", "features"}
    assert found["settings"]["steps"] == 1 and len(found["settings"]["model_sha256"]) == 64
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert "without concept.json" in text and "no CLIP-I" in text and f"judge: {tmp_path}" in text
    assert open_image(tmp_path / "out" / "evaluation.png").width >= 5 * 96


@pytest.mark.parametrize("side, expected", [(8, 32), (64, 128)])
def test_renderings_have_the_models_size_up_to_128_pixels(side, expected, monkeypatch) -> None:
    model = Golden("clip_one_vector").model()
    model.image_size = side
    monkeypatch.setattr(base_models, "read_config", lambda *arguments: None)
    monkeypatch.setattr(evaluate, "load_latent_diffusion", lambda *arguments: model)
    assert evaluate.load_model("model.ckpt", None) == (model, expected)


def test_words_instead_of_an_embedding(run, folder, tmp_path) -> None:
    arguments = ["--concept", folder / "concepts" / "mine", "--word", "a cat", "--prompt", "{} at night"]
    code, output, found = run(*arguments, "--judge", "none")
    assert code == 0, output.err
    assert list(found["concepts"]["mine"]["prompts"]) == ["a photo of a cat", "a cat at night"]
    assert found["concepts"]["mine"]["embedding"] is None


def test_a_dial_is_set_for_every_concept_and_stated(run, folder, tmp_path) -> None:
    model = Golden("clip_one_vector").model()
    found = {}
    for name in ("mine", "other"):
        shutil.copytree(folder / "concepts" / "mine", tmp_path / "concepts" / name)
        words(model, "neti", f"<{name}>").save(tmp_path / "learned" / f"{name}.safetensors")
    for dials in ((), ("--dial", "truncation=0", "--dial", "bypass=0.5")):
        arguments = ["--concept", tmp_path / "concepts", "--embedding_path", tmp_path / "learned", *dials]
        code, output, found[dials] = run(*arguments, "--judge", "none")
        assert code == 0, output.err
    without, given = found.values()
    assert given["settings"].pop("dials") == {"truncation": 0, "bypass": 0.5}
    assert given["settings"] == without["settings"]
    assert "dials {'truncation': 0.0, 'bypass': 0.5}" in (tmp_path / "out/evaluation.md").read_text()
    for name in ("mine", "other"):
        assert given["concepts"][name]["prompts"] != without["concepts"][name]["prompts"], name


@pytest.mark.done_or_said
def test_an_output_that_is_not_finite_names_the_checkpoint(run, folder, monkeypatch) -> None:
    def broken(self, z, **options):
        return torch.full((len(z), 3, 8, 8), float("nan"))

    monkeypatch.setattr("ldm.models.diffusion.ddpm.LatentDiffusion.decode_first_stage", broken)
    arguments = [
        "--concept",
        folder / "concepts" / "mine",
        "--embedding_path",
        folder / "learned" / "mine.pt",
    ]
    code, output, written = run(*arguments, "--no_edits")
    assert code == 1 and written is None and "model.ckpt': the output for" in output.err


def test_edits_are_optional(run, folder, monkeypatch) -> None:
    use_few_renderings(monkeypatch)
    arguments = ["--concept", folder / "concepts" / "zuzu", "--embedding_path", folder / "learned"]
    code, output, found = run(*arguments, "--judge", "none", "--no_edits")
    assert code == 0, output.err
    assert list(found["concepts"]["zuzu"]["prompts"]) == ["a photo of <zuzu>"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--concept", "absent", "--word", "x"], "concept folder 'absent' does not exist"),
        (["--concept", "CONCEPTS", "--embedding_path", "LEARNED/mine.pt"], "one file for several concepts"),
        (["--concept", "MINE", "--embedding_path", "absent.pt"], "'absent.pt' does not exist"),
        (["--concept", "MINE", "--embedding_path", "CONCEPTS/mine/cat.png"], "carries no embedding"),
        (["--concept", "MINE", "--word", "x", "--prompt", "at night"], "does not mention the concept"),
        (["--concept", "MINE", "--word", "x", "--prompt", "{} by <dog>"], "mentions '<dog>'"),
        (["--concept", "MINE", "--word", "x", "--features", "./absent"], "no such folder"),
        (["--concept", "MINE", "--word", "x", "--judge", "absent"], "--judge 'absent' does not exist"),
        (["--concept", "MINE", "--word", "x", "--config", "absent.yaml"], "'absent.yaml' does not exist"),
        (["--concept", "MINE"], "--embedding_path --word"),
        (["--concept", "MINE", "--word", "x", "--samples", "0"], "not a whole number from 1"),
        (["--concept", "MINE", "--word", "x", "--dial", "bypass=1"], "--dial bypass is for learned words"),
        (["--concept", "MINE", "--word", "x", "--dial", "bypass"], "--dial: 'bypass' is not a NAME=NUMBER"),
        (
            ["--concept", "CONCEPTS", "--embedding_path", "LEARNED", "--dial", "bypass=1"],
            "no dial 'bypass' of plain vectors",
        ),
    ],
)
def test_mistakes_are_one_line_before_the_model_is_read(arguments, message, run, folder, monkeypatch) -> None:
    def never(*arguments):
        raise AssertionError("the model was read")

    monkeypatch.setattr(evaluate, "load_model", never)
    places = {
        "CONCEPTS": folder / "concepts",
        "LEARNED": folder / "learned",
        "MINE": folder / "concepts" / "mine",
    }
    for name, path in places.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    code, output, found = run(*arguments)
    assert code in (1, 2) and found is None
    assert message in output.err and output.err.count("\n") == 1
    assert output.err.startswith("error: ")
