from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from ldm import checkpoint
from ldm.base_models import complete_config
from ldm.checkpoint import (
    CheckpointError,
    initialised,
    load_model_from_config,
    read_state_dict,
    save_state_dict,
    uninitialised,
)
from ldm.diffusers_layout import vae_weights
from ldm.modules.personalization import Personalization, TextEncoder
from ldm.util import ConfigError, UserError
from ldm.yaml_files import read_yaml
from tests.golden_record import GOLDEN, Golden

CASE = Golden("clip_one_vector")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model():
    return CASE.model()


@pytest.fixture(scope="module")
def weights(model) -> dict[str, torch.Tensor]:
    """The content of a published checkpoint: without the vectors of an embedding manager."""
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("embedding_manager.")}


@pytest.mark.one_reader
def test_a_checkpoint_of_lightning_1_is_read() -> None:
    state = read_state_dict(GOLDEN / "lightning_1x_layout.ckpt")
    assert state["model.diffusion_model.out.2.bias"].tolist() == [0, 1, 2, 3]


@pytest.mark.one_reader
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors", "bin"])
def test_formats_are_recognised_by_content(tmp_path: Path, weights, model, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    if suffix == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "global_step": 3}, path)
    loaded = load_model_from_config(CASE.config(), path)
    assert not loaded.training
    for name, value in weights.items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.one_reader
def test_a_half_precision_checkpoint_is_loaded_in_the_models_dtype(tmp_path: Path, weights) -> None:
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}, tmp_path / "m.safetensors"
    )
    loaded = load_model_from_config({"model": CASE.config()}, tmp_path / "m.safetensors")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_half_precision_is_for_the_weights_of_the_network_only(tmp_path: Path) -> None:
    state = {
        "model.layer.weight": torch.rand(2, 2),
        "alphas_cumprod": torch.rand(1000),
        "scale_factor": torch.tensor(0.18215),
        "model.layer.scale": torch.tensor(0.3),
        "model.layer.ids": torch.arange(3),
    }
    saved = read_state_dict(save_state_dict(state, tmp_path / "m.safetensors", torch.float16))
    assert torch.equal(saved.pop("model.layer.weight"), state["model.layer.weight"].half())
    assert len(saved) == 4
    for name, value in saved.items():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name


