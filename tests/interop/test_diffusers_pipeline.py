"""The converted pipeline of diffusers generates the same images as the model (dev extra)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from ldm.base_models import complete_config, recognise
from ldm.checkpoint import load_model_from_config
from ldm.embeddings import Concept, LearnedEmbeddings, read, write
from ldm.generate.embeddings import load_embeddings
from ldm.generate.images import generate
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.util import UserError, instantiate_from_config, skip_pretrained
from tests.embeddings.samples import clip_folder, vectors
from tests.golden_record import Golden, fill

diffusers = pytest.importorskip("diffusers")

from ldm.interop import diffusers_pipeline  # noqa: E402
from tests.pipelines import make_pipeline  # noqa: E402

EMBEDDED = Path(__file__).resolve().parents[2] / "models" / "ldm" / "creatures"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(clip_folder(tmp_path_factory.mktemp("clip")))


def build(config):
    with skip_pretrained():
        model = fill(instantiate_from_config(config))
    if model.scale_by_std:
        model.scale_factor.fill_(0.7)
    if model.use_ema:
        fill(model.model, "averaged.")
        model.model_ema.reset(model.model)
        fill(model.model, "model.")
    return model


def as_stable_diffusion(config):
    """Noise is predicted, the first stage has 32 normalisation groups, the scale is a number in the YAML."""


def as_embedded(config):
    """The options of the embedded model that Stable Diffusion does not use, and averaged weights."""
    params = config.params
    params.update(parameterization="v", scale_by_std=True, channels=8, use_ema=True)
    del params.scale_factor
    params.unet_config.params.update(in_channels=8, out_channels=8, attention_resolutions=[1, 2])
    first = params.first_stage_config.params
    first.embed_dim = 8
    first.ddconfig.update(z_channels=8, ch=16, ch_mult=[1, 3, 6], num_groups=8)
    params.cond_stage_config.params.max_length = 32


def as_others(config):
    """Attention heads given by their channels, default values omitted, another schedule, x0 predicted."""
    params = config.params
    params.update(parameterization="x0", beta_schedule="cosine")
    unet = params.unet_config.params
    unet.num_head_channels = 16
    for name in ("num_heads", "transformer_depth", "use_checkpoint"):
        del unet[name]


@pytest.fixture(scope="module", params=[as_stable_diffusion, as_embedded, as_others])
def case(request, encoder):
    """(model, its config)"""
    config = Golden("clip_one_vector").config()
    config.params.cond_stage_config.params.version = encoder
    request.param(config)
    return build(config), config


@pytest.fixture(scope="module")
def exported(case, tmp_path_factory):
    """The folder of the exported model."""
    pipeline = diffusers_pipeline.to_pipeline(*case)
    return diffusers_pipeline.save_pipeline(pipeline, tmp_path_factory.mktemp("exported") / "pipeline")


def opened(folder):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def assert_same_images(model, pipeline, ours: str, theirs: str, steps=10, scale=3.0) -> None:
    """Compare latents up to rounding, and images up to one of 255 levels, from the same noise."""
    side = model.image_size
    noise = torch.randn(1, model.channels, side, side, generator=torch.Generator().manual_seed(3))
    with model.ema_scope():
        latents, _ = DDIMSampler(model).sample(
            steps,
            1,
            tuple(noise.shape[1:]),
            conditioning=model.get_learned_conditioning([ours]),
            x_T=noise,
            unconditional_guidance_scale=scale,
            unconditional_conditioning=model.get_learned_conditioning([""]),
        )
    options = {"num_inference_steps": steps, "guidance_scale": scale, "latents": noise}
    theirs_latents = pipeline(theirs, **options, output_type="latent").images
    assert (latents - theirs_latents).abs().max() <= 1e-3 * latents.abs().max()
    (image,) = generate(model, [ours], steps=steps, scale=scale, x_T=noise)
    (their_image,) = pipeline(theirs, **options).images
    assert image.size == their_image.size
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(their_image, dtype=int))
    assert difference.max() <= 1
    assert np.asarray(image).std() > 2, "the image must not be blank"


@pytest.mark.parametrize("count", [1, 3])
def test_the_same_noise_gives_the_same_image(case, exported, count, tmp_path) -> None:
    model, _ = case
    learned = LearnedEmbeddings((Concept("<my-cat>", vectors(count, 32, seed=count) * 20),))
    load_embeddings(model, write(learned, tmp_path / "embeddings.pt", "original"))
    path = write(learned, tmp_path / "learned_embeds.safetensors", "diffusers")
    pipeline = opened(exported)
    pipeline.load_textual_inversion(str(tmp_path), weight_name=path.name)
    assert_same_images(model, pipeline, "a photo of <my-cat>, small", "a photo of <my-cat>, small")


def assert_names_of_transformers_4(folder: Path) -> None:
    """It takes random weights for others, with a warning alone."""
    names = load_file(folder / "model.safetensors").keys()
    assert all(name.startswith(("text_model.", "text_projection.")) for name in names) and names


def test_words_are_saved_with_the_pipeline(case, tmp_path) -> None:
    model, config = case
    words = {"<my-cat>": vectors(3, 32, seed=1) * 20, "dusk-style": vectors(1, 32, seed=2) * 20}
    learned = LearnedEmbeddings(tuple(Concept(word, value) for word, value in words.items()))
    load_embeddings(model, write(learned, tmp_path / "embeddings.pt", "original"))
    pipeline = diffusers_pipeline.to_pipeline(model, config)
    diffusers_pipeline.add_words(pipeline, words)
    again = opened(diffusers_pipeline.save_pipeline(pipeline, tmp_path / "pipeline"))
    # The files that transformers 4 reads, which knows no tokenizer.json for this class.
    own, saved = Path(config.params.cond_stage_config.params.version), tmp_path / "pipeline" / "tokenizer"
    for name in ("vocab.json", "added_tokens.json"):
        assert json.loads((saved / name).read_text()).items() <= again.tokenizer.get_vocab().items()
    assert len(json.loads((saved / "added_tokens.json").read_text())) == 4
    assert (saved / "merges.txt").read_text().split("\n")[1:] == (own / "merges.txt").read_text().split("\n")[
        1:
    ]
    assert_names_of_transformers_4(tmp_path / "pipeline" / "text_encoder")
    found = diffusers_pipeline.compare_with_model(model, again, {word: word for word in words})
    assert sum(part.startswith("prompt") for part in found) == 3
    with pytest.raises(UserError, match=r'its prompt "a photo of a cat, small" is off by'):
        diffusers_pipeline.compare_with_model(model, again, {"<my-cat>": "a cat"})


def test_a_saved_pipeline_has_the_sizes_of_the_model(case, exported) -> None:
    model, _ = case
    pipeline = opened(exported)
    assert pipeline.tokenizer.model_max_length == model.cond_stage_model.max_length
    assert pipeline.unet.config.sample_size == model.image_size
    assert pipeline.vae.config.sample_size == 64
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


def test_known_noise_schedules_have_their_names(case) -> None:
    model, config = case
    scheduler = diffusers_pipeline.to_pipeline(model, config).scheduler.config
    cosine = config.params.get("beta_schedule") == "cosine"
    assert (scheduler.trained_betas is not None) == cosine
    if not cosine:
        assert (scheduler.beta_schedule, scheduler.beta_start, scheduler.beta_end) == (
            "scaled_linear",
            0.00085,
            0.012,
        )


def test_what_diffusers_cannot_represent_is_refused(encoder) -> None:
    config = Golden("clip_one_vector").config()
    config.params.cond_stage_config.params.version = encoder
    config.params.first_stage_config.params.ddconfig.tanh_out = True
    model = build(config)
    pipeline = diffusers_pipeline.to_pipeline(model, config)
    with pytest.raises(UserError, match="its first stage is off by"):
        diffusers_pipeline.compare_with_model(model, pipeline)
    config.params.unet_config.params.resblock_updown = True
    with pytest.raises(UserError, match="which the layout of diffusers has no place for") as error:
        diffusers_pipeline.to_pipeline(build(config), config)
    assert "\n" not in str(error.value)


def test_other_kinds_of_models_are_refused() -> None:
    bert = Golden("bert_one_vector")
    with pytest.raises(
        UserError,
        match="cond_stage_model is BERTEmbedder; exported are only FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder",
    ):
        diffusers_pipeline.to_pipeline(bert.model(load_embeddings=False), bert.config())
    with pytest.raises(UserError, match="Linear is not a LatentDiffusion"):
        diffusers_pipeline.to_pipeline(torch.nn.Linear(1, 1), {})


def test_words_that_cannot_be_added(case, tmp_path) -> None:
    pipeline = diffusers_pipeline.to_pipeline(*case)
    with pytest.raises(UserError, match=r"'\*' is a word of the tokenizer.*for example '<my-cat>'"):
        diffusers_pipeline.add_words(pipeline, {"*": vectors(1, 32)})
    pipeline.text_encoder.resize_token_embeddings(50000)
    with pytest.raises(UserError, match="the tokenizer has 49408 words and the text encoder 50000"):
        diffusers_pipeline.add_words(pipeline, {"<my-cat>": vectors(1, 32)})


def test_nothing_is_overwritten(case, tmp_path) -> None:
    (tmp_path / "mine").write_text("")
    pipeline = diffusers_pipeline.to_pipeline(*case)
    with pytest.raises(UserError, match="exists already; name another folder"):
        diffusers_pipeline.save_pipeline(pipeline, tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        diffusers_pipeline.save_pipeline(pipeline, tmp_path / "mine" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_missing_diffusers_is_an_error_of_one_line(case, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="diffusers is needed for this .*; pip install diffusers"):
        diffusers_pipeline.to_pipeline(*case)


@pytest.mark.skipif(not (EMBEDDED / "model.safetensors").is_file(), reason="the embedded model is not there")
def test_the_embedded_model(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(EMBEDDED.parents[2])  # the paths in the YAML are relative to the repository
    config = OmegaConf.load(EMBEDDED / "config.yaml")
    model = load_model_from_config(config, EMBEDDED / "model.safetensors")
    pipeline = diffusers_pipeline.to_pipeline(model, config)
    diffusers_pipeline.compare_with_model(model, pipeline)
    width = model.cond_stage_model.width
    # near tokens of the vocabulary, as learned vectors are
    table = model.cond_stage_model.token_embedding.weight.detach()
    rows = table[300:302] + 0.1 * table.std() * torch.randn(
        2, width, generator=torch.Generator().manual_seed(1)
    )
    learned = LearnedEmbeddings((Concept("<thing>", rows, "clip"),))
    load_embeddings(model, write(learned, tmp_path / "embeddings.pt", "original"))
    path = write(read(tmp_path / "embeddings.pt"), tmp_path / "learned_embeds.safetensors", "diffusers")
    again = opened(diffusers_pipeline.save_pipeline(pipeline, tmp_path / "pipeline"))
    again.load_textual_inversion(str(tmp_path), weight_name=path.name)
    assert_same_images(model, again, "a photo of <thing>", "a photo of <thing>", steps=20, scale=5.0)


def test_words_of_stable_diffusion_xl_enter_both_text_encoders(tmp_path) -> None:
    make_pipeline("sdxl", tmp_path / "tokenizers").save_pretrained(tmp_path / "pipeline")
    base = recognise(tmp_path / "pipeline")
    model = load_model_from_config(base.finetune_config, base.path)
    config, _ = complete_config(base.inference_config, base.path)
    rows = 0.05 * torch.randn(2, 32 + 64, generator=torch.Generator().manual_seed(1))
    model.embedding_manager.take({"<cat>": rows}, "the test")
    diffusers_pipeline.check_supported(model, ["<cat>"])
    pipeline = diffusers_pipeline.to_pipeline(model, config)
    diffusers_pipeline.add_words(pipeline, {"<cat>": rows})
    differences = diffusers_pipeline.compare_with_model(model, pipeline, {"<cat>": "<cat>"})
    assert 'pooled prompt "a photo of <cat>, small"' in differences
    saved = diffusers_pipeline.save_pipeline(pipeline, tmp_path / "saved")
    for name in ("text_encoder", "text_encoder_2"):
        assert_names_of_transformers_4(saved / name)
    again = diffusers.StableDiffusionXLPipeline.from_pretrained(saved)
    assert (
        diffusers_pipeline.compare_with_model(model, again, {"<cat>": "<cat>"}).keys() == differences.keys()
    )
    with pytest.raises(UserError, match="is a word of the tokenizer already"):
        diffusers_pipeline.check_supported(model, ["*"])
