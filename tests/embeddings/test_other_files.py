"""Files that are no embeddings are named for what they are, with what to do."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.embeddings import read
from tests.embeddings.samples import GOLDEN, refused, saved, vectors

pytestmark = pytest.mark.client_files


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def unet(channels: int = 4, context: int = 768) -> dict[str, Tensor]:
    return {
        "model.diffusion_model.input_blocks.0.0.weight": zeros(8, channels, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": zeros(8, context),
    }


SD1 = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
VAE = {"encoder.conv_in.weight": zeros(8, 3, 3, 3), "decoder.conv_in.weight": zeros(8, 4, 3, 3)}

# What a file holds, the name that must be in the message, and a word of the remedy.
OTHERS: dict[str, tuple[Any, str, str]] = {
    "kohya's LoRA": (
        {
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": zeros(4, 768),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": zeros(3072, 4),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(4.0),
        },
        "a LoRA",
        "other tools",
    ),
    "diffusers' LoRA": (
        {
            "unet.down_blocks.0.attentions.0.to_q.lora_A.weight": zeros(4, 320),
            "unet.down_blocks.0.attentions.0.to_q.lora_B.weight": zeros(320, 4),
        },
        "a LoRA",
        "other tools",
    ),
    "a LyCORIS file": (
        {"lora_unet_a.hada_w1_a": zeros(4, 4), "lora_unet_a.hada_w1_b": zeros(4, 4)},
        "a L",
        "tools",
    ),
    "a ControlNet": (
        {"control_model.input_hint_block.0.weight": zeros(16, 3, 3, 3), **unet()},
        "a ControlNet",
        "other tools",
    ),
    "an IP-Adapter": (
        {"image_proj.proj.weight": zeros(768, 64), "ip_adapter.1.to_k_ip.weight": zeros(320, 768)},
        "an IP-Adapter",
        "tools",
    ),
    "a T2I adapter": ({"adapter.body.0.block1.weight": zeros(8, 8, 3, 3)}, "a T2I adapter", "tools"),
    "a motion module": (
        {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": zeros(320)},
        "AnimateDiff",
        "tools",
    ),
    "a Dreambooth model": ({**unet(), SD1: zeros(10, 768)}, "Stable Diffusion 1", "(model=)"),
    "a model of SD2": (
        {**unet(context=1024), "cond_stage_model.model.token_embedding.weight": zeros(10, 1024)},
        "Stable Diffusion 2",
        "(model=)",
    ),
    "an inpainting model": ({**unet(channels=9), SD1: zeros(10, 768)}, "inpainting", "textual inversion"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": zeros(8, 8)}, "Flux", "textual inversion"),
    "a VAE": (VAE, "a VAE", "--vae"),
    "a VAE of a checkpoint": (
        {f"first_stage_model.{name}": value for name, value in VAE.items()},
        "a VAE",
        "--vae",
    ),
    "a text encoder": (
        {
            "text_model.embeddings.token_embedding.weight": zeros(100, 768),
            "text_model.encoder.layers.0.mlp.fc1.weight": zeros(8, 768),
        },
        "a text encoder alone",
        "textual inversion",
    ),
    "an upscaler": ({"model.1.sub.0.RDB1.conv1.0.weight": zeros(8, 8, 3, 3)}, "an image upscaler", "tools"),
    "the vectors of a run": (
        {"embedding_manager.string_to_param_dict.*": zeros(1, 768)},
        "the state of a training run",
        "embeddings.pt",
    ),
    "weights of an unknown network": (
        {f"layers.{i}.weight": zeros(4, 5) for i in range(100)},
        "a model or LoRA",
        "not an embedding",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("container", ["safetensors", "pt", "state_dict", "legacy"])
def test_models_and_adapters_are_named(container, name, tmp_path):
    content, words, remedy = OTHERS[name]
    if name == "the vectors of a run" and container == "safetensors":
        pytest.skip("a run saves its state with torch")
    path = tmp_path / "file"
    if container == "safetensors":
        save_file(content, path)
    else:
        content = {"state_dict": content, "global_step": 3} if container == "state_dict" else content
        torch.save(content, path, _use_new_zipfile_serialization=container != "legacy")
    if name == "weights of an unknown network" and container == "state_dict":
        words = "a model checkpoint"
    refused(path, f"it is .*({words})")
    refused(path, remedy)


def hypernetwork(path: Path) -> None:
    """As AUTOMATIC1111 writes it: two modules for each width of the network."""
    module = {"linear.0.weight": zeros(8, 768), "linear.0.bias": zeros(8)}
    torch.save(
        {768: (module, module), 320: (module, module), "step": 5, "name": "x", "layer_structure": [1, 2]},
        path,
    )


def nested_adapter(path: Path) -> None:
    torch.save(
        {"image_proj": {"proj.weight": zeros(8, 8)}, "ip_adapter": {"1.to_k_ip.weight": zeros(8, 8)}}, path
    )


def upscaler(path: Path) -> None:
    torch.save(
        {
            "params_ema": {
                "body.0.rdb1.conv1.weight": zeros(8, 8, 3, 3),
                "conv_first.weight": zeros(8, 3, 3, 3),
            }
        },
        path,
    )


def script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def whole_module(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("cat.pt", b"x")


WRITERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a hypernetwork": (hypernetwork, "a hypernetwork, not an embedding"),
    "an IP-Adapter as .bin": (nested_adapter, "an IP-Adapter, not an embedding"),
    "an upscaler as .pth": (upscaler, "an image upscaler, not an embedding"),
    "an aesthetic gradient": (
        lambda path: torch.save(vectors(1) / vectors(1).norm() * 9.5, path),
        "norm 9.5, an aesthetic gradient",
    ),
    "TorchScript": (script, "a TorchScript program"),
    "a pickled module": (whole_module, "asks for 'torch.nn.modules.linear.Linear'"),
    "a zip": (archive, "unpack it first"),
    "GGUF": (lambda path: path.write_bytes(b"GGUF\x03\0\0\0" + bytes(64)), "a GGUF file"),
    "7z": (lambda path: path.write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(64)), "a 7z archive"),
    "an optimizer": (
        lambda path: torch.save(
            {"hash": "12ab", "optimizer_state_dict": {"state": {0: {"exp_avg": vectors()}}}}, path
        ),
        "the optimizer state beside an AUTOMATIC1111 embedding",
    ),
    "a checkpoint of Lightning 1": (
        lambda path: path.write_bytes((GOLDEN / "lightning_1x_layout.ckpt").read_bytes()),
        "a model checkpoint, not an embedding|Stable Diffusion|a text encoder",
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_other_files_are_named(name, tmp_path):
    write_it, words = WRITERS[name]
    path = tmp_path / "cat.pt"
    write_it(path)
    refused(path, words)


def test_a_learned_bare_vector_is_no_aesthetic_gradient(tmp_path):
    torch.save(vectors(1), tmp_path / "cat.bin")
    assert read(tmp_path / "cat.bin").format == "tensor"


@pytest.mark.parametrize(
    "word", ["lora_style", "cat.weight", "state_dict", "clip_g", "text_model.x", "lora_unet_x"]
)
def test_words_of_diffusers_that_look_like_weights_are_read(word, tmp_path):
    """diffusers writes no record; one tensor of a text encoder's width is an embedding whatever its name."""
    save_file({word: vectors(1)}, tmp_path / "learned_embeds.safetensors", {"format": "pt"})
    torch.save({word: vectors(1)}, tmp_path / "learned_embeds.bin")
    for name in ("learned_embeds.safetensors", "learned_embeds.bin"):
        found = read(tmp_path / name)
        assert found.triggers == [word] and found.concepts[0].encoder == "clip_l"


def test_a_large_checkpoint_is_named_without_reading_its_weights(tmp_path):
    """Its numbers are not even there."""
    torch.save(
        {"state_dict": {**unet(), SD1: zeros(10, 768), "big": zeros(4096, 4096)}}, tmp_path / "whole.ckpt"
    )
    refused(tmp_path / "whole.ckpt", "it is Stable Diffusion 1, not an embedding; name it as the model")


def test_names_of_a_million_characters_are_cut(tmp_path):
    long = "y" * 1_000_000
    save_file({long: zeros(3, 3), "b.weight": zeros(3, 3)}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "a model or LoRA")
    torch.save({long: "text"}, tmp_path / "b.pt")
    refused(tmp_path / "b.pt", "not a known embedding format")
    torch.save({"string_to_param": {long: zeros(2, 3, 4)}}, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", "has the shape")
    torch.save({long: torch.full((1, 8), float("nan"))}, tmp_path / "d.pt")
    refused(tmp_path / "d.pt", "NaN")
    refused(saved(tmp_path / "e.pt", b"\x80\x02c" + long.encode() + b"\nf\n."), "asks for 'y")