def test_known_extra_keys_are_ignored_and_unexpected_keys_logged_once(
    tmp_path: Path, weights, caplog
) -> None:
    extras = {
        "model_ema.decay": torch.ones(()),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    torch.save({"state_dict": weights | extras}, tmp_path / "m.ckpt")
    with caplog.at_level(logging.WARNING):
        load_model_from_config(CASE.config(), tmp_path / "m.ckpt")
    assert not caplog.records
    torch.save(
        {"state_dict": weights | {"a.unexpected": torch.ones(1), "b": torch.ones(1)}}, tmp_path / "m.ckpt"
    )
    with caplog.at_level(logging.WARNING):
        load_model_from_config(CASE.config(), tmp_path / "m.ckpt")
    assert len(caplog.records) == 1 and "2 unexpected" in caplog.text and "a.unexpected" in caplog.text


def test_a_parameter_without_a_value_is_an_error(tmp_path: Path, weights) -> None:
    lacking = {k: v for k, v in weights.items() if k != "model.diffusion_model.out.2.bias"}
    torch.save({"state_dict": lacking}, tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match=r"1 of \d+ parameters .*out\.2\.bias"):
        load_model_from_config(CASE.config(), tmp_path / "m.ckpt")


@pytest.mark.one_reader
def test_a_config_that_does_not_fit_the_checkpoint_is_refused(tmp_path: Path, weights) -> None:
    torch.save({"state_dict": weights}, tmp_path / "m.ckpt")
    config = CASE.config()
    config.params.unet_config.params.model_channels = 64
    with pytest.raises(CheckpointError, match="does not fit the config") as error:
        load_model_from_config(config, tmp_path / "m.ckpt")
    assert "\n" not in str(error.value)
    torch.save({"state_dict": {"x.y": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="holds no weight of LatentDiffusion"):
        load_model_from_config(CASE.config(), tmp_path / "other.ckpt")


def test_the_config_is_checked_before_the_checkpoint_is_opened(tmp_path: Path) -> None:
    config = CASE.config()
    config.params.chanels = 4
    with pytest.raises(ConfigError, match="'chanels'.*did you mean 'channels'"):
        load_model_from_config(config, tmp_path / "absent.ckpt")


@pytest.mark.one_reader
def test_files_that_are_not_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_state_dict(tmp_path / "no.ckpt")
    with pytest.raises(CheckpointError, match="folder"):
        read_state_dict(tmp_path)
    with pytest.raises(CheckpointError, match="holds no weights of a model"):
        read_state_dict(CASE.embeddings)
    (tmp_path / "t.safetensors").write_bytes((100).to_bytes(8, "little") + b"{" + b"x" * 200)
    with pytest.raises(CheckpointError, match="damaged"):
        read_state_dict(tmp_path / "t.safetensors")


def test_weights_are_mapped_into_memory(tmp_path: Path) -> None:
    """Using a small tensor of a large file does not use memory for the rest."""
    torch.save(
        {"state_dict": {"a": torch.zeros(64 << 20, dtype=torch.uint8), "b": torch.ones(3)}},
        tmp_path / "m.ckpt",
    )
    before = _resident_kib()
    state = read_state_dict(tmp_path / "m.ckpt")
    assert state["b"].tolist() == [1, 1, 1]
    assert _resident_kib() - before < 32 << 10


def _resident_kib() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    return int(
        next(line for line in status.read_text().splitlines() if line.startswith("RssAnon")).split()[1]
    )


@pytest.mark.one_reader
def test_a_text_encoder_missing_in_the_checkpoint_is_read_from_its_folder(
    tmp_path: Path, weights, model
) -> None:
    lacking = {k: v for k, v in weights.items() if not k.startswith("cond_stage_model.")}
    torch.save({"state_dict": lacking}, tmp_path / "m.ckpt")
    # the golden folder has no weights
    with pytest.raises(CheckpointError, match="m.ckpt' has no text encoder, and the .*clip_tiny"):
        load_model_from_config(CASE.config(), tmp_path / "m.ckpt")
    folder = tmp_path / "clip"
    shutil.copytree(GOLDEN / "clip_tiny", folder)
    prefix = "cond_stage_model.transformer."
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    save_file(
        {k: v for k, v in own.items() if not k.endswith("position_ids")},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = CASE.config()
    config.params.cond_stage_config.params.version = str(folder)
    loaded = load_model_from_config(config, tmp_path / "m.ckpt")
    for name, value in weights.items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_initial_vectors_come_from_the_encoder_in_the_checkpoint(tmp_path: Path, weights, model) -> None:
    torch.save({"state_dict": weights}, tmp_path / "m.ckpt")
    config = CASE.config()
    config.params.personalization_config.params.initializer_words = ["photo"]
    loaded = load_model_from_config(config, tmp_path / "m.ckpt")
    table = weights["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
    (token,) = loaded.cond_stage_model.prompt_tokenizer.token_ids("photo")
    assert torch.equal(loaded.embedding_manager.string_to_param_dict["*"][0], table[token])


def test_layers_that_a_checkpoint_fills_draw_no_random_numbers() -> None:
    before = torch.get_rng_state()
    with uninitialised():
        layers = [torch.nn.Linear(4, 4), torch.nn.Conv2d(4, 4, 3), torch.nn.Embedding(4, 4)]
        torch.nn.init.xavier_uniform_(layers[0].weight)
        # transformers 5 has functions of its own, in the place of those of torch.nn.init.
        small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        CLIPTextModel(CLIPTextConfig(vocab_size=9, max_position_embeddings=5, projection_dim=4, **small))
        assert torch.equal(torch.get_rng_state(), before)
        with initialised():
            torch.nn.Linear(4, 4)
    assert not torch.equal(torch.get_rng_state(), before)


class Mapper(torch.nn.Module, Personalization):
    """A plugged-in personalization with weights that it initialises itself."""

    def __init__(self, embedder: TextEncoder) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 16)


def test_a_plugged_in_personalization_initialises_its_weights(tmp_path: Path, weights) -> None:
    torch.save({"state_dict": weights}, tmp_path / "m.ckpt")
    config = CASE.config()
    config.params.personalization_config = {"target": f"{__name__}.Mapper"}
    torch.manual_seed(0)
    loaded = load_model_from_config(config, tmp_path / "m.ckpt")
    drawn = loaded.embedding_manager.layer.weight
    assert drawn.abs().max() <= 0.25 and drawn.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.2)


def test_averages_missing_in_the_checkpoint_start_at_its_weights(tmp_path: Path, weights) -> None:
    torch.save({"state_dict": weights}, tmp_path / "m.ckpt")
    config = CASE.config()
    config.params.use_ema = True
    loaded = load_model_from_config(config, tmp_path / "m.ckpt")
    own = loaded.model.diffusion_model.out[2].weight.clone()
    with loaded.ema_scope():
        assert torch.equal(loaded.model.diffusion_model.out[2].weight, own)


# -- what people have ----------------------------------------------------------------------------------------


@pytest.mark.one_reader
def test_averages_alone_are_the_weights(tmp_path: Path, weights) -> None:
    prefix = "model.diffusion_model."
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }
    others = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    torch.save({"state_dict": others | averaged}, tmp_path / "m.ckpt")
    loaded = load_model_from_config(CASE.config(), tmp_path / "m.ckpt").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


@pytest.mark.one_reader
def test_a_schedule_in_half_precision_is_computed_anew(tmp_path: Path, weights, model) -> None:
    save_file({name: value.half() for name, value in weights.items()}, tmp_path / "m.safetensors")
    loaded = load_model_from_config(CASE.config(), tmp_path / "m.safetensors")
    assert torch.equal(loaded.alphas_cumprod, model.alphas_cumprod)


@pytest.mark.one_reader
def test_text_encoder_keys_of_older_models_are_read(tmp_path: Path, weights) -> None:
    old = {
        name.replace(".transformer.text_model.", ".transformer."): value for name, value in weights.items()
    }
    save_file(old, tmp_path / "m.safetensors")
    loaded = load_model_from_config(CASE.config(), tmp_path / "m.safetensors").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


@pytest.fixture
def without_vae(tmp_path: Path, weights) -> Path:
    lacking = {name: value for name, value in weights.items() if not name.startswith("first_stage_model.")}
    save_file(lacking, tmp_path / "no-vae.safetensors")
    return tmp_path / "no-vae.safetensors"


@pytest.mark.one_reader
@pytest.mark.parametrize(
    "kind", ["ldm", "training checkpoint", "whole model", "diffusers", "folder", "old folder"]
)
def test_a_first_stage_is_brought_by_vae(tmp_path: Path, weights, without_vae, kind) -> None:
    prefix = "first_stage_model."
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    path = tmp_path / "vae"
    if kind == "ldm":
        save_file(own | {"loss.logvar": torch.zeros(())}, path)
    elif kind == "training checkpoint":
        torch.save({"state_dict": own}, path)
    elif kind == "whole model":
        save_file(weights, path)
    else:
        theirs = {name: value.contiguous() for name, value in vae_weights(own, "diffusers").items()}
        if kind == "old folder":
            names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
            for new, old in names.items():
                theirs = {
                    name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v
                    for name, v in theirs.items()
                }
        if kind != "diffusers":
            path.mkdir()
        save_file(theirs, path if kind == "diffusers" else path / "diffusion_pytorch_model.safetensors")
    loaded = load_model_from_config(CASE.config(), without_vae, vae=path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


@pytest.mark.one_reader
def test_a_model_without_a_first_stage_and_a_vae_that_is_none(tmp_path: Path, without_vae) -> None:
    with pytest.raises(CheckpointError, match="no-vae.safetensors' has no first stage .*--vae"):
        load_model_from_config(CASE.config(), without_vae)
    with pytest.raises(CheckpointError, match="is Stable Diffusion 1 without a first stage"):
        load_model_from_config(CASE.config(), without_vae, vae=without_vae)
    save_file({"x.y": torch.zeros(3, 3, 3)}, tmp_path / "other.safetensors")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 4)}, tmp_path / "lora.safetensors")
    with pytest.raises(
        CheckpointError, match=r"is a LoRA and no first stage \(VAE\); name the file or folder"
    ):
        load_model_from_config(CASE.config(), without_vae, vae=tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="holds no first stage"):
        load_model_from_config(CASE.config(), without_vae, vae=tmp_path / "other.safetensors")


