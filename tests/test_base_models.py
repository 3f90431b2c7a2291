from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm import base_models, weights
from ldm.base_models import (
    ask_for_prediction,
    check_first_stage,
    family_of_first_stage,
    recognise,
    recognise_for,
    what_is,
)
from ldm.util import stand_in
from ldm.weights import CheckpointError, Folder
from tests.golden_record import GOLDEN

pytestmark = pytest.mark.one_reader

ROOT = Path(__file__).resolve().parents[1]
UNET = "model.diffusion_model."


def write(path: Path, shapes: dict[str, tuple[int, ...]], notes: dict[str, str] | None = None) -> Path:
    """A file of safetensors that claims these shapes; it has holes in place of the numbers."""
    header: dict[str, object] = {"__metadata__": notes} if notes else {}
    end = 0
    for name, shape in shapes.items():
        size = 2 * int(torch.tensor(shape).prod()) if shape else 2
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def denoiser(channels: int = 4, context: int = 768, added: int | None = None, prefix: str = UNET):
    shapes = {
        f"{prefix}input_blocks.0.0.weight": (320, channels, 3, 3),
        f"{prefix}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, context),
    }
    return shapes | ({f"{prefix}label_emb.0.0.weight": (1280, added)} if added else {})


def theirs(channels: int = 4, context: int = 768):
    return {
        "conv_in.weight": (320, channels, 3, 3),
        "time_embedding.linear_1.weight": (8, 8),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, context),
    }


@pytest.mark.parametrize(
    ("manifest", "family", "finetune", "inference"),
    [
        ("sd_v1", "sd1", "v1-finetune.yaml", "v1-inference.yaml"),
        ("sd_v2", "sd2", "v2-finetune_v.yaml", "v2-inference-v.yaml"),
        ("sdxl_base", "sdxl", "xl-finetune.yaml", "xl-inference.yaml"),
        ("ldm_text2img_large", "ldm", "txt2img-1p4B-finetune.yaml", "txt2img-1p4B-eval_with_tokens.yaml"),
    ],
)
def test_published_models_at_full_size(tmp_path, manifest, family, finetune, inference) -> None:
    shapes = json.loads((GOLDEN / f"{manifest}.state_dict.json").read_text())
    shapes = {name: tuple(shape) for name, shape in shapes.items() if not name.startswith("embedding_")}
    found = recognise(write(tmp_path / "model.safetensors", shapes))
    assert (found.family, found.finetune_config.name, found.inference_config.name) == (
        family,
        finetune,
        inference,
    )


def test_averages_and_old_text_encoders_and_a_denoiser_with_its_prefix_are_recognised(tmp_path) -> None:
    averages = {name.replace("model.", "model_ema.", 1): shape for name, shape in denoiser().items()}
    start = "model_ema."
    averages = {start + name.removeprefix(start).replace(".", ""): shape for name, shape in averages.items()}
    assert recognise(write(tmp_path / "a.safetensors", averages)).family == "sd1"
    old = denoiser() | {"cond_stage_model.transformer.embeddings.token_embedding.weight": (49408, 768)}
    assert recognise(write(tmp_path / "b.safetensors", old)).family == "sd1"
    assert recognise(write(tmp_path / "c.safetensors", denoiser(context=2048, added=2816))).family == "sdxl"


def test_what_weights_cannot_tell_is_asked_for_in_one_line(tmp_path, caplog) -> None:
    path = write(tmp_path / "model.safetensors", denoiser(context=1024))
    found = recognise(path)
    assert (found.prediction, found.known_by) == ("v", "guess")
    with caplog.at_level(logging.WARNING):
        ask_for_prediction(found)
    (message,) = caplog.messages
    assert "v is assumed" in message and "v2-finetune.yaml" in message and "v2-inference.yaml" in message


