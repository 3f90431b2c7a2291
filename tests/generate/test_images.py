"""`generate` on the small model of a golden record (images of 32 x 32, first stage of factor 4), and saved files."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.generate import generate
from ldm.generate.images import (
    ImageFolder,
    downsampling_factor,
    free_number,
    half_precision,
    latent_shape,
    name_of,
    noise_source,
    save_grid,
    save_image,
)
from ldm.images import open_image
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.util import UserError
from tests.golden_record import Golden

FAST = {"steps": 2, "scale": 3.0}


@pytest.fixture(scope="module")
def model():
    return Golden("clip_one_vector").model()


def difference(first: Image.Image, second: Image.Image) -> int:
    return np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max()


def test_one_image_per_prompt_in_the_models_own_size(model) -> None:
    images = generate(model, ["a photo of *", "a dog", "a dog"], **FAST)
    assert [image.size for image in images] == [(32, 32)] * 3
    assert difference(images[1], images[2]) > 0  # another number, other noise
    assert generate(model, "a dog", **FAST)[0].mode == "RGB"


def test_an_image_is_the_decoded_sample_of_its_noise(model) -> None:
    image = generate(model, "a photo of *", steps=3, scale=4.0, seed=7)[0]
    with torch.no_grad():
        latent, _ = DDIMSampler(model).sample(
            3,
            1,
            (4, 8, 8),
            conditioning=model.get_learned_conditioning(["a photo of *"]),
            unconditional_conditioning=model.get_learned_conditioning([""]),
            unconditional_guidance_scale=4.0,
            x_T=torch.randn(1, 4, 8, 8, generator=noise_source(7, 0)),
        )
        decoded = model.decode_first_stage(latent)[0]
    exact = decoded.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    assert difference(image, exact) <= 1


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_batch_size_does_not_matter(model, eta: float) -> None:
    prompts = ["a photo of *", "a dog", "a photo of *"]
    together = generate(model, prompts, batch_size=3, eta=eta, **FAST)
    apart = generate(model, prompts, batch_size=2, eta=eta, **FAST)
    assert all(difference(*pair) <= 1 for pair in zip(together, apart, strict=True))
    assert difference(together[0], together[2]) > 1


def test_eta_changes_the_image(model) -> None:
    first, other = (generate(model, "a dog", steps=3, eta=eta)[0] for eta in (0.0, 1.0))
    assert difference(first, other) > 0


def test_seed_number_and_negative_prompt_change_the_image(model) -> None:
    first = generate(model, "a dog", **FAST)[0]
    assert difference(first, generate(model, "a dog", **FAST)[0]) == 0
    assert difference(first, generate(model, "a dog", seed=43, **FAST)[0]) > 0
    assert difference(first, generate(model, "a dog", negative_prompt="a photo", **FAST)[0]) > 0
    numbered = generate(model, ["a dog"] * 2, numbers=[5, 0], **FAST)
    assert difference(first, numbered[0]) > 0 and difference(first, numbered[1]) <= 1


def test_given_noise_is_used(model) -> None:
    x_T = torch.randn(2, 4, 8, 8)
    first = generate(model, ["a dog"] * 2, x_T=x_T, batch_size=1, **FAST)
    again = generate(model, ["a dog"] * 2, x_T=x_T.flip(0), seed=1, **FAST)
    assert difference(first[0], again[1]) <= 1 and difference(first[0], first[1]) > 0


@pytest.mark.parametrize("sampler", ["plms", "dpm_solver"])
def test_every_sampler_generates_another_image(model, sampler: str) -> None:
    ddim, other = (generate(model, "a dog", sampler=name, **FAST)[0] for name in ("ddim", sampler))
    assert difference(ddim, other) > 0


class Float64(TorchDispatchMode):
    """Collects the operations that give float64, which Apple GPUs lack."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.operations.add(str(function))
        return result


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
def test_nothing_on_the_device_is_float64(model, sampler: str) -> None:
    assert torch.float64 not in {tensor.dtype for tensor in [*model.parameters(), *model.buffers()]}
    with Float64() as seen:
        generate(model, "a photo of *", sampler=sampler, steps=3, seed=1)
        latents = torch.zeros(1, model.channels, 8, 8)
        model.p_losses(latents, model.get_learned_conditioning(["a *"]), model.random_timesteps(1))
    # The schedule, which is copied to the CPU before.
    assert seen.operations <= {"aten._to_copy.default", "aten.detach.default"}


