"""The Python call: `ldm.invert`, and `ldm.generate` with what it returns."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.base_models import training_yaml
from ldm.files import CHECKOUT
from ldm.images import open_image
from ldm.training.inversion import Inversion, copies_of, named_yaml, overrides
from ldm.yaml_files import read_yaml
from tests.golden_record import Golden
from tests.training.runs import only_run

# With this seed the tiny model improves.
STEPS = {"lightning.callbacks.deterministic_loss.params.every_n_train_steps": 1, "seed": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The tiny model with its YAML beside it, to generate with."""
    folder = tmp_path_factory.mktemp("model")
    Golden("clip_one_vector").write_model(folder)
    return folder / "model.ckpt"


def test_a_concept_is_learned_saved_and_generated_with(
    tiny_yaml, tiny_model, image_folder, model, capfd
) -> None:
    learned = ldm.invert(
        image_folder, placeholder="<toy>", model=tiny_model, base=tiny_yaml, steps=3, settings=STEPS
    )
    # The logging of the caller is left as it was.
    assert logging.getLogger("ldm").propagate and logging.getLogger("ldm").handlers == []
    assert learned.word == "<toy>" and learned.vectors.shape == (1, 32)
    assert learned.run.resolve() == only_run().resolve() and learned.record.state == "finished"
    assert learned.path.name == "embeddings_best.pt" and len(learned.record.curves()["fixed loss"]) == 4
    assert capfd.readouterr().out == ""  # quiet
    file = learned.save()
    assert torch.equal(ldm.load(file).vectors, learned.vectors) and file == Path("toy.safetensors")
    assert torch.equal(ldm.load(learned.run).vectors, learned.vectors)
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


@pytest.mark.parametrize("name", ["neti", "xti"])
def test_a_word_of_a_method_is_learned_loaded_and_generated_with(
    name, tiny_yaml, tiny_model, image_folder, model
) -> None:
    """Such a word is more than vectors: one line says what it cannot do."""
    concept = ldm.invert(
        image_folder,
        placeholder="<toy>",
        model=tiny_model,
        base=tiny_yaml,
        personalization=name,
        steps=1,
        settings={"model.params.personalization_config.params.initializer_words": ["dog"]},
    )
    assert concept.word == "<toy>" and concept.record.state == "finished"
    assert repr(concept) == f"<Concept '<toy>' of the method {name}>"

    def drawn(held: ldm.Concept) -> bytes:
        return ldm.generate(f"a {held.word}", words=held, model=model, steps=1)[0].tobytes()

    image = drawn(concept)
    saved = concept.save("words/")
    assert saved == Path("words/toy.safetensors")
    for again in (ldm.load(concept.run), ldm.load(saved), *ldm.load_all("words"), concept.renamed("<x>")):
        assert drawn(again) == image
    assert image != ldm.generate("a toy", model=model, steps=1)[0].tobytes()
    for what in (
        lambda: concept.vectors,
        lambda: concept.save("x.pt"),
        lambda: concept.save("x.png"),
        lambda: ldm.interpolate(concept, concept, 0.5),
    ):
        with pytest.raises(ldm.UserError, match=f"of the method '{name}', whose words are more than vectors"):
            what()
    assert not Path("x.pt").exists()


def test_a_word_of_a_class_of_the_users_says_how_to_generate(tiny_yaml, tiny_model, image_folder) -> None:
    Path("own.yaml").write_text(
        "model: {params: {personalization_config: {target: tests.training.own_personalization.Offset, "
        "params: {word: '*'}}}}"
    )
    with pytest.raises(ldm.UserError, match="Offset' learned is in .*generate with ldm.generate.*config="):
        ldm.invert(image_folder, model=tiny_model, base=tiny_yaml, personalization="own.yaml", steps=1)
    assert (only_run() / "checkpoints" / "embeddings.pt").is_file()


def test_images_may_be_files_or_loaded(image_folder, tiny_yaml, tiny_model):
    given = [image_folder / "0.png", Image.open(image_folder / "1.png")]
    for _ in range(2):
        concept = ldm.invert(iter(given), model=tiny_model, base=tiny_yaml, steps=1, logdir="runs")
    (copies,) = Path("runs/.images").iterdir()
    assert sorted(path.name for path in copies.iterdir()) == ["001.png", "002.png"]
    assert concept.record.images == 2 and concept.run.name[:2] == "20"


