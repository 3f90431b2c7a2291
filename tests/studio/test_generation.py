"""Images of the page's form: words of methods, images to edit, how much a word adds, and plots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.embeddings import Concept, LearnedEmbeddings, Metadata, write
from ldm.generate import Settings
from ldm.images import open_image
from ldm.studio.service import Service
from ldm.studio.workspace import Workspace
from ldm.util import UserError
from tests.golden_record import Golden
from tests.modules.methods.conftest import words


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Service:
    """A page with a small model, a word of NeTI, one of a vector, and images to edit."""
    root = tmp_path_factory.mktemp("root")
    Golden("clip_one_vector").write_model(root)
    (root / "embeddings").mkdir()
    words(Golden("clip_one_vector").model(), "neti", "<a>").save(root / "embeddings/a.safetensors")
    cat = LearnedEmbeddings((Concept("<cat>", torch.full((1, 32), 0.5)),), Metadata(initializer="dog"))
    write(cat, root / "embeddings/cat.pt", "original")
    pixels = np.random.RandomState(0).randint(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "photo.png")
    mask = Image.new("L", (60, 40))
    mask.save(root / "black.png")
    mask.paste(255, (30, 0, 60, 40))
    mask.save(root / "mask.png")
    Image.new("L", (8, 8), 255).save(root / "small.png")
    (root / "text.png").write_text("no image")
    return Service(Workspace(root, confined=True))


def form(**further: object) -> dict[str, object]:
    """A form as the page's, whose unused fields are empty or have their first values."""
    empty = dict.fromkeys(("class_word", "dials", "init_img", "mask", "width", "height", "number"), "")
    asked = {"prompt": "a <cat>", "words": ["embeddings/cat.pt"], "model": "model.ckpt", "sampler": "ddim"}
    asked |= {
        "steps": "2",
        "scale": "2",
        "seed": "1",
        "count": "1",
        "concept_strength": "1",
        "strength": "0.75",
    }
    return {**empty, **asked, **further}


def made(service: Service, **further: object) -> tuple[bytes, dict[str, str]]:
    """The pixels of the only image of a form, and the labels of its settings as they are in its file."""
    ((image, path, text),) = service.generation.generate(form(**further))
    settings = Settings.from_image(path)
    assert settings == Settings.from_text(text) and open_image(path).tobytes() == image.tobytes()
    return image.tobytes(), dict(settings.labels)


def test_dials_of_a_word_of_a_method(service) -> None:
    neti = {"prompt": "a <a>", "words": ["embeddings/a.safetensors"]}
    assert service.dials(["embeddings/a.safetensors", "embeddings/cat.pt"]) == "bypass=0.2, truncation=8"
    assert service.dials(["embeddings/cat.pt"]) == service.dials([]) == ""
    images = {
        text: made(service, dials=text, **neti) for text in ("", "truncation=1 bypass = 0.5", "bypass=0.2")
    }
    plain, changed, same = images.values()
    assert plain[0] == same[0] != changed[0]
    assert "Dials" not in plain[1] and changed[1]["Dials"] == "truncation=1, bypass=0.5"
    assert made(service, dials=changed[1]["Dials"], **neti) == changed, "as the settings have it"


def test_several_images_continue_the_number(service) -> None:
    several = service.generation.generate(form(number="3", count="2"))
    assert [Settings.from_text(text).number for _, _, text in several] == [3, 4]
    assert made(service, number="4")[0] == several[1][0].tobytes()