@pytest.mark.parametrize(
    ("name", "notes", "more", "prediction"),
    [
        ("m.safetensors", {"modelspec.prediction_type": "epsilon"}, {}, "eps"),
        ("m.safetensors", {"modelspec.prediction_type": "v"}, {}, "v"),
        ("m.safetensors", {}, {"v_pred": ()}, "v"),
        ("v2-1_512-ema-pruned.safetensors", {}, {}, "eps"),
        ("768-v-ema.safetensors", {}, {}, "v"),
        ("sd_turbo.safetensors", {}, {}, "eps"),
    ],
)
def test_notes_in_a_file_tell_the_prediction(tmp_path, caplog, name, notes, more, prediction) -> None:
    found = recognise(write(tmp_path / name, denoiser(context=1024) | more, notes))
    assert (found.prediction, found.known_by) == (prediction, "notes")
    ask_for_prediction(found)
    assert not caplog.messages


def test_the_training_steps_in_a_checkpoint_tell_the_prediction(tmp_path) -> None:
    state = {name: torch.zeros(shape) for name, shape in denoiser(context=1024).items()}
    for step, prediction in ((875000, "eps"), (110000, "v")):
        torch.save({"state_dict": state, "global_step": step}, tmp_path / "model.ckpt")
        assert recognise(tmp_path / "model.ckpt").prediction == prediction


