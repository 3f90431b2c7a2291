"""Loading our files in a small diffusers pipeline with random weights."""

from __future__ import annotations

import pytest
import torch

from ldm.embeddings import Concept, LearnedEmbeddings, write
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import skip_pretrained
from tests.embeddings.samples import GOLDEN, clip_folder, vectors

pytestmark = pytest.mark.client_files

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def parts():
    config = transformers.CLIPTextConfig.from_pretrained(GOLDEN / "clip_tiny")
    torch.manual_seed(0)
    return {
        "text_encoder": transformers.CLIPTextModel(config).eval(),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(8,),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
        ),
        "unet": diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    }


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def pipeline(parts, encoder_folder):
    """A pipeline with a new tokenizer, and the text encoder without the rows that other tests added."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(encoder_folder)
    parts["text_encoder"].resize_token_embeddings(49408)
    return diffusers.StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def embedded(pipeline, word: str, count: int) -> torch.Tensor:
    """Return the token embeddings that diffusers uses for the trigger in a prompt."""
    text = pipeline.maybe_convert_prompt(f"a photo of {word}", pipeline.tokenizer)
    ids = pipeline.tokenizer(text).input_ids
    table = pipeline.text_encoder.get_input_embeddings().weight
    return table[ids[4 : 4 + count]].detach()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("format", ["diffusers", "a1111", "safetensors"])
def test_diffusers_loads_our_files(format, count, pipeline, tmp_path):
    expected = vectors(count, 32)
    embeddings = LearnedEmbeddings((Concept("<my-cat>", expected),))
    suffix = ".pt" if format == "a1111" else ".safetensors"
    path = write(embeddings, tmp_path / f"my-cat{suffix}", format)
    token = "<my-cat>" if format == "safetensors" else None
    pipeline.load_textual_inversion(str(tmp_path), weight_name=path.name, token=token)
    assert torch.equal(embedded(pipeline, "<my-cat>", count), expected)


def test_the_call_that_a_run_ends_with(pipeline, tmp_path):
    """main.py prints it for a file of "*", a word of the vocabulary, which diffusers refuses."""
    path = write(
        LearnedEmbeddings((Concept("*", vectors(2, 32)),)), tmp_path / "bobo.safetensors", "safetensors"
    )
    pipeline.tokenizer.add_tokens("*")
    with pytest.raises(ValueError, match="already in tokenizer vocabulary"):
        pipeline.load_textual_inversion(path.as_posix(), token="*")
    pipeline.load_textual_inversion(path.as_posix(), token="<bobo>")
    assert torch.equal(embedded(pipeline, "<bobo>", 2), vectors(2, 32))


@pytest.mark.parametrize("count", [1, 3])
def test_diffusers_prompt_embeddings_equal_ours(count, pipeline, encoder_folder, tmp_path):
    embeddings = LearnedEmbeddings((Concept("<my-cat>", vectors(count, 32, seed=count)),))
    prompt = "a photo of <my-cat> on the beach"
    with skip_pretrained():
        embedder = FrozenCLIPEmbedder(version=str(encoder_folder))
    weights = pipeline.text_encoder.state_dict()
    weights = {key if key.startswith("text_model.") else f"text_model.{key}": weights[key] for key in weights}
    embedder.transformer.load_state_dict(weights)
    manager = EmbeddingManager(embedder, ["<my-cat>"])
    manager.load(write(embeddings, tmp_path / "embeddings.pt", "original"))
    ours = embedder([prompt], embedding_manager=manager)

    path = write(embeddings, tmp_path / "learned_embeds.safetensors", "diffusers")
    pipeline.load_textual_inversion(str(tmp_path), weight_name=path.name)
    theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    plain, _ = pipeline.encode_prompt("a photo of cat on the beach", "cpu", 1, False)
    assert (ours - plain).abs().max() > 1e-2
