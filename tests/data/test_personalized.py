from __future__ import annotations

import logging
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from ldm import prompts
from ldm.data import personalized, personalized_style
from ldm.data.captions import SAMPLE_KEYS
from ldm.data.personalized import ImageSet, PersonalizedBase
from ldm.util import UserError

PINNED = [
    (0, False, "a photo of the small *", 0),
    (1, False, "a photo of the large *", 0),
    (1, True, "an illustration of the clean *", 0),
]
COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]


def folder_of(path, colours=COLOURS, size=(24, 16)):
    """Images with a white left half, so that flipping can be seen."""
    path.mkdir(exist_ok=True)
    for i, colour in enumerate(colours):
        image = Image.new("RGB", size, colour)
        image.paste((255, 255, 255), (0, 0, size[0] // 2, size[1]))
        image.save(path / f"{i:02}.png")
    return path


@pytest.fixture
def folder(tmp_path):
    return folder_of(tmp_path / "set")


def test_a_sample(folder):
    dataset = PersonalizedBase(folder, size=32, flip_p=0)
    assert len(dataset) == 300 and dataset.num_images == 3
    sample = dataset[4]
    assert tuple(sample) == SAMPLE_KEYS
    assert sample["image"].shape == (32, 32, 3) and sample["image"].dtype == torch.float32
    expected = torch.tensor(COLOURS[1]) / 127.5 - 1
    assert torch.allclose(sample["image"][16, 28], expected) and (sample["image"][16, 3] == 1).all()
    assert sample["caption"] in {line.replace("{}", "*") for line in prompts.OBJECT_TEMPLATES}


def test_defaults_and_order_of_parameters_are_the_known_ones(folder):
    dataset = PersonalizedBase(str(folder), None, 7, "lanczos", 0.0, "train", "<x>", False, True, 0.5, "toy")
    assert len(dataset) == 21
    assert "toy <x>" in dataset[0]["caption"]
    assert dataset[0]["image"].shape == (16, 16, 3)


def test_only_the_training_set_repeats(folder):
    assert len(PersonalizedBase(folder, set="val", repeats=10)) == 3
    assert len(list(PersonalizedBase(folder, repeats=2))) == 6


def test_crop_by_default_stretch_on_request(tmp_path):
    image = Image.new("RGB", (48, 16), "black")
    image.paste((255, 255, 255), (16, 0, 32, 16))
    (tmp_path / "set").mkdir()
    image.save(tmp_path / "set" / "a.png")
    cropped = PersonalizedBase(tmp_path / "set", size=16)[0]["image"]
    assert (cropped == 1).all()
    stretched = PersonalizedBase(tmp_path / "set", size=16, center_crop=False)[0]["image"]
    assert (stretched[:, 0] == -1).all() and (stretched[:, 8] == 1).all() and (stretched[:, 15] == -1).all()


@pytest.mark.parametrize("interpolation", ["linear", "bilinear", "bicubic", "lanczos"])
def test_pixels_are_those_of_pillow(tmp_path, interpolation: str):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 31, 3), dtype=np.uint8))
    noise.save(tmp_path / "a.png")
    dataset = PersonalizedBase(tmp_path, size=16, interpolation=interpolation, flip_p=0)
    method = "bilinear" if interpolation == "linear" else interpolation
    expected = noise.crop((0, 4, 31, 35)).resize((16, 16), Image.Resampling[method.upper()])
    assert np.array_equal(np.rint((dataset[0]["image"].numpy() + 1) * 127.5), np.asarray(expected))


def test_flip_probability(folder):
    def flipped(p: float) -> int:
        dataset = PersonalizedBase(folder, size=8, flip_p=p)
        return sum(int((sample["image"][:, 0] < 1).any()) for sample in dataset)

    assert flipped(0) == 0 and flipped(1) == 300
    assert 110 < flipped(0.5) < 190


def test_draws_depend_on_seed_epoch_and_index_only(folder):
    def draws(seed: int, start: int = 0, epoch: int = 0):
        dataset = PersonalizedBase(folder, size=8, seed=seed)
        dataset.set_epoch(epoch)
        return [dataset.draw(i) for i in range(start, start + 300)]

    first = draws(1)
    assert first == draws(1) != draws(2)
    assert draws(1, epoch=1) == draws(1, start=300) != first
    backwards = PersonalizedBase(folder, size=8, seed=1)
    assert [backwards.draw(i) for i in reversed(range(300))] == first[::-1]
    assert len({draw.caption for draw in first}) > 50


def test_draws_stay_the_same_from_version_to_version(folder):
    # A run that is resumed after an upgrade must go on with the draws it began with.
    dataset = PersonalizedBase(folder, size=8, seed=23)
    assert [dataset.draw(i) for i in (0, 1, 100000)] == PINNED


def test_seed_is_torchs_by_default(folder):
    torch.manual_seed(5)
    first = PersonalizedBase(folder, size=8)
    torch.manual_seed(5)
    second = PersonalizedBase(folder, size=8)
    torch.rand(3)
    assert [first.draw(i) for i in range(50)] == [second.draw(i) for i in range(50)]
    torch.manual_seed(6)
    other = PersonalizedBase(folder, size=8)
    assert [other.draw(i) for i in range(50)] != [first.draw(i) for i in range(50)]