def test_copies_of_images_are_what_training_reads_from_files(tmp_path, monkeypatch) -> None:
    """Upright, over white, with their captions and masks; other images of the same names are other copies."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 4), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save("turned.png", exif=exif)
    photo.convert("RGB").save("plain.png")
    photo.getchannel("A").save("plain-masklabel.png")
    Path("plain.txt").write_text("a [name]")
    folder, is_given = copies_of(["turned.png", Image.open("turned.png"), "plain.png"], Path("logs"))
    assert not is_given and folder.parent == Path("logs/.images")
    names = ["001-masklabel.png", "001.png", "002-masklabel.png", "002.png", "003-masklabel.png"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "003.png", "003.txt"]
    assert open_image(folder / "001.png").tobytes() == open_image("turned.png").tobytes()
    assert open_image(folder / "001.png").size == (12, 16)
    for name in ("", "-masklabel"):
        assert (folder / f"001{name}.png").read_bytes() == (folder / f"002{name}.png").read_bytes()
    assert (folder / "003.txt").read_text() == "a [name]"
    Path("plain.txt").write_text("another [name]")
    assert copies_of(["turned.png", Image.open("turned.png"), "plain.png"], Path("logs"))[0] != folder


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBa", "CMYK", "HSV", "I;16", "I", "F"])
def test_images_of_all_modes_are_taken(mode, tmp_path) -> None:
    folder, _ = copies_of([Image.new(mode, (9, 8))], tmp_path)
    assert open_image(folder / "001.png").size == (9, 8)


@pytest.mark.refused_first
def test_what_is_no_image_is_refused(tmp_path) -> None:
    closed = Image.new("RGB", (8, 8))
    closed.close()
    for given, said in (
        ([], "the list of images is empty"),
        (7, "int is no type of images"),
        ([7], "int is no type of images"),
        (np.zeros((8, 8, 3)), "ndarray is no type of images"),
        ([torch.zeros(3, 8, 8)], "Tensor is no type of images.*Image.fromarray"),
        (b"a.png", "bytes is no type of images"),
        ([Image.new("RGB", (0, 8))], "has no pixels"),
        ([closed], "cannot be used"),
        (["absent.png"], "image not found: absent.png"),
    ):
        with pytest.raises(ldm.UserError, match=said) as error:
            copies_of(given, tmp_path)
        assert len(str(error.value)) < 300 and "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


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


def test_several_words_are_learned_from_their_images(tiny_yaml, tiny_model, image_folder) -> None:
    other = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    concept = ldm.invert(
        {"<a>": image_folder, "b.c": other},
        init={"b.c": "dog"},
        vectors={"<a>": 2},
        model=tiny_model,
        base=tiny_yaml,
        personalization="two_concepts",  # whose words and folders are others
        steps=1,
    )
    assert concept.words == ["<a>", "b.c"] == list(concept.record.words)
    assert [len(one.vectors) for one in concept.embeddings.concepts] == [2, 1]
    assert concept.embeddings.initializers == {"b.c": "dog"}
    saved = read_yaml(next((concept.run / "configs").glob("*project.yaml")))
    roots = saved.data_root
    assert list(roots) == ["<a>", "b.c"] and roots["<a>"] == str(image_folder) and ".images" in roots["b.c"]


def test_mistakes_with_several_words_are_user_errors(tiny_yaml, tiny_model, image_folder) -> None:
    def fails(match, images, **arguments):
        with pytest.raises(ldm.UserError, match=match) as error:
            ldm.invert(images, **{"model": tiny_model, "base": tiny_yaml} | arguments)
        assert len(str(error.value)) < 300 and "\n" not in str(error.value)

    both = {"<a>": image_folder, "<b>": image_folder}
    fails("a word of images '' is empty", {"": image_folder})
    fails("a word of images 3 is not a text", {3: image_folder})
    fails("images is empty; give the images of each word", {})
    fails("images names '<á>' or another word twice", {"<\u00e1>": image_folder, "<a\u0301>": image_folder})
    fails("nowhere", both | {"<b>": "nowhere"})
    fails("the list of images is empty", both | {"<b>": []})
    fails("placeholder and images of several words exclude each other", both, placeholder="<a>")
    fails("init names '<c>', and images has <a>, <b>; name one of these", both, init={"<c>": "cat"})
    fails("init is 3; it must be a text", both, init={"<a>": 3})
    fails("vectors is 0; it must be a whole number from 1", both, vectors={"<a>": 0})
    fails("vectors is {'<a>': 1}; give one, or the images of each word", image_folder, vectors={"<a>": 1})
    assert not Path("logs").exists()


@pytest.mark.refused_first
def test_mistakes_are_user_errors(tiny_yaml, tiny_model, image_folder):
    def fails(match, **arguments):
        given = {"images": image_folder, "model": tiny_model, "base": tiny_yaml} | arguments
        with pytest.raises(ldm.UserError, match=match) as error:
            ldm.invert(given.pop("images"), **given)
        assert len(str(error.value)) < 300 and "\n" not in str(error.value)
        assert " --" not in str(error.value) and " -r" not in str(error.value), "a flag, which Python has not"

    fails("nowhere", images="nowhere")
    fails("^resume= 'nowhere' does not exist", images=None, base=None, resume="nowhere")
    photos = str(image_folder)
    fails("training images are given as images= ", images=None, base=None, resume=photos)
    fails("no argument 'vektors'", vektors=2)
    fails("no recipe 'slow'; known are direction, fast", recipe="slow")
    fails("gone.ckpt", model="gone.ckpt", base=None)
    fails("object or style", kind="person")
    fails("no personalization 'slow'; known are core,", personalization="slow")
    fails("give images", images=None)
    fails("give images", images=" ")
    for name, value, said in (
        ("steps", 0, "0; it must be a whole number of at least 1"),
        ("steps", True, "True; it must be a whole number"),
        ("steps", 2.5, "2.5; it must be a whole number"),
        ("vectors", np.int64(0), "0; it must be a whole number from 1"),
        ("seed", -1, "-1; it must be a whole number from 0"),
        ("batch_size", "4", "'4'; it must be a whole number"),
        ("preview_every", -1, "-1; it must be a whole number of at least 0"),
        ("flip", "no", "'no'; it must be true or false"),
        ("use_captions", "yes", "'yes'; it must be true or false"),
        ("rate", float("nan"), "nan; it must be a number"),
        ("init", ["bear"], r"\['bear'\]; it must be a text or None"),
        ("kind", ["style"], r"\['style'\]; it must be a text or None"),
        ("placeholder", 3, "3; it must be a text"),
        ("model", None, "None; it must be a text"),
        ("recipe", 3, "3; it must be a list"),
        ("recipe", [3], ""),
        ("logdir", None, "None; it must be a text"),
        ("name", 3, "3; it must be a text"),
        ("base", 3, "3; it must be a text"),
        ("on_progress", 3, "3; give a function"),
        ("settings", ["a=1"], r"\['a=1'\]; give a dictionary"),
        ("resume", 3, "3; it must be a text"),
    ):
        fails(rf"^{name}.* is {said}", **{name: value})
    fails(r"settings\['a.b'\] is <object", settings={"a.b": object()})
    fails("placeholder 'a.*' holds the invisible", placeholder="a\u202e")
    fails("no argument 'recipes'", recipes=())
    fails("exclude each other", resume="latest")
    assert not Path("logs").exists()


def test_values_of_numpy_torch_and_pathlib_are_settings() -> None:
    given = {"a": np.float32(0.5), "b": torch.tensor([1, 2]), "c": Path("x"), "d": (np.int64(1),), "e": "*"}
    assert overrides(given) == ["a=0.5", "b=[1, 2]", "c=x", "d=[1]", "e='*'"]


def test_an_interruption_passes_between_processes() -> None:
    copy = pickle.loads(pickle.dumps(ldm.Stopped(Path("logs/x"), None)))
    assert copy.run == Path("logs/x") and str(copy) == "stopped before the first step"


def test_the_command_line_of_an_inversion():
    asked = Inversion(
        "photos", "<cat>", "grey cat", vectors=2, kind="style", steps=9, rate="1e-3:5", batch_size=1, flip=False,
        recipes=("fast",), use_captions=True, name="cat", settings=("data.params.num_workers=0",),
    )  # fmt: skip
    words = asked.arguments()
    assert words[1].endswith("txt2img-finetune.yaml") and words[2].endswith("fast.yaml")
    assert "model.base_learning_rate=1e-3:5" in words and "data.params.train.params.flip_p=0" in words
    assert words[words.index("--init_word") + 1] == "grey cat" and words[-1] == "data.params.num_workers=0"
    assert named_yaml("fast", "recipe").is_file()


def test_the_yaml_to_train_with_is_that_of_the_model(tiny_model):
    assert training_yaml(CHECKOUT / "models/ldm/creatures/model.safetensors").name == "txt2img-finetune.yaml"
    assert training_yaml(tiny_model).name == "v1-finetune.yaml"


def test_importing_the_package_is_light():
    code = "import sys, ldm; dir(ldm); ldm.UserError; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, check=True
    )
    assert done.stdout == "False\n" and callable(ldm.generate)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ldm.nothing  # noqa: B018