def test_a_first_stage_that_the_yaml_names_is_read_if_the_checkpoint_has_none(
    tmp_path: Path, weights, without_vae
) -> None:
    save_file(weights, tmp_path / "whole.safetensors")
    config = CASE.config()
    config.params.first_stage_config.params.ckpt_path = str(tmp_path / "whole.safetensors")
    loaded = load_model_from_config(config, without_vae).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_weights_that_the_model_has_no_place_for_are_refused_where_they_compute(
    tmp_path: Path, weights
) -> None:
    """A network with more layers is another one, and its images would be noise."""
    for key in ("model.diffusion_model.input_blocks.99.0.weight", "first_stage_model.decoder.up.9.weight"):
        save_file(weights | {key: torch.ones(1)}, tmp_path / "m.safetensors")
        with pytest.raises(CheckpointError, match=f"the model has no '{key}' .1 such keys.; "):
            load_model_from_config(CASE.config(), tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scaling_factor": 0.13025}, "the scaling_factor 0.13025, and the model's is 0.18215; name one of"),
        ({"latents_mean": [0.0, 1.0]}, "as of Playground 2.5"),
        ({"_class_name": "ConsistencyDecoderVAE"}, "ConsistencyDecoderVAE"),
    ],
)
def test_a_first_stage_of_another_family_is_refused(tmp_path: Path, weights, settings, message) -> None:
    prefix = "first_stage_model."
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    theirs = {name: value.contiguous() for name, value in vae_weights(own, "diffusers").items()}
    save_file(theirs, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file(weights, tmp_path / "m.ckpt")
    config = CASE.config()
    (tmp_path / "config.json").write_text(json.dumps({**VAE_SETTINGS, **settings}))
    config.params.scale_factor = 0.18215
    with pytest.raises(CheckpointError, match=message):
        load_model_from_config(config, tmp_path / "m.ckpt", vae=tmp_path)


VAE_SETTINGS = {"block_out_channels": [32, 64], "layers_per_block": 1, "latent_channels": 4, "in_channels": 3}
VAE_SETTINGS |= {"out_channels": 3}


def test_a_first_stage_in_a_file_of_another_family_or_width_is_refused(tmp_path: Path, weights) -> None:
    config = read_yaml(ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml")
    denoiser = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(1, 4, 1, 1),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(1, 768),
    }
    save_file(denoiser, tmp_path / "model.safetensors")
    for name, channels, message in (
        ("sdxl_vae.safetensors", 4, "has the first stage of Stable Diffusion XL, and the model is Stable"),
        ("flux.safetensors", 16, "a first stage of 16 channels, and the model needs 4; name one of its"),
    ):
        save_file({"decoder.conv_in.weight": torch.ones(1, channels, 1, 1)}, tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            load_model_from_config(config, tmp_path / "model.safetensors", vae=tmp_path / name)


def test_stabilitys_yaml_of_stable_diffusion_xl_is_not_needed(tmp_path: Path) -> None:
    config = tmp_path / "sd_xl_base.yaml"
    config.write_text(
        "model: {target: sgm.models.diffusion.DiffusionEngine, params: {scale_factor: 0.13025}}"
    )
    with pytest.raises(ConfigError, match="a YAML of Stability's generative-models.*leave it out"):
        complete_config(config, tmp_path / "model.safetensors")


def test_the_mark_of_zero_terminal_snr_changes_the_noise_schedule(tmp_path: Path) -> None:
    state = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(1, 4, 1, 1),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(1, 2048),
        "model.diffusion_model.label_emb.0.0.weight": torch.ones(1, 2816),
    }
    path, config = tmp_path / "m.safetensors", ROOT / "configs" / "stable-diffusion" / "xl-finetune.yaml"
    marked = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file(state | {"v_pred": marked["v_pred"]}, path)
    node, base = complete_config(config, path)
    assert node["params"]["parameterization"] == "v" and not node["params"].get("given_betas")
    save_file(state | marked, path)
    node, base = complete_config(config, path)
    assert base is not None and base.name == "Stable Diffusion XL (v)"
    kept = torch.tensor(node["params"]["given_betas"], dtype=torch.float64).neg().add(1).cumprod(0)
    assert len(kept) == 1000 and kept[-1].item() == pytest.approx(2.0**-24) and kept[-2] > 1e-7
    assert kept[0].item() == pytest.approx(1 - 0.00085)


@pytest.mark.one_reader
def test_paths_of_a_yaml_are_found_from_its_folder_and_that_of_the_model(
    tmp_path: Path, weights, monkeypatch
) -> None:
    model = tmp_path / "project" / "models" / "mine"
    model.mkdir(parents=True)
    shutil.copytree(GOLDEN / "clip_tiny", model / "text_encoder")
    save_file(weights, model / "model.safetensors")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for relative in ("text_encoder", "models/mine/text_encoder"):
        config = CASE.config()
        config.params.cond_stage_config.params.version = relative
        assert load_model_from_config(config, model / "model.safetensors").cond_stage_model.max_length
        OmegaConf.save({"model": config}, tmp_path / "project" / "own.yaml")
        shutil.copy(model / "model.safetensors", tmp_path / "moved.safetensors")
        node, _ = complete_config(tmp_path / "project" / "own.yaml", tmp_path / "moved.safetensors")
        found = node.params.cond_stage_config.params.version
        assert found == (str(model / "text_encoder") if "/" in relative else relative)
    config.params.cond_stage_config.params.version = "./absent"
    with pytest.raises(UserError, match="absent"):
        load_model_from_config(config, model / "model.safetensors")


FAMILIES = {
    "sd2": {"cond_stage_model.model.ln_final.bias": torch.zeros(4)},
    "ldm": {"cond_stage_model.transformer.token_emb.weight": torch.zeros(4, 4)},
}


@pytest.mark.one_reader
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_one_family_and_a_config_of_another(tmp_path: Path, family: str) -> None:
    first = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1, 4, 3, 3)}
    save_file(first | FAMILIES[family], tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="and the config describes Stable Diffusion 1; leave") as error:
        load_model_from_config(
            ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml", tmp_path / "m.safetensors"
        )
    assert {"sd2": "Stable Diffusion 2", "ldm": "LDM text2img-large"}[family] in str(error.value)
    assert len(str(error.value).replace(str(tmp_path), "")) < 300