def test_an_image_is_edited_where_the_mask_is_white(service) -> None:
    edit = {"init_img": "photo.png", "strength": "0.5", "steps": "4"}
    whole, labels = made(service, **edit)
    assert labels["Denoising strength"] == "0.5" and labels["Init image"].startswith("photo.png ")
    assert whole != made(service, **edit | {"strength": "0"})[0]
    place, labels = made(service, mask="mask.png", **edit)
    assert labels["Mask"].startswith("mask.png ")
    photo = (
        open_image(service.workspace.root / "photo.png").crop((10, 0, 50, 40)).resize((32, 32), Image.BICUBIC)
    )
    before, after = np.asarray(photo), np.frombuffer(place, np.uint8).reshape(32, 32, 3)
    assert np.array_equal(before[:, :16], after[:, :16]) and not np.array_equal(before, after)
    assert made(service, **edit | {"strength": ""})[1]["Denoising strength"] == "0.75"


def test_the_strength_of_a_word_takes_its_class_word(service) -> None:
    both = {"prompt": "a <cat> and <a>", "words": ["embeddings/cat.pt", "embeddings/a.safetensors"]}
    plain, labels = made(service, **both)
    assert "Concept strength" not in labels
    half, labels = made(service, concept_strength="0.5", **both)
    assert half != plain
    assert labels["Concept strength"] == "0.5" and labels["Class words"] == "<cat>=dog, <a>=cat"
    text = "<a>=small dog, with spots, <cat>=cat"
    other, labels = made(service, concept_strength="0.5", class_word=text, **both)
    assert other != half and labels["Class words"] == "<cat>=cat, <a>=small dog, with spots"
    assert made(service, concept_strength="0.5", class_word=labels["Class words"], **both)[0] == other
    assert made(service, concept_strength="2", class_word="fish")[1]["Class words"] == "fish"


def test_a_plot_of_a_dial_has_the_settings_of_its_images(service) -> None:
    asked = form(prompt="a {}", words=["embeddings/a.safetensors"], dials="bypass=0.5", init_img="photo.png")
    sheet, path = service.generation.grid(asked | {"prompt": "a <a>"}, ("dial", "truncation=1, truncation=8"),
                                          ("change of the image", "0.5, 1"))  # fmt: skip
    assert sheet.width > 2 * 160 and path.is_file()
    settings = Settings.from_image(path)
    assert settings.labels["X"] == "dial truncation=1, truncation=8" and settings.prompt == "a <a>"
    assert settings.labels["Dials"] == "bypass=0.5, truncation=8" and settings.width == 32
    assert settings.labels["Denoising strength"] == "1" and settings.labels["Model"] == "root0"


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"dials": "truncation"}, "'truncation' is not a NAME=NUMBER, such as truncation=32"),
        ({"dials": "truncation=nan"}, "'truncation=nan' is not a NAME=NUMBER"),
        ({"dials": "truncation=3"}, "there is no dial 'truncation' of plain vectors"),
        ({"concept_strength": "much"}, "the strength of the word is 'much'; give a number from 0 to 10"),
        ({"concept_strength": "nan"}, "the strength of the word is nan; give a number from 0 to 10"),
        ({"concept_strength": "2", "class_word": "<b>=dog"}, "the class word '<b>=dog' names no loaded word"),
        (
            {"strength": "1.5", "init_img": "photo.png"},
            "the change of the image is 1.5; give a number from 0 to 1",
        ),
        ({"mask": "mask.png"}, "there is a mask and no image to edit; drop the image too"),
        ({"init_img": "gone.png"}, "image not found: .*gone.png"),
        ({"init_img": "text.png"}, "'text.png' is not an image"),
        ({"init_img": "/etc/hostname"}, "is outside the page's folder"),
        ({"init_img": "photo.png", "mask": "small.png"}, "the mask is 8x8 pixels, but the image is 60x40"),
        ({"init_img": "photo.png", "mask": "black.png"}, "black.png is black everywhere"),
    ],
)
def test_a_mistake_is_one_line(service, further, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        service.generation.generate(form(**further))
    assert "\n" not in str(caught.value)


def test_an_axis_without_its_image_is_refused(service) -> None:
    with pytest.raises(UserError, match="'change of the image' needs an image to begin from"):
        service.generation.grid(form(), ("change of the image", "0, 1"), ("nothing", ""))
