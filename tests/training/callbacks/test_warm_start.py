"""The warm start by CLIP."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig

from ldm.data.personalized import PersonalizedBase
from ldm.images import to_pil
from ldm.models.features import load_features
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.methods import METHODS
from ldm.training.callbacks import warm_start
from ldm.training.callbacks.warm_start import WarmStart, end_states, features_of
from ldm.util import UserError
from tests.golden_record import GOLDEN, Golden
from tests.modules.methods.conftest import words
from tests.training.runs import start

WARM, LOGGED = "lightning.callbacks.warm_start.params.steps=4", "warm start: cosine of captions and images"


def make_clip(folder: Path, width: int = 32) -> Path:
    """A CLIP with random weights and the golden tokenizer."""
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    own = CLIPTextConfig.from_pretrained(GOLDEN / "clip_tiny").to_dict()
    text = own if width == 32 else {**own, "hidden_size": width}
    vision = small | {"hidden_size": 32, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    crop = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=crop).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).write_bytes((GOLDEN / "clip_tiny" / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP whose text tower is the golden model's encoder."""
    folder = make_clip(tmp_path_factory.mktemp("clip"))
    weights = load_file(folder / "model.safetensors")
    encoder = Golden("clip_one_vector").model(load_embeddings=False).cond_stage_model
    for key, value in encoder.transformer.state_dict().items():
        assert weights[key].shape == value.shape
        weights[key] = value.contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def tower(clip: Path) -> str:
    return f"model.params.cond_stage_config.params.image_tower={clip}"


def learned(folder: str) -> torch.Tensor:
    (run,) = Path(folder).iterdir()
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state["embedding_manager.string_to_param_dict.*"]


def test_captions_describe_the_images(clip, image_folder):
    model = Golden("clip_one_vector").model(load_embeddings=False)
    encoder = model.cond_stage_model
    manager = EmbeddingManager(encoder, ["*"], ["dog"], num_vectors_per_token=2)
    features = load_features(clip, "cpu", "image_tower")
    dataset = PersonalizedBase(image_folder, size=32, seed=0)
    generator = torch.get_rng_state()
    first, last = WarmStart(steps=30).train_vectors(encoder, manager, dataset, features)
    assert last > first + 0.2
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())
    # The vectors fit all captions and images, not only the last ones drawn.
    shown = features.image([to_pil(dataset.image(number).movedim(-1, 0)) for number in range(3)])
    message = features.of_states(end_states(encoder, manager, ["a photo of a *", "the photo of a small *"]))
    assert (message @ shown.T).mean() > first + 0.15


def test_only_drawn_images_are_read(clip, image_folder, monkeypatch):
    encoder = Golden("clip_one_vector").model(load_embeddings=False).cond_stage_model
    dataset = PersonalizedBase(image_folder, size=32, seed=0, zooms=[1, 1.25, 1.5], crops=5)
    shown = []
    image = dataset.image
    monkeypatch.setattr(dataset, "image", lambda *variant: shown.append(variant) or image(*variant))
    WarmStart(steps=2, captions=4).train_vectors(
        encoder, EmbeddingManager(encoder, ["*"], ["dog"]), dataset, load_features(clip, "cpu")
    )
    assert len(dataset.variants()) > 100
    assert len(shown) <= 8 and set(shown) == {dataset.draw(index).variant for index in range(8)}


def test_each_step_uses_its_own_captions(clip, image_folder, monkeypatch):
    encoder = Golden("clip_one_vector").model(load_embeddings=False).cond_stage_model
    dataset = PersonalizedBase(image_folder, size=32, seed=0)
    used = []

    def recorded(encoder, manager, captions):
        used.append(captions)
        return end_states(encoder, manager, captions)

    monkeypatch.setattr(warm_start, "end_states", recorded)
    WarmStart(steps=2, captions=4).train_vectors(
        encoder, EmbeddingManager(encoder, ["*"], ["dog"]), dataset, load_features(clip, "cpu")
    )
    drawn = [dataset.draw(index).caption for index in range(8)]
    assert used == [drawn[:4], drawn[4:]]


def test_end_states_after_inserted_vectors():
    encoder = Golden("clip_one_vector").model(load_embeddings=False).cond_stage_model
    manager = EmbeddingManager(encoder, ["*", "@"], ["red bird", "dog"], num_vectors_per_token={"*": 2})
    found = end_states(encoder, manager, ["a photo of a * and a @", "*", "a photo", "@ " + "a " * 40 + "*"])
    words = ["a photo of a red bird and a dog", "red bird", "a photo"]
    ids = encoder.token_ids(words)
    ends = (ids == encoder.prompt_tokenizer.end_id).int().argmax(dim=1)
    torch.testing.assert_close(found[:3], encoder(words)[range(3), ends])
    assert found[3].isfinite().all()


def test_training_afterwards_is_unchanged(tiny_yaml, tower, capsys):
    assert start("--base", tiny_yaml, "-t", "-l", "without") == 0
    still = [WARM, "lightning.callbacks.warm_start.params.rate=1e-30", tower]
    assert start("--base", tiny_yaml, "-t", "-l", "still", *still) == 0
    assert LOGGED in capsys.readouterr().out
    assert torch.equal(learned("still"), learned("without"))
    assert start("--base", tiny_yaml, "-t", "-l", "warm", WARM, tower) == 0
    assert not torch.allclose(learned("warm"), learned("without"), atol=1e-3)