@pytest.mark.one_reader
def test_a_file_of_another_kind_is_named_and_not_blamed_on_the_config(tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 4)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="it is a LoRA: it changes a base model") as error:
        load_model_from_config(CASE.config(), tmp_path / "lora.safetensors")
    assert "config that belongs" not in str(error.value)


# -- memory --------------------------------------------------------------------------------------------------


def test_weights_in_the_types_they_are_used_in_stay_in_the_file(tmp_path: Path, weights) -> None:
    half = {k: v.half() if v.is_floating_point() and "." in k else v for k, v in weights.items()}
    save_file(half, tmp_path / "m.safetensors")
    loaded = load_model_from_config(CASE.config(), tmp_path / "m.safetensors", half=torch.float16)
    plain = load_model_from_config(CASE.config(), tmp_path / "m.safetensors")
    layers = dict(loaded.named_modules())
    halved = {name for name, value in loaded.named_parameters() if value.dtype == torch.float16}
    assert "model.diffusion_model.out.2.weight" in halved
    for name, value in loaded.named_parameters():
        layer = layers[name.rpartition(".")[0]]
        frozen_layer = isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
        assert (name in halved) == (frozen_layer and name.startswith(("model.", "cond_stage_model."))), name
        assert torch.equal(value.float(), plain.state_dict()[name])
    # In bfloat16 autocast gives the same numbers as with weights in float32, which it converts at each use.
    bfloat = load_model_from_config(CASE.config(), tmp_path / "m.safetensors", half=torch.bfloat16)
    x, t = CASE.io["unet_x"], CASE.io["unet_t"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = [
            m.apply_model(x, t, m.get_learned_conditioning(["a photo"] * len(x))) for m in (plain, bfloat)
        ]
    assert torch.equal(*outputs)


def test_layers_are_built_without_memory_and_nothing_stays_without(
    tmp_path: Path, weights, monkeypatch
) -> None:
    torch.save({"state_dict": weights}, tmp_path / "m.ckpt")
    built = []
    original = checkpoint.instantiate_from_config

    def instantiate(node):
        model = original(node)
        built.append({name for name, value in model.named_parameters() if value.is_meta})
        return model

    monkeypatch.setattr(checkpoint, "instantiate_from_config", instantiate)
    config = CASE.config()
    config.params.use_ema = True
    loaded = load_model_from_config(config, tmp_path / "m.ckpt")
    assert "model.diffusion_model.out.2.weight" in built[0]
    assert not any(value.is_meta for value in [*loaded.parameters(), *loaded.buffers()])
    assert not loaded.model.diffusion_model.out[2].weight.requires_grad
    assert torch.nn.Linear(2, 2).weight.is_cpu