KINDS = {
    "embedding of AUTOMATIC1111": ({"string_to_param.*": (1, 768)}, "a textual inversion embedding"),
    "embedding of diffusers": ({"<cat>": (2, 768)}, "a textual inversion embedding"),
    "embedding for XL": ({"clip_g": (1, 1280), "clip_l": (1, 768)}, "a textual inversion embedding"),
    "embedding for the embedded model": ({"<cat>": (1, 128)}, "a textual inversion embedding"),
    "many words": ({f"<cat-{n}>": (3, 768) for n in range(40)}, "a textual inversion embedding"),
    "state of a run": (
        {"embedding_manager.string_to_param_dict.*": (1, 32), "embedding_manager.x.y": (2, 3, 4)},
        "the state of a training run",
    ),
    "LoRA of kohya": ({"lora_unet_mid_block_proj_in.lora_down.weight": (4, 320)}, "a LoRA"),
    "LoRA of diffusers": ({"unet.mid_block.attn1.to_q.lora_A.weight": (4, 320)}, "a LoRA"),
    "older LoRA of diffusers": ({"unet.mid.processor.to_q_lora.up.weight": (320, 4)}, "a LoRA"),
    "LoHa": ({"lyco_unet_x.hada_w1_a": (4, 320)}, "a LyCORIS file"),
    "ControlNet": ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "a ControlNet"),
    "ControlNet of diffusers": (
        theirs() | {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)},
        "a ControlNet",
    ),
    "T2I adapter": ({"adapter.body.0.resnets.0.block1.weight": (320, 320, 3, 3)}, "a T2I adapter"),
    "older T2I adapter": ({"body.0.block1.weight": (320, 320, 3, 3), "conv_in.bias": (3,)}, "a T2I adapter"),
    "IP-Adapter": ({"image_proj.proj.weight": (3072, 1024), "ip_adapter.1.to_k_ip": (4,)}, "an IP-Adapter"),
    "hypernetwork": ({"768.0.linear.0.weight": (1536, 768)}, "a hypernetwork"),
    "AnimateDiff": ({"down_blocks.0.motion_modules.0.proj.weight": (3, 3, 3)}, "a motion module"),
    "VAE": ({"decoder.conv_in.weight": (512, 4, 3, 3)}, "a VAE alone"),
    "text encoder": ({"text_model.embeddings.token_embedding.weight": (49408, 768)}, "a text encoder alone"),
    "OpenCLIP": ({"transformer.resblocks.0.ln_1.weight": (1024, 2, 2)}, "a text encoder alone"),
    "T5": ({"encoder.block.0.layer.0.weight": (3, 3, 3)}, "a T5 text encoder"),
    "UNet": (theirs(), "the denoiser (UNet) of Stable Diffusion 1 alone"),
    "UNet in LDM's naming": (denoiser(prefix=""), "the denoiser (UNet) of Stable Diffusion 1 alone"),
    "inpainting": (denoiser(9), "an inpainting model of Stable Diffusion 1"),
    "inpainting 2": (denoiser(9, 1024), "an inpainting model of Stable Diffusion 2"),
    "inpainting XL": (denoiser(9, 2048, 2816), "an inpainting model of Stable Diffusion XL"),
    "depth": (denoiser(5, 1024), "the depth model of Stable Diffusion 2"),
    "upscaler": (denoiser(7, 1024), "the upscaler of Stable Diffusion 2"),
    "pix2pix": (denoiser(8), "an image-editing model (InstructPix2Pix) of Stable Diffusion 1"),
    "unCLIP": (denoiser(4, 1024, 2048), "Stable unCLIP"),
    "refiner": (denoiser(4, 1280, 2560), "the refiner of Stable Diffusion XL"),
    "SD3": ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (3, 3, 3)}, "Stable Diffusion 3"),
    "SD3 of diffusers": (
        {
            "pos_embed.proj.weight": (9, 9, 9),
            "time_text_embed.x": (9, 9, 9),
            "a.attn.add_k_proj.weight": (9,),
        },
        "Stable Diffusion 3",
    ),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": (9, 9, 9)}, "Flux"),
    "Flux of diffusers": ({"single_transformer_blocks.0.attn.to_k.weight": (9, 9, 9)}, "Flux"),
    "PixArt": ({"t_block.1.weight": (9, 9, 9), "y_embedder.y_proj.fc1.weight": (9, 9)}, "PixArt"),
    "Cascade": ({"down_blocks.0.0.depthwise.weight": (9, 9, 9), "clip_txt_mapper.weight": (9,)}, "Würstchen"),
    "AuraFlow": ({"model.double_layers.0.attn.w1k.weight": (9, 9, 9)}, "AuraFlow"),
    "NF4": (
        denoiser(4, 2048, 2816) | {f"{UNET}input_blocks.1.1.proj_in.weight.absmax": (9,)},
        "a model with quantised weights",
    ),
    "LCM": (
        denoiser() | {f"{UNET}time_embed.cond_proj.weight": (320, 256)},
        "a latent consistency model",
    ),
    "Playground": (denoiser(4, 2048, 2816) | {"edm_mean": (1, 4, 1, 1)}, "Playground 2.5"),
    "CosXL": (denoiser(4, 2048, 2816) | {"edm_vpred.sigma_max": (), "v_pred": ()}, "CosXL"),
    "SSD-1B": (
        denoiser(4, 2048, 2816) | {f"{UNET}output_blocks.0.0.in_layers.0.weight": (1280,)},
        "a distilled Stable Diffusion XL",
    ),
    "video": ({f"{UNET}input_blocks.1.0.time_stack.x": (9, 9, 9)} | denoiser(8, 1024, 768), "Stable Video"),
    "something else": ({"layer.weight": (3, 3, 3)}, "no model that is known here"),
}


@pytest.mark.parametrize("case", KINDS)
def test_every_kind_of_file_is_named(tmp_path, case) -> None:
    shapes, name = KINDS[case]
    path = write(tmp_path / "file.safetensors", shapes)
    with pytest.raises(CheckpointError) as error:
        recognise(path)
    message = str(error.value)
    assert f"' is {name}" in message and "; " in message
    assert len(message.replace(str(tmp_path), "")) < 300 and "\n" not in message
    assert "config that belongs" not in message


def test_pickled_files_are_named_too(tmp_path) -> None:
    hypernetwork = {768: [{"linear.0.weight": torch.zeros(9, 9)}], "step": 3}
    for content, name in (
        ({"string_to_param": {"*": torch.zeros(1, 768)}, "name": "cat"}, "a textual inversion embedding"),
        (hypernetwork, "a hypernetwork"),
        ({"emb_params": torch.zeros(2, 768)}, "a textual inversion embedding"),
    ):
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(CheckpointError, match=f"is {name}"):
            recognise(tmp_path / "file.pt")