def test_half_precision(tiny_yaml, tower, capsys):
    assert (
        start("--base", tiny_yaml, "-t", "-l", "half", WARM, tower, "lightning.trainer.precision=bf16-mixed")
        == 0
    )
    assert LOGGED in capsys.readouterr().out


def test_learned_vectors_are_not_changed(tiny_yaml, tower, capsys):
    assert start("--base", tiny_yaml, "-t", "-l", "whole", WARM, tower) == 0
    assert start("--base", tiny_yaml, "-t", "-l", "half", WARM, tower, "--max_steps", "4") == 0
    assert capsys.readouterr().out.count(LOGGED) == 2
    (run,) = Path("half").iterdir()
    assert start("-r", run, "-t", "--max_steps", "6") == 0
    assert torch.equal(learned("half"), learned("whole"))
    file = run / "checkpoints" / "embeddings.pt"
    assert start("--base", tiny_yaml, "-t", "-l", "file", WARM, tower, "--embedding_manager_ckpt", file) == 0
    assert LOGGED not in capsys.readouterr().out


def test_vectors_of_a_checkpoint_are_not_changed():
    model = Golden("clip_one_vector").model(load_embeddings=False)
    assert not model.embedding_manager.loaded
    model.load_state_dict(model.state_dict())
    assert model.embedding_manager.loaded
    before = model.embedding_manager.export()["*"]
    WarmStart().on_fit_start(SimpleNamespace(ckpt_path=None), model)
    assert torch.equal(model.embedding_manager.export()["*"], before)


def test_norm_control_during_the_warm_start(clip, image_folder):
    encoder = Golden("clip_one_vector").model(load_embeddings=False).cond_stage_model
    manager = EmbeddingManager(encoder, ["*"], ["dog"], norm_control="fixed")
    dataset = PersonalizedBase(image_folder, size=32, seed=0)
    first = manager.export()["*"]
    WarmStart(steps=5).train_vectors(encoder, manager, dataset, load_features(clip, "cpu"))
    usual = encoder.token_embedding.weight.norm(dim=1).mean()
    assert float(manager.export()["*"].norm()) == pytest.approx(float(usual), rel=1e-3)
    assert not torch.allclose(manager.export()["*"], first, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_words_of_methods(method, clip, image_folder, caplog):
    """What is before the text encoder moves, and nothing else; a word without any begins unchanged."""
    model = Golden("clip_one_vector").model(load_embeddings=False)
    made = words(model, method)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    vectors = list(made.input_vectors())
    if vectors:
        dataset = PersonalizedBase(image_folder, size=32, seed=0)
        WarmStart(steps=1).train_vectors(model.cond_stage_model, made, dataset, load_features(clip, "cpu"))
    else:
        WarmStart().on_fit_start(SimpleNamespace(ckpt_path=None), model)
        assert f"no warm start: {type(made).__name__} learns no vectors" in caplog.text
    own = {id(vector) for vector in vectors}
    moved = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, parameter in made.named_parameters() if id(parameter) in own}


def test_what_masks_leave_out_is_gray(image_folder, tmp_path):
    folder = shutil.copytree(image_folder, tmp_path / "masked")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    for path in list(folder.iterdir()):
        mask.save(path.with_name(f"{path.stem}-masklabel.png"))
    dataset = PersonalizedBase(folder, size=32, seed=0, center_crop=False, flip_p=0.0, mask_weight=0.0)
    shown = np.asarray(warm_start._shown(dataset, 0, False, 0))
    whole = np.asarray(to_pil(dataset.image(0).movedim(-1, 0)))
    assert (
        np.array_equal(shown[:, :15], whole[:, :15])
        and np.ptp(shown[:, 17:]) == 0
        and np.ptp(whole[:, 17:]) > 0
    )


@pytest.mark.parametrize("case", ["clip_one_vector", "bert_one_vector"])
def test_encoder_without_image_tower(case):
    encoder = Golden(case).model(load_embeddings=False).cond_stage_model
    reason = "image_tower" if case.startswith("clip") else "BERTEmbedder has no image tower"
    with pytest.raises(UserError, match=reason):
        features_of(encoder, SimpleNamespace(draw=1, image=1))
    with pytest.raises(UserError, match="SimpleNamespace does not give images|no image tower"):
        features_of(encoder, SimpleNamespace())


@pytest.mark.parametrize(
    ("width", "message"), [(32, "belongs to another CLIP than the text encoder"), (16, "width 16, not 32")]
)
def test_image_tower_of_another_clip(width, message, tiny_yaml, tmp_path, capsys):
    other = make_clip(tmp_path / "stranger", width)
    tower = f"model.params.cond_stage_config.params.image_tower={other}"
    assert start("--base", tiny_yaml, "-t", "-l", "without") == 0
    assert start("--base", tiny_yaml, "-t", "-l", "other", WARM, tower) == 0
    logged = capsys.readouterr()
    assert "no warm start, the vectors keep their initial values: " in logged.out + logged.err
    assert message in logged.out + logged.err
    assert torch.equal(learned("other"), learned("without"))


@pytest.mark.parametrize("params", [{"steps": 0}, {"captions": 1.5}, {"rate": 0.0}])
def test_invalid_settings(params):
    with pytest.raises(UserError, match=f"warm_start: {next(iter(params))} is"):
        WarmStart(**params)
