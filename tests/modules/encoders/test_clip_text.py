from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.modules.encoders import modules as clip_module
from ldm.modules.encoders.clip_text import CLIPText
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.personalization import TextEncoder
from ldm.util import UserError, skip_pretrained
from tests.golden_record import GOLDEN

TINY = GOLDEN / "clip_tiny"


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "clip"))


def test_output_is_that_of_transformers(clip):
    """The untouched model of transformers, with the same weights."""
    model = CLIPTextModel(CLIPTextConfig.from_pretrained(TINY)).eval()
    flat = not hasattr(model, "text_model")
    state = clip.transformer.state_dict()
    model.load_state_dict({key.removeprefix("text_model.") if flat else key: v for key, v in state.items()})
    ids = clip.prompt_tokenizer.encode(["a photo of a dog", ""])
    torch.testing.assert_close(clip(["a photo of a dog", ""]), model(input_ids=ids).last_hidden_state)


def test_prompts_take_the_plain_product_where_it_is_faster(clip, monkeypatch):
    if not hasattr(clip.transformer.text_model, "set_attn_implementation"):
        pytest.skip("this transformers settles the kind of attention when a model is built")

    def fused(*arguments, **keywords):
        raise AssertionError("the fused kernel")

    exact = clip(["a dog"])
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(clip(["a dog"]).float(), exact, rtol=0.1, atol=0.1)
    with pytest.raises(AssertionError, match="the fused kernel"):
        clip(["a dog"])


def test_the_manager_sees_ids_and_token_embeddings_before_positions(clip):
    seen = []
    clip.embed_ids(clip.token_ids("a dog"), lambda ids, embedded: seen.append((ids, embedded)) or embedded)
    ids, embedded = seen[0]
    assert torch.equal(ids, clip.prompt_tokenizer.encode("a dog"))
    assert torch.equal(embedded, clip.token_embedding(ids))


def test_the_picture_tower_is_named_and_not_read(folder):
    (folder / "towers").mkdir()
    with skip_pretrained():
        assert FrozenCLIPEmbedder(str(folder)).image_tower == str(folder)
        towers = str(folder / "towers")
        assert FrozenCLIPEmbedder(str(folder), image_tower=towers).image_tower == towers
        with pytest.raises(UserError, match="image_tower './absent': there is no such folder"):
            FrozenCLIPEmbedder(str(folder), image_tower="./absent")


def test_a_manager_is_forgotten_after_its_call(clip):
    ids = clip.prompt_tokenizer.encode("a dog")
    plain = clip("a dog")
    for manager, error in ((lambda ids, embedded: embedded + 1, None), (_raise, "mine")):
        with pytest.raises(RuntimeError, match=error) if error else nullcontext():
            clip.embed_ids(ids, manager)
        assert torch.equal(clip.transformer(ids), plain)


def _raise(*_):
    raise RuntimeError("mine")


def test_it_is_a_text_encoder_of_the_contract(clip):
    assert isinstance(clip, TextEncoder)
    assert not isinstance(nn.Linear(1, 1), TextEncoder)


def test_names_and_shapes_are_those_of_stable_diffusion(folder):
    large = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
    }
    config = json.loads((folder / "config.json").read_text()) | large
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"), skip_pretrained():
        encoder = FrozenCLIPEmbedder(str(folder))
    manifest = json.loads((GOLDEN / "sd_v1.state_dict.json").read_text())
    prefix = "cond_stage_model."
    expected = {k.removeprefix(prefix): tuple(v) for k, v in manifest.items() if k.startswith(prefix)}
    expected.pop("transformer.text_model.embeddings.position_ids")
    assert {key: tuple(value.shape) for key, value in encoder.state_dict().items()} == expected
    assert {key for key, _ in encoder.named_parameters()} == set(expected)
    # nothing remains that a checkpoint does not bring
    state = {key: torch.zeros(shape) for key, shape in expected.items()}
    encoder.load_state_dict(state, assign=True)
    assert not any(tensor.is_meta for tensor in [*encoder.parameters(), *encoder.buffers()])


def test_position_ids_of_old_checkpoints_are_ignored(clip):
    state = {f"cond_stage_model.{key}": value for key, value in clip.state_dict().items()}
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    holder = nn.Module()
    holder.cond_stage_model = copy.deepcopy(clip)
    assert not any(holder.load_state_dict(state))


class LayoutFour(nn.Module):
    """As transformers 4 lays it out: the model proper inside a shell."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.text_model = inner


def test_both_layouts_of_transformers_give_the_same_names_and_numbers(clip):
    model = CLIPTextModel(CLIPTextConfig.from_pretrained(TINY))
    inner = getattr(model, "text_model", model)
    for layout in (copy.deepcopy(inner), LayoutFour(copy.deepcopy(inner))):
        text = CLIPText(layout)
        text.load_state_dict(clip.transformer.state_dict())
        torch.testing.assert_close(text.eval()(clip.token_ids("a dog")), clip("a dog"))


def test_the_modules_stay_those_of_transformers(clip):
    model = CLIPTextModel(CLIPTextConfig.from_pretrained(TINY))
    inner = getattr(model, "text_model", model)
    ours = {name: type(module) for name, module in clip.transformer.text_model.named_modules()}
    assert ours == {name: type(module) for name, module in inner.named_modules()}


class EncoderFour(nn.Module):
    """The transformer with the arguments of transformers 4."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.layers, self._encoder = encoder.layers, [encoder]

    def forward(self, inputs_embeds, attention_mask=None, causal_attention_mask=None):
        assert attention_mask is None
        return self._encoder[0](inputs_embeds=inputs_embeds, attention_mask=causal_attention_mask)