def test_progress_and_images_are_reported_immediately(model) -> None:
    events = []
    generate(
        model,
        ["a dog"] * 3,
        batch_size=2,
        progress=lambda done, total: events.append((done, total)),
        on_image=lambda place, image: events.append((place, image.size)),
        **FAST,
    )
    size = (32, 32)
    assert events == [(1, 4), (2, 4), (0, size), (1, size), (3, 4), (4, 4), (2, size)]


def test_no_text_is_encoded_for_nothing(model, monkeypatch) -> None:
    encoded = []
    original = model.get_learned_conditioning
    monkeypatch.setattr(model, "get_learned_conditioning", lambda c: encoded.append(c) or original(c))
    generate(model, "a dog", steps=1, scale=1.0)
    assert encoded == [["a dog"]]


def test_every_batch_has_its_own_prompts(model, monkeypatch) -> None:
    encoded = []
    original = model.get_learned_conditioning
    monkeypatch.setattr(model, "get_learned_conditioning", lambda c: encoded.append(c) or original(c))
    generate(model, ["a dog", "a photo", "a *"], steps=1, batch_size=2, negative_prompt="no")
    assert encoded == [["a dog", "a photo"], ["no", "no"], ["a *"], ["no"]]


def test_the_model_is_in_eval_mode_and_its_mode_is_restored(model) -> None:
    model.train()
    modes = []
    generate(model, "a dog", on_image=lambda place, image: modes.append(model.training), **FAST)
    assert model.training and modes == [False]
    model.eval()


def test_averaged_weights_are_used(model, monkeypatch) -> None:
    inside = []

    class Scope:
        def __enter__(self):
            inside.append("entered")

        def __exit__(self, *error):
            inside.append("left")

    monkeypatch.setattr(model, "ema_scope", Scope)
    generate(model, "a dog", steps=1, on_image=lambda place, image: inside.append("image"))
    assert inside == ["entered", "image", "left"]


def test_the_size_is_an_argument(model) -> None:
    assert generate(model, "a dog", steps=1, height=48, width=64)[0].size == (64, 48)


def test_the_downsampling_factor_of_the_first_stage(model) -> None:
    assert downsampling_factor(model) == 4
    assert latent_shape(model, None, None) == (4, 8, 8)
    assert latent_shape(model, 64, None) == (4, 16, 8)


def test_a_model_of_images_that_are_not_square_keeps_its_size(model, monkeypatch) -> None:
    monkeypatch.setattr(model, "image_size", [8, 16])
    assert latent_shape(model, None, None) == (4, 8, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "sampling steps is 0; it must be a whole number from 1"),
        ({"steps": 1001}, "more than the model's 1000"),
        ({"eta": 2.0}, "eta is 2.0"),
        ({"scale": float("nan")}, "guidance scale is nan; it must be a number"),
        ({"seed": -1}, "the seed is -1"),
        ({"steps": 2.5}, "sampling steps is 2.5; it must be a whole number"),
        ({"eta": 0.5, "sampler": "plms"}, "eta is 0.5, but the sampler plms is deterministic"),
        ({"sampler": "euler"}, 'unknown sampler "euler"; choose one of ddim, plms, dpm_solver'),
        ({"precision": "half"}, 'unknown precision "half"; choose one of full, autocast'),
        ({"batch_size": 0}, "batch size is 0"),
        ({"steps": "9"}, "sampling steps is .9.; it must"),
        ({"scale": "high"}, "guidance scale is .high.; it must be a number"),
        ({"width": 32.0}, "width is 32.0; it must be a whole number"),
        ({"height": -8}, "height is -8"),
        ({"width": 36}, "width 36 is not a multiple of 8, which this model needs; try 32"),
        ({"height": 1}, "height 1 is not a multiple of 8, which this model needs; try 8"),
    ],
)
def test_wrong_settings_are_named(model, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, "a dog", **settings)


