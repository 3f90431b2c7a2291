"""Images to begin from, and class words."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.embeddings.method_files import read_words
from ldm.generate import generate
from ldm.generate.editing import InitImage, with_class_words
from ldm.generate.request import class_words
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.methods import METHODS, CoRe, DreamArtist
from ldm.util import UserError
from tests.golden_record import Golden

FAST = {"steps": 4, "scale": 3.0}


@pytest.fixture(scope="module")
def model():
    return Golden("clip_one_vector").model()


def photo(size=(32, 32), mode="RGB"):
    pixels = np.random.RandomState(1).randint(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def half_mask(size=(32, 32)):
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 2, 0, *size))
    return mask


def difference(first, second) -> float:
    return float(np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).mean())


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
def test_the_strength_goes_from_the_image_to_noise(model, sampler) -> None:
    image = photo()
    through = generate(model, "a dog", init=InitImage(image, strength=0.0), sampler=sampler, **FAST)[0]
    with torch.no_grad():
        latent = InitImage(image).at(model, 32, 32).latent
        decoded = model.decode_first_stage(latent)[0]
    exact = decoded.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    assert difference(through, exact) == 0, "the image through the first stage"
    changes = [
        difference(
            through, generate(model, "a dog", init=InitImage(image, strength=s), sampler=sampler, **FAST)[0]
        )
        for s in (0.25, 1.0)
    ]
    assert 0 < changes[0] < changes[1]


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
def test_pixels_outside_the_mask_are_those_of_the_image(model, sampler) -> None:
    image = photo()
    init = InitImage(image, half_mask(), strength=1.0)
    one, other = generate(model, ["a dog"] * 2, init=init, sampler=sampler, **FAST)
    for edited in (one, other):
        assert np.array_equal(np.asarray(edited)[:, :16], np.asarray(image)[:, :16])
    assert difference(one.crop((16, 0, 32, 32)), image.crop((16, 0, 32, 32))) > 0
    assert difference(one, other) > 0, "every number has its own noise"
    alone = generate(model, "a dog", init=init, sampler=sampler, numbers=[1], **FAST)[0]
    assert np.abs(np.asarray(alone, dtype=int) - np.asarray(other, dtype=int)).max() <= 1


def test_a_cell_may_change_if_one_of_its_pixels_is_marked(model) -> None:
    mask = Image.new("L", (32, 32))
    mask.putpixel((5, 9), 1)
    keep = InitImage(photo(), mask).at(model, 32, 32).keep
    assert keep.shape == (1, 1, 8, 8) and (keep == 0).nonzero().tolist() == [[0, 0, 2, 1]]


def test_the_central_part_is_used_as_for_training_images(model, caplog) -> None:
    caplog.set_level(logging.INFO)
    image = photo((60, 40))
    start = InitImage(image, half_mask((60, 40))).at(model, 32, 32)
    expected = image.crop((10, 0, 50, 40)).resize((32, 32), Image.Resampling.BICUBIC)
    assert difference(start.image, expected) == 0
    assert start.keep[0, 0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert "its central part with the shape 32x32 is used" in caplog.text
    caplog.clear()
    wide = InitImage(image).at(model, 32, 48)
    assert wide.image.size == (48, 32) and wide.latent.shape[2:] == (8, 12) and not caplog.text


def test_files_are_read_upright_and_over_white(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo((20, 10)).save(tmp_path / "a.jpg", exif=exif)
    init = InitImage.read(tmp_path / "a.jpg", strength=0.5)
    assert init.image.size == (10, 20) and list(init.labels()) == ["Denoising strength", "Init image"]
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "b.png")
    assert InitImage.read(tmp_path / "b.png").image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), True, "0.5"])
def test_a_strength_is_a_share(strength) -> None:
    with pytest.raises(UserError, match=r"strength is .*; it must be"):
        InitImage(photo(), strength=strength)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": "cat.png"}, "image is 'cat.png', no image of PIL; InitImage.read takes files"),
        ({"image": None}, "image is null, no image"),
        ({"image": photo(), "mask": "mask.png"}, "mask is 'mask.png', no image of PIL"),
    ],
)
def test_what_is_no_image_is_one_line(given, message) -> None:
    with pytest.raises(UserError, match=message):
        InitImage(**given)


@pytest.mark.parametrize("method", METHODS)
def test_class_words_come_from_the_file_of_a_method(model, method, tmp_path) -> None:
    made = METHODS[method](
        model.cond_stage_model,
        placeholder_strings=["<a>", "<b>"],
        initializer_words=["a small cat", "dog"],
        denoiser=model.denoiser_shape,
    )
    made.save(tmp_path / "a.safetensors")
    expected = {"<a>": "a small cat", "<b>": "dog"}
    assert class_words([tmp_path / "a.safetensors"], ["<a> and <b>"]) == expected
    read = read_words(tmp_path / "a.safetensors")
    assert class_words([read.renamed({"<a>": "<c>"})], ["<c>"]) == {"<c>": "a small cat", "<b>": "dog"}
    assert class_words([read.only("<b>")], ["<b>"]) == {"<b>": "dog"}
    again = METHODS[method].from_file(read, model.cond_stage_model, model.denoiser_shape)
    again.save(tmp_path / "b.safetensors")
    assert read_words(tmp_path / "b.safetensors").initializers == expected


@pytest.mark.parametrize("kind", [EmbeddingManager, CoRe, DreamArtist])
def test_class_words_come_from_the_vectors_of_a_personalization(model, kind, tmp_path) -> None:
    made = kind(model.cond_stage_model, placeholder_strings=["<a>"], initializer_words=["cat"])
    made.save(tmp_path / "a.pt")
    assert class_words([tmp_path / "a.pt"], ["a <a>"]) == {"<a>": "cat"}
    begun = kind(
        model.cond_stage_model,
        placeholder_strings=["<a>"],
        initializer_words=["dog"],
        embedding_manager_ckpt=tmp_path / "a.pt",
    )
    begun.save(tmp_path / "b.pt")
    assert class_words([tmp_path / "b.pt"], ["a <a>"]) == {"<a>": "cat"}, "what the vectors began at"


def test_the_strength_dials_a_learned_negative_too(model) -> None:
    before, encoder = model.embedding_manager, model.cond_stage_model
    made = EmbeddingManager(encoder, ["*", "*-neg"], initializer_words=["cat", "dog"])
    with torch.no_grad():
        for number, vectors in enumerate(made.embedding_parameters()):
            vectors.add_(0.5 * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(number)))
    model.embedding_manager = made
    try:
        options = {**FAST, "class_words": {"*": "cat"}}
        none = generate(model, "a photo of *", concept_strength=0.0, **options)[0]
        assert difference(none, generate(model, "a photo of cat", **FAST)[0]) < 1
        nearly = generate(model, "a photo of *", concept_strength=0.999, **options)[0]
        assert difference(nearly, generate(model, "a photo of *", **FAST)[0]) < 1
        assert difference(none, nearly) > 3
    finally:
        model.embedding_manager = before


@pytest.mark.parametrize(
    ("prompt", "negative", "word"),
    [
        ("a photo of *", "(bad:1.2) BREAK x", "cat"),
        ("a photo of *", "", "cat BREAK dog"),
        ("* BREAK x", "", "cat"),
    ],
)
def test_chunks_of_the_class_word_and_of_the_negative_prompt_are_filled_up(
    model, prompt, negative, word
) -> None:
    options = {**FAST, "negative_prompt": negative, "prompt_syntax": "a1111"}
    none = generate(model, prompt, concept_strength=0.0, class_words={"*": word}, **options)[0]
    assert difference(none, generate(model, prompt.replace("*", word), **options)[0]) < 1


def test_placeholders_are_replaced_by_their_class_words(model) -> None:
    prompts = ["a photo of *", "* and *", "a dog"]
    assert with_class_words(model, prompts, {"*": "cat"}) == ["a photo of cat", "cat and cat", "a dog"]
    assert with_class_words(model, ["(*:1.2)"], "cat") == ["(cat:1.2)"]
    with pytest.raises(UserError, match="needs the class word of"):
        with_class_words(model, ["a photo of *"], {})
