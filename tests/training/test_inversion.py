"""The Python call: `ldm.invert`, `ldm.load`, `ldm.interpolate`, and `ldm.generate` with what they return."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import ldm
from ldm.embeddings import Concept as ConceptVectors
from ldm.embeddings import LearnedEmbeddings
from ldm.training.config import training_yaml
from ldm.training.inversion import Concept, Inversion, recipe_yaml
from ldm.yaml_files import CHECKOUT
from tests.golden_record import Golden
from tests.training.runs import only_run

# With this seed the tiny model improves.
STEPS = {"lightning.callbacks.deterministic_loss.params.every_n_train_steps": 1, "seed": 1}


@pytest.fixture
def learned(tiny_yaml, tiny_model, image_folder):
    """A concept of a tiny model, and the folder of that model."""
    return ldm.invert(
        image_folder, placeholder="<toy>", model=tiny_model, base=tiny_yaml, steps=3, settings=STEPS
    )


def test_a_concept_is_learned_saved_and_generated_with(learned, tiny_model, tmp_path, capfd):
    assert learned.word == "<toy>" and learned.vectors.shape == (1, 32)
    assert learned.run.resolve() == only_run().resolve() and learned.record.state == "finished"
    assert learned.path.name == "embeddings_best.pt" and len(learned.record.curves()["fixed loss"]) == 4
    assert capfd.readouterr().out == ""  # quiet
    file = learned.save()
    assert torch.equal(ldm.load(file).vectors, learned.vectors) and file == Path("toy.safetensors")
    assert torch.equal(ldm.load(learned.run).vectors, learned.vectors)
    (tmp_path / "model").mkdir()
    Golden("clip_one_vector").write_model(tmp_path / "model")
    model = tmp_path / "model" / "model.ckpt"
    first = ldm.generate(words=learned, model=model, steps=1, seed=3)[0]
    assert first.info["parameters"].startswith(
        "a photo of <toy>\nSteps: 1, Sampler: DDIM, CFG scale: 5, Seed: 3"
    )
    assert "TI hashes" in first.info["parameters"]
    # Words of one call are not those of the next, though the model stays in memory.
    with pytest.raises(ldm.UserError, match="<toy>"):
        ldm.generate("a <toy>", model=model, steps=1)
    again = ldm.generate("a photo of <toy>", words=ldm.load(file), model=model, steps=1, seed=3)[0]
    assert again.tobytes() == first.tobytes()


def test_a_word_of_a_method_is_a_concept_too(tiny_yaml, tiny_model, image_folder, tmp_path):
    params = {"placeholder_strings": ["*"], "stages": 3, "residual_layers": True}
    node = {"personalization_config": {"target": "ldm.modules.methods.Grid", "params": params}}
    OmegaConf.save(OmegaConf.create({"model": {"params": node}}), "own.yaml")
    concept = ldm.invert(
        image_folder,
        placeholder="<toy>",
        model=tiny_model,
        base=tiny_yaml,
        personalization="own.yaml",
        steps=1,
        settings=STEPS,
    )
    assert concept.word == "<toy>" and "by the method 'grid'" in repr(concept)
    for wrong in (lambda: concept.vectors, lambda: ldm.interpolate(concept, concept, 0.5)):
        with pytest.raises(ldm.UserError, match="is of the method 'grid' and more than vectors"):
            wrong()
    with pytest.raises(ldm.UserError, match="more than vectors"):
        concept.save(format="a1111")
    (tmp_path / "model").mkdir()
    Golden("clip_one_vector").write_model(tmp_path / "model")
    options = {"model": tmp_path / "model" / "model.ckpt", "steps": 1, "seed": 3}
    first = ldm.generate("a <toy>", words=concept, **options)[0]
    assert "TI hashes" in first.info["parameters"]
    renamed = concept.renamed("<bear>")
    file = renamed.save()
    for words in (renamed, file, ldm.load(file), *ldm.load_all(file)):
        again = ldm.generate("a <bear>", words=words, **options)[0]
        assert again.tobytes() == first.tobytes()
    with pytest.raises(ldm.UserError, match="the class word of '<bear>' is not in its file"):
        ldm.generate("a <bear>", words=file, concept_strength=0.5, **options)


def test_a_negative_goes_along_with_its_word():
    pair = LearnedEmbeddings(tuple(ConceptVectors(word, torch.ones(1, 32)) for word in ("*", "*-neg")))
    assert Concept(pair).renamed("<a>").embeddings.triggers == ["<a>", "<a>-neg"]


def test_images_may_be_files_or_loaded(image_folder, tiny_yaml, tiny_model):
    given = [image_folder / "0.png", Image.open(image_folder / "1.png")]
    for _ in range(2):
        concept = ldm.invert(given, model=tiny_model, base=tiny_yaml, steps=1, logdir="runs")
    (copies,) = Path("runs/.images").iterdir()
    assert sorted(path.name for path in copies.iterdir()) == ["001.png", "002.png"]
    assert concept.record.images == 2 and concept.run.name[:2] == "20"
    with pytest.raises(ldm.UserError, match="empty"):
        ldm.invert([], base=tiny_yaml, model=tiny_model)


def test_progress_and_interruption(tiny_yaml, tiny_model, image_folder, monkeypatch):
    monkeypatch.setattr("ldm.training.record.INTERVAL", 0)
    seen = []

    def stop_at_two(record):
        seen.append((record.step, record.total, record.state))
        if record.step == 2 and len(seen) < 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(ldm.Stopped, match="resume=") as stopped:
        ldm.invert(image_folder, model=tiny_model, base=tiny_yaml, steps=5, on_progress=stop_at_two)
    # The signal came between two steps, and the next one was done.
    assert seen[-1] == (3, 5, "stopped") and str(only_run()) in str(stopped.value)
    assert stopped.value.run.resolve() == only_run().resolve() and stopped.value.concept.record.step == 3
    assert stopped.value._render_traceback_() == [str(stopped.value)]
    concept = ldm.invert(resume=only_run(), on_progress=stop_at_two)
    assert seen[-1] == (5, 5, "finished") and concept.record.step == 5
    # It has all its steps: nothing is done until there are to be more.
    assert torch.equal(ldm.invert(resume=only_run()).vectors, concept.vectors)
    assert ldm.invert(resume=only_run(), steps=6).record.step == 6
    for wrong in ({"recipe": "fast"}, {"base": tiny_yaml}, {"placeholder": "<other>"}):
        with pytest.raises(ldm.UserError):
            ldm.invert(resume=only_run(), **wrong)


def test_mistakes_are_user_errors(tiny_yaml, tiny_model, image_folder, tmp_path):
    def fails(match, **arguments):
        given = {"images": image_folder, "model": tiny_model, "base": tiny_yaml} | arguments
        with pytest.raises(ldm.UserError, match=match) as error:
            ldm.invert(given.pop("images"), **given)
        assert len(str(error.value)) < 400 and "\n" not in str(error.value)

    fails("nowhere", images="nowhere")
    fails("no argument 'vektors'", vektors=2)
    fails("no recipe 'slow'; known are direction, fast", recipe="slow")
    fails("gone.ckpt", model="gone.ckpt", base=None)
    fails("object or style", kind="person")
    fails("max_train_steps", steps=0)
    fails("give images", images=None)
    fails("images is", images=7)
    fails("images is", images=[7])
    fails("settings is", settings=["a=1"])
    fails("placeholder is None", placeholder=None)
    fails("no argument 'recipes'", recipes=())
    fails("exclude each other", resume="latest")
    assert not Path("logs").exists()
    with pytest.raises(ldm.UserError, match="no learned word"):
        ldm.load(tmp_path)
    with pytest.raises(ldm.UserError, match="does not exist"):
        ldm.load("no such file.pt")


def test_the_logging_of_the_caller_is_left_as_it_was(learned):
    assert logging.getLogger("ldm").propagate and logging.getLogger("ldm").handlers == []


def test_interpolation(learned):
    other = learned.renamed("<other>")
    half = ldm.interpolate(learned, other, 0.5, "<half>")
    assert half.word == "<half>" and torch.allclose(half.vectors, learned.vectors)
    wide = ldm.Concept(learned.embeddings.renamed({"<toy>": "a"}))
    object.__setattr__(wide.embeddings.concepts[0], "vectors", torch.zeros(2, 32))
    with pytest.raises(ldm.UserError, match="cannot be interpolated"):
        ldm.interpolate(learned, wide, 0.5)


def test_the_command_line_of_an_inversion():
    asked = Inversion(
        "photos", "<cat>", "grey cat", vectors=2, kind="style", steps=9, rate="1e-3:5", batch_size=1, flip=False,
        recipes=("fast",), use_captions=True, name="cat", settings=("data.params.num_workers=0",),
    )  # fmt: skip
    words = asked.arguments()
    assert words[1].endswith("txt2img-finetune.yaml") and words[2].endswith("fast.yaml")
    assert "model.base_learning_rate=1e-3:5" in words and "data.params.train.params.flip_p=0" in words
    assert words[words.index("--init_word") + 1] == "grey cat" and words[-1] == "data.params.num_workers=0"
    assert recipe_yaml("fast").is_file()


def test_the_yaml_to_train_with_is_that_of_the_model(tiny_model):
    assert training_yaml(CHECKOUT / "models/ldm/creatures/model.safetensors").name == "txt2img-finetune.yaml"
    assert training_yaml(tiny_model).name == "v1-finetune.yaml"


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


def test_folders_hold_several_words(learned, tmp_path):
    other = learned.renamed("<other>")
    for concept in (learned, other):
        concept.save(tmp_path)
    assert [concept.word for concept in ldm.load_all(tmp_path)] == ["<other>", "<toy>"]
    assert [concept.word for concept in ldm.load_all([tmp_path, learned.run])][2:] == ["<toy>"]
    with pytest.raises(ldm.UserError, match="holds 2 embedding files"):
        ldm.load(tmp_path)


def test_importing_the_package_is_light():
    code = "import sys, ldm; dir(ldm); ldm.UserError; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, check=True
    )
    assert done.stdout == "False\n" and callable(ldm.generate)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ldm.nothing  # noqa: B018