def test_noise_differs_between_seeds_and_numbers() -> None:
    drawn = {
        (seed, number): torch.randn(4, generator=noise_source(seed, number))
        for seed in (-1, 42, 43)
        for number in (0, 1)
    }
    assert torch.equal(drawn[42, 1], torch.randn(4, generator=noise_source(42, 1)))
    firsts = {noise[0].item() for noise in drawn.values()}
    assert len(firsts) == len(drawn)


def test_autocast_is_for_accelerators(monkeypatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda device, dtype: (device, dtype))
    assert half_precision("autocast", SimpleNamespace(type="cuda")) == ("cuda", torch.float16)
    assert isinstance(half_precision("autocast", SimpleNamespace(type="cpu")), nullcontext)
    assert isinstance(half_precision("full", SimpleNamespace(type="cuda")), nullcontext)


RED = Image.new("RGB", (8, 6), "red")


def test_saved_images_continue_the_numbers_of_existing_files(tmp_path) -> None:
    for name in ("0002.jpg", "0007.png", "notes.txt", "12b.png"):
        (tmp_path / name).touch()
    folder = ImageFolder(tmp_path)
    assert [folder.save(RED).name for _ in range(2)] == ["0008.png", "0009.png"]
    assert open_image(tmp_path / "0008.png").getpixel((0, 0)) == (255, 0, 0)
    assert ImageFolder(tmp_path / "new" / "one", "jpg", digits=5).save(RED).name == "00000.jpg"


def test_a_jpeg_keeps_its_colours(tmp_path) -> None:
    image = RED.copy()
    image.putpixel((3, 3), (0, 0, 255))  # a single pixel, which subsampled colour would blur
    saved = open_image(ImageFolder(tmp_path, "jpg").save(image))
    assert all(abs(a - b) < 12 for a, b in zip(saved.getpixel((3, 3)), (0, 0, 255), strict=True))


def test_numbers_after_a_prefix(tmp_path) -> None:
    for name in ("a-dog-0003.png", "a-dog-big-0008.png", "a-dog.png", "0009.png"):
        (tmp_path / name).touch()
    assert free_number(tmp_path, "a-dog-") == 4 and free_number(tmp_path, "cat-") == 0


def test_a_grid_has_rows_of_columns(tmp_path) -> None:
    path = save_grid([RED] * 3, 2, tmp_path / "grid.png")
    assert open_image(path).size == (2 * 10 + 2, 2 * 8 + 2)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a photo of *, small", "a-photo-of-*,-small"),
        ("../../etc/passwd", "_._.._etc_passwd"),
        ("a\tb\nc\0d", "a-b-c_d"),
        (".hidden", "_hidden"),
        ("", "grid"),
        ("é" * 300, "é" * 100),
    ],
)
def test_a_file_name_for_a_prompt(tmp_path, prompt: str, name: str) -> None:
    assert name_of(prompt) == name
    (tmp_path / f"{name}-0000.png").touch()


def test_a_folder_that_cannot_be_created_is_named(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot create the folder '.*file/samples' \(Not a directory\)"):
        ImageFolder(tmp_path / "file" / "samples")


def test_an_image_file_has_a_known_suffix(tmp_path) -> None:
    with pytest.raises(UserError, match="does not end in .png or .jpg"):
        save_image(Image.new("RGB", (8, 8)), tmp_path / "a.webp")