def test_samples_are_the_same_with_workers(folder):
    dataset = PersonalizedBase(folder, size=8, repeats=4)
    alone, helped = (list(DataLoader(dataset, batch_size=4, num_workers=n)) for n in (0, 2))
    assert [batch["caption"] for batch in alone] == [batch["caption"] for batch in helped]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(alone, helped, strict=True))
    assert alone[0]["image"].shape == (4, 8, 8, 3)
    assert pickle.loads(pickle.dumps(dataset)).draw(3) == dataset.draw(3)


def test_image_and_caption_are_available_separately(folder):
    dataset = PersonalizedBase(folder, size=8)
    assert set(dataset.variants()) == {draw.variant for draw in map(dataset.draw, range(300))}
    assert {dataset.draw(i).caption for i in range(3000)} == set(dataset.captions())
    for i in (0, 7, 200):
        drawn = dataset.draw(i)
        assert torch.equal(dataset.image(*drawn.variant), dataset[i]["image"])
    assert PersonalizedBase(folder, flip_p=0).variants() == [(0, False, 0), (1, False, 0), (2, False, 0)]
    assert PersonalizedBase(folder, flip_p=1).variants() == [(0, True, 0), (1, True, 0), (2, True, 0)]


def test_squares_are_drawn_equally_often_and_change_nothing_else(folder):
    plain = PersonalizedBase(folder, size=8, seed=1)
    dataset = PersonalizedBase(folder, size=8, seed=1, crops=2, zooms=OmegaConf.create([1, 1.5]))
    assert len(dataset.variants()) == 3 * 2 * 6 and len(dataset) == len(plain)
    drawn = [dataset.draw(i) for i in range(3000)]
    assert [draw[:3] for draw in drawn] == [plain.draw(i)[:3] for i in range(3000)]
    counts = Counter(draw.variant for draw in drawn)
    assert counts.keys() == set(dataset.variants()) and min(counts.values()) > 3000 / 36 / 2
    assert torch.equal(dataset[5]["image"], dataset.image(*dataset.draw(5).variant))


def test_using_a_sample_does_not_change_the_next(folder):
    dataset = PersonalizedBase(folder, size=8, flip_p=0)
    before = dataset[0]["image"].clone()
    dataset[0]["image"].zero_()
    assert torch.equal(dataset[0]["image"], before)


def test_per_image_tokens(folder):
    dataset = PersonalizedBase(folder, size=8, per_image_tokens=True, mixing_prob=0.25)
    draws = [dataset.draw(i) for i in range(3000)]
    mixed = [draw for draw in draws if " with " in draw.caption]
    assert 600 < len(mixed) < 900
    words = Counter((draw.image, draw.caption.rsplit(" with ", 1)[1]) for draw in mixed)
    assert set(words) == {(0, "א"), (1, "ב"), (2, "ג")}
    assert all("*" in draw.caption for draw in mixed)


def test_per_image_tokens_end_after_22(tmp_path):
    colours = [(i, 0, 0) for i in range(23)]
    folder = folder_of(tmp_path / "set", colours[:22], size=(8, 8))
    dataset = PersonalizedBase(folder, per_image_tokens=True, mixing_prob=1)
    assert dataset.draw(21).caption.endswith(" with ת")
    folder_of(folder, colours, size=(8, 8))
    with pytest.raises(UserError, match="22 images.*23"):
        PersonalizedBase(folder, per_image_tokens=True)
    assert PersonalizedBase(folder).num_images == 23


def test_style_differs_in_templates_only(folder):
    style = personalized_style.PersonalizedBase(
        folder, size=8, per_image_tokens=True, coarse_class_text="ink"
    )
    assert isinstance(style, PersonalizedBase)
    assert style.templates == list(prompts.STYLE_TEMPLATES)
    assert style.dual_templates == list(prompts.STYLE_DUAL_TEMPLATES)
    assert "a painting in the style of ink * with א" in style.captions()


def test_several_concepts(tmp_path):
    roots = {
        "<cat>": str(folder_of(tmp_path / "cat", COLOURS[:1])),
        "<dog>": str(folder_of(tmp_path / "dog", COLOURS[1:])),
    }
    node = OmegaConf.create({"data_root": roots, "coarse_class_text": {"<cat>": "cat"}})
    dataset = PersonalizedBase(size=8, flip_p=0, **node)
    assert dataset.placeholders == ["<cat>", "<dog>"] and dataset.num_images == 3
    for i in range(60):
        sample = dataset[i]
        cat = i % 3 == 0
        assert ("cat <cat>" in sample["caption"]) == cat and ("<dog>" in sample["caption"]) != cat
        assert sample["image"][0, -1, i % 3] > 0.9


def test_what_is_no_image_is_skipped(folder, caplog):
    (folder / "notes.md").write_text("about the images")
    (folder / ".DS_Store").touch()
    (folder / "old").mkdir()
    with caplog.at_level(logging.INFO):
        assert PersonalizedBase(folder).num_images == 3
    assert len(caplog.records) == 1 and "notes.md, old/" in caplog.text