HEADS = {
    "model.gguf": (b"GGUF\3\0\0\0", "a GGUF file"),
    "model.ckpt": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 4\n",
        "a Git LFS pointer",
    ),
    "page.ckpt": (b"<!DOCTYPE html><html>not found</html>", "a web page"),
    "json.ckpt": (b'{"error": "not found"}', "JSON"),
    "empty.ckpt": (b"", "empty"),
    "model.onnx": (b"\x08\x07\x12\x07pytorch", "an ONNX model"),
    "model.engine": (b"ftrt\0\0\0\0", "a TensorRT engine"),
    "model.7z": (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    "model.yaml": (b"model:\n  target: x\n", "a YAML"),
    "model.safetensors.part": (b"\0\0\0\0\0\0\0\0\0", "an unfinished download"),
    "noise.ckpt": (b"\xff\xfe\xfd\xfc" * 20, "no file of weights"),
    "cat.png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 20, "an image"),
    "cut.ckpt": (
        b"PK\x03\x04" + b"\0" * 40,
        "it is damaged or cut off (File is not a zip file); download it again",
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_files_without_weights_are_named(tmp_path, name) -> None:
    content, what = HEADS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(weights.UserError) as error:
        recognise(tmp_path / name)
    assert what in str(error.value) and len(str(error.value).replace(str(tmp_path), "")) < 300


def test_an_archive_of_other_files_is_named(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("model/v1-5.ckpt", "x")
    with pytest.raises(CheckpointError, match="is a zip archive, but not of torch.save; unpack it"):
        recognise(tmp_path / "model.zip")


def test_a_damaged_archive_is_one_line(tmp_path) -> None:
    torch.save({"state_dict": {"x": torch.zeros(3)}}, tmp_path / "model.ckpt")
    data = bytearray((tmp_path / "model.ckpt").read_bytes())
    data[data.rindex(b"PK\x01\x02") + 2] = 0  # in the list of its entries
    (tmp_path / "model.ckpt").write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"it is damaged or cut off \(.*central directory\); download it again"
    ):
        recognise(tmp_path / "model.ckpt")


def test_a_truncated_file_says_how_much_is_there(tmp_path) -> None:
    path = write(tmp_path / "model.safetensors", denoiser())
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(whole - 100)
    with pytest.raises(CheckpointError, match=rf"truncated: {whole - 100:,} of {whole:,} bytes"):
        recognise(path)
    with path.open("r+b") as file:
        file.truncate(40)
    with pytest.raises(CheckpointError, match="truncated or damaged; download it again"):
        recognise(path)


def test_missing_things(tmp_path, monkeypatch) -> None:
    for source, message in (
        (tmp_path / "no.ckpt", "does not exist"),
        ("https://example.org/model.ckpt", "is a web address"),
        (tmp_path, "is a folder without a model"),
    ):
        with pytest.raises(CheckpointError, match=message):
            recognise(source)


FOLDERS: dict[str, tuple[dict[str, str], str]] = {
    "unet": (
        {"config.json": '{"_class_name": "UNet2DConditionModel"}'},
        "the unet of a diffusers model alone",
    ),
    "vae": ({"config.json": '{"_class_name": "AutoencoderKL"}'}, "the VAE of a diffusers model alone"),
    "text": (
        {"config.json": '{"architectures": ["CLIPTextModel"]}'},
        "the text encoder of a diffusers model",
    ),
    "controlnet": ({"config.json": '{"_class_name": "ControlNetModel"}'}, "a ControlNet alone"),
    "lora": ({"adapter_config.json": "{}"}, "is a LoRA"),
    "onnx": ({"unet/model.onnx": "", "model_index.json": "{}"}, "an ONNX model"),
    "openvino": ({"unet/openvino_model.xml": "", "model_index.json": "{}"}, "an OpenVINO model"),
    "tensorrt": ({"unet.engine": ""}, "a TensorRT model"),
    "coreml": ({"Unet.mlmodelc/model": ""}, "a Core ML model"),
    "flux": ({"model_index.json": '{"_class_name": "FluxPipeline"}'}, "Flux"),
    "sd3": ({"model_index.json": '{"_class_name": "StableDiffusion3Pipeline"}'}, "Stable Diffusion 3"),
    "transformer": (
        {"model_index.json": '{"_class_name": "ZImagePipeline", "transformer": ["diffusers", "Z"]}'},
        "a model of ZImagePipeline, whose denoiser is a transformer; it cannot be used",
    ),
    "no settings": (
        {"model_index.json": "{}", "unet/diffusion_pytorch_model.safetensors": ""},
        "has no unet/config.json; download it completely",
    ),
    "unfinished": ({"model_index.json": "{}", "unet/config.json": "{}"}, "without the weights of its unet"),
    "one file": ({"v1-5.ckpt": ""}, "name the file in it, such as"),
    "run": ({"checkpoints/last.ckpt": ""}, "the folder of a training run"),
    "cache": ({"snapshots/abc/model_index.json": "{}"}, "name '.*snapshots.abc'"),
    "broken": ({"model_index.json": "{"}, "model_index.json' is damaged"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_no_model_are_named(tmp_path, case) -> None:
    files, message = FOLDERS[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        recognise(tmp_path)
    assert len(str(error.value).replace(str(tmp_path), "")) < 300
    assert "settings are damaged" not in str(error.value)


@pytest.mark.parametrize(
    ("unet", "scheduler"),
    [
        ({"in_channels": "four"}, {}),
        ({"cross_attention_dim": {"a": 1}}, {}),
        ({"in_channels": 4}, {"prediction_type": ["epsilon"]}),
    ],
)
def test_settings_of_wrong_types_are_damaged(tmp_path, unet, scheduler) -> None:
    for part, name, content in (("unet", "config", unet), ("scheduler", "scheduler_config", scheduler)):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").touch()
    with pytest.raises(CheckpointError, match="its settings are damaged .*; download it again"):
        recognise(tmp_path)


def test_a_part_in_a_whole_folder_names_the_folder_above(tmp_path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(CheckpointError, match="name the folder above it"):
        recognise(tmp_path / "unet")


def test_a_config_of_ones_own_decides_about_files_that_are_not_known(tmp_path) -> None:
    inpainting = write(tmp_path / "inpainting.safetensors", denoiser(9))
    assert recognise_for(inpainting, "sd1", 9) is None
    with pytest.raises(CheckpointError, match="an inpainting model"):
        recognise_for(inpainting, "sd1", 4)
    lora = write(tmp_path / "lora.safetensors", KINDS["LoRA of kohya"][0])
    with pytest.raises(CheckpointError, match="a LoRA"):
        recognise_for(lora, "sd1", 4)
    kind = what_is(lora)
    assert kind is not None and kind.name == "a LoRA"
    assert what_is(write(tmp_path / "x.safetensors", KINDS["something else"][0])) is None


def test_a_file_without_a_denoiser_is_not_tried_with_a_config_of_a_family(tmp_path) -> None:
    path = write(tmp_path / "llama.safetensors", {"model.layers.0.x": (4, 4, 4), "lm_head.weight": (9, 9, 9)})
    assert recognise_for(path, None, 4) is None
    with pytest.raises(
        CheckpointError, match=r"it holds 'model.layers.0.x', and no denoiser .*; name another"
    ):
        recognise_for(path, "sd1", 4)
    embedding = write(tmp_path / "cat.safetensors", KINDS["embedding of diffusers"][0])
    with pytest.raises(CheckpointError, match="the embedding with words= to generate, settings=.* to train"):
        recognise_for(embedding, None, 4)


def test_the_embedded_model_names_its_own_yamls() -> None:
    found = recognise(ROOT / "models" / "ldm" / "creatures" / "model.safetensors")
    assert (found.family, found.prediction) == ("embedded", "v")
    assert found.finetune_config.name == "txt2img-finetune.yaml" and found.inference_config.is_file()


@pytest.mark.parametrize(
    ("linear", "expected"), [(True, ("sd2", "v", "guess")), (False, ("sd1", "eps", "family"))]
)
def test_a_folder_without_a_scheduler_does_not_pretend_to_know(tmp_path, linear, expected) -> None:
    (tmp_path / "unet").mkdir()
    config = {"in_channels": 4, "cross_attention_dim": 32, "use_linear_projection": linear}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    found = recognise(tmp_path)
    assert (found.family, found.prediction, found.known_by) == expected


@pytest.mark.parametrize(
    ("marks", "prediction", "zero_snr"),
    [
        ((), "eps", False),
        (("v_pred",), "v", False),
        (("v_pred", "ztsnr"), "v", True),
        (("ztsnr",), "eps", False),
    ],
)
def test_the_marks_of_v_prediction_in_files_of_stable_diffusion_xl(
    tmp_path, marks, prediction, zero_snr
) -> None:
    shapes = denoiser(context=2048, added=2816) | dict.fromkeys(marks, (0,))
    found = recognise(write(tmp_path / "noob.safetensors", shapes))
    assert (found.family, found.prediction, found.zero_snr) == ("sdxl", prediction, zero_snr)


def test_a_first_stage_may_be_within_a_model_of_any_kind(tmp_path) -> None:
    inpainting = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3),
        "model.diffusion_model.output_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    }
    with pytest.raises(CheckpointError, match="an inpainting model .* no first stage"):
        check_first_stage(write(tmp_path / "a.safetensors", inpainting))
    whole = inpainting | {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)}
    check_first_stage(write(tmp_path / "b.safetensors", whole))


@pytest.mark.parametrize(
    ("name", "notes", "more", "family"),
    [
        ("vae.safetensors", {}, {}, None),
        ("sdxl_vae.safetensors", {}, {}, "sdxl"),
        ("v.safetensors", {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"}, {}, "sdxl"),
        ("model.safetensors", {}, denoiser(), "sd1"),
        ("model.safetensors", {}, denoiser(context=2048, added=2816), "sdxl"),
    ],
)
def test_the_family_of_a_first_stage(tmp_path, name, notes, more, family) -> None:
    path = write(tmp_path / name, {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)} | more, notes)
    assert family_of_first_stage(path) == family


def test_a_node_that_has_a_folders_sizes_is_of_its_family(tmp_path, monkeypatch) -> None:
    """As the embedded model is, which diffusers takes for Stable Diffusion 1 of other sizes."""
    folder = base_models.BaseModel(str(tmp_path), tmp_path, "sd1", "eps", folder=Folder(tmp_path))
    monkeypatch.setattr(base_models, "recognise", lambda *_: folder)
    sizes = {
        "channels": 12,
        "unet_config": {"params": {"context_dim": 128, "in_channels": 12, "out_channels": 12}},
        "first_stage_config": {"params": {"embed_dim": 12}},
    }
    monkeypatch.setattr(base_models, "folder_params", lambda *_: sizes)
    yaml = base_models.CONFIGS / "stable-diffusion" / "v1-inference.yaml"
    node, _ = base_models.complete_config(yaml, tmp_path, find=stand_in)
    assert node["params"]["unet_config"]["params"]["context_dim"] == 128
    again, _ = base_models.complete_config({"model": node}, tmp_path, find=stand_in)
    assert again == node
    other = base_models.CONFIGS / "stable-diffusion" / "v2-inference.yaml"
    with pytest.raises(
        CheckpointError, match="is Stable Diffusion 1, and the config describes Stable Diffusion 2"
    ):
        base_models.complete_config(other, tmp_path, find=stand_in)
