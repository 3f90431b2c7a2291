"""The command line of scripts/export_diffusers.py, on the model of a golden record (dev extra)."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from ldm.commands import export
from ldm.embeddings import Concept, LearnedEmbeddings, write
from ldm.embeddings.method_files import MethodFile, write_method_file
from tests.embeddings.samples import clip_folder, vectors
from tests.golden_record import Golden

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its config beside it, and two embedding files."""
    folder = tmp_path_factory.mktemp("model")
    golden = Golden("clip_one_vector")
    golden.write_model(folder)
    config = golden.config()
    config.params.cond_stage_config.params.version = str(clip_folder(tmp_path_factory.mktemp("clip")))
    OmegaConf.save({"model": config}, folder / "config.yaml")
    for name, word, count in (("star", "*", 2), ("dog", "<dog>", 1)):
        concept = Concept(word, vectors(count, 32, seed=count))
        write(LearnedEmbeddings((concept,)), folder / f"{name}.pt", "original")
    return folder


@pytest.fixture
def run(folder, tmp_path, capsys):
    """Run the command; returns its exit code, the lines on stdout, and stderr."""

    def run(*arguments):
        base = ["--ckpt_path", folder / "model.ckpt", "--out", tmp_path / "pipeline"]
        code = export.main([str(argument) for argument in (*base, *arguments)])
        output = capsys.readouterr()
        return code, output.out.splitlines(), output.err.strip()

    return run


def test_a_folder_with_words_in_it(run, folder, tmp_path) -> None:
    files = ["--embedding_path", folder / "star.pt", folder / "dog.pt"]
    code, lines, _ = run(*files, "--rename", "*=<my-cat>")
    assert code == 0
    assert lines == [
        f"wrote {tmp_path / 'pipeline'}",
        'in prompts: "a photo of <my-cat>"',
        'in prompts: "a photo of <dog>"',
    ]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    table = pipeline.text_encoder.get_input_embeddings().weight.detach()
    assert torch.equal(table[-3:], torch.cat([vectors(2, 32, seed=2), vectors(1, 32, seed=1)]))
    assert pipeline.tokenizer.convert_tokens_to_ids(["<my-cat>", "<my-cat>_1", "<dog>"]) == [
        49408,
        49409,
        49410,
    ]


def test_a_folder_without_words(run, tmp_path) -> None:
    code, lines, _ = run()
    assert (code, lines) == (0, [f"wrote {tmp_path / 'pipeline'}"])
    code, lines, error = run()
    assert (code, lines) == (1, []) and "exists already" in error


def test_a_pipeline_with_other_outputs_is_not_written(run, folder, tmp_path) -> None:
    config = OmegaConf.load(folder / "config.yaml")
    config.model.params.first_stage_config.params.ddconfig.tanh_out = True
    OmegaConf.save(config, tmp_path / "other.yaml")
    code, lines, error = run("--config", tmp_path / "other.yaml")
    assert (code, lines) == (1, []) and "its first stage is off by" in error
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--embedding_path", "star.pt"], "'*' is a word of the tokenizer"),
        (["--embedding_path", "absent.pt"], "absent.pt' does not exist"),
        (["--embedding_path", "dog.pt", "--rename", "<cat>=<dog>"], "(loaded: '<dog>')"),
        (["--embedding_path", "dog.pt", "--rename", "<dog>"], "write it as old=new"),
        (["--embedding_path", "dog.pt", "star.pt", "--rename", "*=<dog>"], "two words the same name"),
        (["--config", "absent.yaml"], "absent.yaml' does not exist"),
    ],
)
def test_mistakes_end_in_one_line(run, folder, tmp_path, arguments, message) -> None:
    placed = [folder / part if part.endswith((".pt", ".yaml")) else part for part in arguments]
    code, lines, error = run(*placed)
    assert code in (1, 2) and lines == []
    assert message in error and "\n" not in error and error.startswith("error: ")
    assert not (tmp_path / "pipeline").exists()


def test_a_personalization_without_vectors_cannot_be_exported(run, folder, tmp_path) -> None:
    config = OmegaConf.load(folder / "config.yaml")
    config.model.params.personalization_config = {"target": "tests.commands.own_word.OwnWord"}
    OmegaConf.save(config, tmp_path / "own.yaml")
    torch.save({"<own>": vectors(1, 32)}, tmp_path / "own.pt")
    code, lines, error = run("--config", tmp_path / "own.yaml", "--embedding_path", tmp_path / "own.pt")
    assert (code, lines) == (1, []) and "'<own>' has no vectors that diffusers can use" in error


def test_a_word_of_a_method_is_refused_before_the_model_is_read(run, folder, tmp_path, monkeypatch) -> None:
    content = MethodFile("grid", {"*": 1}, {"vectors": torch.zeros(4, 1, 32)}, {"stages": 4}, {}, "clip", 32)
    write_method_file(content, tmp_path / "a.safetensors")
    monkeypatch.setattr(export, "load_latent_diffusion", lambda *_, **__: pytest.fail("the model was read"))
    code, _, error = run("--embedding_path", tmp_path / "a.safetensors")
    assert code and "words of the method 'grid', which are more than vectors" in error and "\n" not in error