def test_old_names_of_the_lists():
    assert len(personalized.imagenet_templates_small) == 81
    assert len(personalized.per_img_token_list) == 22


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"flip_p": 1.5}, "flip_p is 1.5"),
        ({"mixing_prob": -1}, "mixing_prob is -1"),
        ({"repeats": 0}, "repeats is 0"),
        ({"size": 0}, "size is 0"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic': choose one of linear"),
        ({"placeholder_token": ""}, "placeholder of .* is empty"),
        ({"data_root": None}, "data_root is None"),
        ({"data_root": {}}, "data_root is empty"),
        ({"data_root": ["a"]}, "data_root is .*'a'"),
        ({"data_root": "no/such/folder"}, "not found: no/such/folder"),
        ({"coarse_class_text": {"<cat>": "cat"}}, "coarse_class_text names '<cat>'"),
    ],
)
@pytest.mark.refused_first
def test_mistakes_are_one_line(folder, params: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        PersonalizedBase(**{"data_root": folder, **params})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"just text", "cannot read image .*09.png"), (None, r"09\.png is 1x1 pixels")],
)
@pytest.mark.refused_first
def test_a_bad_image_is_named_before_training(folder, content: bytes | None, message: str):
    if content is None:
        Image.new("RGB", (1, 1)).save(folder / "09.png")
    else:
        (folder / "09.png").write_bytes(content)
    with pytest.raises(UserError, match=message):
        PersonalizedBase(folder, size=8)


def test_images_are_read_once_while_they_fit(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.new("RGB", (10, 10), (i, i, i)).save(path)
    reads = []

    def counted(path):
        reads.append(path)
        return Image.open(path).convert("RGB")

    monkeypatch.setattr(personalized, "open_image", counted)
    images = ImageSet(paths, size=8, memory=2 * 8 * 8 * 3)
    assert reads == paths
    for _ in range(2):
        for i in range(3):
            assert torch.equal(images[i, 0], torch.full((8, 8, 3), i, dtype=torch.uint8))
    assert reads[3:] == [paths[2], paths[2]]


def test_without_a_size_images_keep_their_size(tmp_path):
    Image.new("RGB", (10, 21)).save(tmp_path / "a.png")
    assert ImageSet([tmp_path / "a.png"], size=None)[0, 0].shape == (10, 10, 3)
    assert ImageSet([tmp_path / "a.png"], size=None, center_crop=False)[0, 0].shape == (21, 10, 3)


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_images_are_cropped_to_the_squares(tmp_path, memory):
    pixels = np.random.RandomState(0).randint(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:, :20]).save(tmp_path / "b.png")
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    images = ImageSet(paths, size=20, crops=2, zooms=[1, 2], memory=memory)
    assert [images.views(i) for i in range(2)] == [6, 5]
    assert np.array_equal(images[0, 1], pixels[:, 10:])
    zoomed = Image.fromarray(pixels[10:, 20:]).resize((20, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(images[0, 5], np.asarray(zoomed))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"crops": 0}, "crops is 0"),
        ({"crops": 1.5}, "crops is 1.5"),
        ({"zooms": []}, "zooms is"),
        ({"zooms": [0.5]}, "numbers of at least 1"),
        ({"zooms": "2"}, "zooms is '2'"),
        ({"zooms": [1, 2], "size": None}, "zooms needs a size"),
        ({"crops": 2, "center_crop": False}, "center_crop: false stretches"),
        ({"zooms": [1, 1.5]}, "10x21 pixels: each side needs at least 12 at zoom 1.5; use a larger"),
    ],
)
@pytest.mark.refused_first
def test_invalid_squares_are_user_errors(tmp_path, params, message):
    Image.new("RGB", (10, 21)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=message):
        ImageSet([tmp_path / "a.png"], **{"size": 8, **params})


@pytest.mark.refused_first
def test_a_spawned_process_gets_no_images_but_reads_and_keeps_those_it_needs(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.new("RGB", (16, 16), COLOURS[i]).save(path)
    images = ImageSet(paths, size=16, memory=2 * 16 * 16 * 3)
    sent = pickle.dumps(images)
    assert len(sent) < 2000
    received = pickle.loads(sent)
    opened = []
    monkeypatch.setattr(personalized, "open_image", lambda path: opened.append(path) or Image.open(path))
    for _ in range(2):
        for i in range(3):
            assert torch.equal(received[i, 0], images[i, 0])
    # The originals hold two of three, and so does the copy: the third is read each time, by both.
    assert [opened.count(path) for path in paths] == [1, 1, 4]


@pytest.mark.refused_first
def test_reading_many_images_counts_aloud(tmp_path, monkeypatch, caplog):
    clock = iter(range(0, 1000, 11))
    monkeypatch.setattr("ldm.util.time.monotonic", lambda: next(clock))
    folder_of(tmp_path / "set")
    with caplog.at_level(logging.INFO):
        PersonalizedBase(tmp_path / "set", size=8)
    assert [r.message for r in caplog.records] == ["read 1 of 3 images", "read 2 of 3 images"]