def test_the_arguments_of_both_versions_give_the_same_numbers(clip):
    other = copy.deepcopy(clip)
    other.transformer.text_model.encoder = EncoderFour(other.transformer.text_model.encoder)
    torch.testing.assert_close(other("a photo of a dog"), clip("a photo of a dog"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda clip: pickle.loads(pickle.dumps(clip))])
def test_the_forwards_of_a_copy_are_its_own(clip, copied):
    other = copied(clip)
    with torch.no_grad():
        other.token_embedding.weight.zero_()
        other.transformer.text_model.final_layer_norm.bias.add_(1)
    ids = clip.token_ids("a dog")
    seen = []
    other.embed_ids(ids, lambda ids, embedded: seen.append(embedded) or embedded)
    assert not seen[0].any()
    assert not torch.allclose(other("a dog"), clip("a dog"))


def test_it_is_frozen_stays_so_and_can_be_trained_from_scratch():
    with skip_pretrained():
        encoder = FrozenCLIPEmbedder(str(TINY))
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    encoder.requires_grad_(True)
    encoder("a dog").sum().backward()
    assert encoder.token_embedding.weight.grad.any()


def test_weights_of_a_folder_are_read_unless_a_checkpoint_brings_them(folder, monkeypatch):
    model = CLIPTextModel(CLIPTextConfig.from_pretrained(TINY))
    model.half().save_pretrained(folder)
    encoder = FrozenCLIPEmbedder(str(folder), device="cuda")
    token_embedding = getattr(model, "text_model", model).embeddings.token_embedding.weight
    assert encoder.token_embedding.weight.dtype == torch.float32
    assert torch.equal(encoder.token_embedding.weight, token_embedding.float())
    monkeypatch.chdir(folder.parent)
    assert FrozenCLIPEmbedder("clip").width == 32
    (folder / "model.safetensors").write_bytes(b"not read")
    with skip_pretrained():
        FrozenCLIPEmbedder(str(folder))
    with pytest.raises(UserError, match="a file in the folder cannot be read"):
        FrozenCLIPEmbedder(str(folder))


def test_weights_that_lack_a_part_are_refused(folder):
    model = CLIPTextModel(CLIPTextConfig.from_pretrained(TINY))
    state = {key: value for key, value in model.state_dict().items() if "final_layer_norm" not in key}
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(UserError, match="lacks the weight '.*final_layer_norm.bias' \\(2 in all\\)"):
        FrozenCLIPEmbedder(str(folder))


def test_a_folder_that_lacks_a_file_is_named_with_it(folder):
    with pytest.raises(UserError, match=f"text encoder '{folder}': the folder has no model.safetensors"):
        FrozenCLIPEmbedder(str(folder))
    (folder / "vocab.json").unlink()
    with skip_pretrained(), pytest.raises(UserError, match="the folder has no tokenizer.json or vocab.json"):
        FrozenCLIPEmbedder(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="the folder has no config.json"):
        FrozenCLIPEmbedder(str(folder))
    with pytest.raises(UserError, match="there is no such folder"):
        FrozenCLIPEmbedder(str(folder / "absent"))


def test_a_broken_config_is_one_line(folder):
    (folder / "config.json").write_text("{")
    with skip_pretrained(), pytest.raises(UserError, match="cannot be read") as caught:
        FrozenCLIPEmbedder(str(folder))
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand more")

    monkeypatch.setattr(clip_module.CLIPTokenizerFast, "from_pretrained", offline)
    with pytest.raises(
        UserError, match="'openai/clip-vit-large-patch14' is neither a folder here nor"
    ) as caught:
        FrozenCLIPEmbedder()
    assert "\n" not in str(caught.value) and "name a local folder" in str(caught.value)


def test_max_length_is_the_length_and_must_fit():
    with skip_pretrained():
        encoder = FrozenCLIPEmbedder(str(TINY), max_length=12)
        assert encoder("a dog").shape == (1, 12, 32)
        with pytest.raises(UserError, match="77 positions, fewer than max_length 78; set max_length: 77"):
            FrozenCLIPEmbedder(str(TINY), max_length=78)


def test_an_old_device_is_ignored_and_said_so(caplog):
    with caplog.at_level(logging.DEBUG, "ldm"), skip_pretrained():
        FrozenCLIPEmbedder(str(TINY), device="cuda")
    assert "'device: cuda' is ignored" in caplog.text
