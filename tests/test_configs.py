"""All shipped YAMLs, and old YAMLs of the original's users: checked against the classes, and built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from ldm.training import config as training_config
from ldm.training import trainer
from ldm.training.callbacks import complete_lightning
from ldm.training.command_line import TRAINER_OPTIONS, parse
from ldm.training.trainer import Devices
from ldm.util import check_config, instantiate_from_config, skip_pretrained

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
OVERLAYS = [path for path in SHIPPED if path.parent.name == "personalization"]
# YAMLs that are merged into another one; recipes are checked in tests/training/test_shipped_configs.py.
FRAGMENTS = ("personalization", "recipes", "creatures64")
TRAINABLE = [p for p in SHIPPED if p.parent.name not in FRAGMENTS and "data" in OmegaConf.load(p)]
MODELS = [path for path in SHIPPED if "target" in (OmegaConf.load(path).get("model") or {})]
OLD = sorted((ROOT / "tests" / "old_yamls").glob("*.yaml"))
ORIGINAL_NAMES = {
    f"configs/{name}.yaml"
    for name in (
        "latent-diffusion/txt2img-finetune",
        "latent-diffusion/txt2img-finetune_style",
        "latent-diffusion/txt2img-1p4B-finetune",
        "latent-diffusion/txt2img-1p4B-finetune_style",
        "latent-diffusion/txt2img-1p4B-eval",
        "latent-diffusion/txt2img-1p4B-eval_with_tokens",
        "stable-diffusion/v1-finetune",
        "stable-diffusion/v1-finetune_unfrozen",
        "stable-diffusion/v1-inference",
    )
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def command(*paths: Path, words: str = "--data_root data/concepts/bobo") -> DictConfig:
    """The checked configuration of a command line with these YAMLs."""
    merged = training_config.load_run_config(parse(words.split()), paths)
    training_config.check_run_config(merged)
    return merged


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths in YAMLs are relative to the checkout."""
    monkeypatch.chdir(ROOT)


def build(node: DictConfig, clip_vit_l: Path) -> torch.nn.Module:
    """The model of a YAML on the meta device, with a tokenizer of this repository."""
    node = node.copy()
    encoder = OmegaConf.select(node, "params.cond_stage_config") or {}
    kind = str(encoder.get("target", "")).rpartition(".")[2]
    if kind in ("FrozenCLIPEmbedder", "FrozenSDXLEmbedder") and "version" not in (
        encoder.get("params") or {}
    ):
        OmegaConf.update(node, "params.cond_stage_config.params.version", str(clip_vit_l), force_add=True)
    elif kind == "FrozenCLIPEmbedder":
        home = ROOT / "models" / "ldm" / "creatures" / "text_encoder"
        OmegaConf.update(node, "params.cond_stage_config.params.version", str(home))
    elif kind in ("BERTEmbedder", "FrozenOpenCLIPEmbedder"):
        tokenizer = str(GOLDEN / ("bert_tiny_tokenizer" if kind == "BERTEmbedder" else "clip_tiny"))
        OmegaConf.update(node, "params.cond_stage_config.params.tokenizer", tokenizer, force_add=True)
    with skip_pretrained(), torch.device("meta"):
        return instantiate_from_config({"target": node.target, "params": node.params})


def test_all_yamls_of_the_original_exist() -> None:
    assert {name(path) for path in SHIPPED} >= ORIGINAL_NAMES


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_targets_accept_their_params(path: Path, at_home: None) -> None:
    content = OmegaConf.load(path)
    assert set(content) <= {"model", "data", "lightning", *training_config.RUN_KEYS}
    node = content.get("model") or {}
    constructor = {key: node[key] for key in ("target", "params") if key in node}
    # The words that a personalization begins at are those of the YAML that it lies over.
    words = OmegaConf.select(content, "model.params.personalization_config.params")
    if path.parent.name == "personalization" and words and words.get("placeholder_strings"):
        words.setdefault("initializer_words", ["bear"] * len(words.placeholder_strings))
    check_config(constructor, "model")


@pytest.mark.parametrize("path", TRAINABLE, ids=name)
def test_training_yamls_are_valid(path: Path, at_home: None) -> None:
    merged = command(path)
    lightning = complete_lightning(merged.get("lightning"))
    assert trainer.trainer_kwargs(lightning, Devices("cpu", 1), personalization=True)
    assert merged.model.base_learning_rate > 0


@pytest.mark.parametrize("overlay", OVERLAYS, ids=name)
@pytest.mark.parametrize("base", ["latent-diffusion/txt2img-finetune", "stable-diffusion/v1-finetune"])
def test_exchanged_personalization(base: str, overlay: Path, at_home: None) -> None:
    # A base that names images needs no --data_root, and an overlay may name others.
    words = (
        ""
        if "data_root" in OmegaConf.load(ROOT / f"configs/{base}.yaml")
        else "--data_root data/concepts/bobo"
    )
    merged = command(ROOT / f"configs/{base}.yaml", overlay, words=words)
    params = merged.model.params.personalization_config.params
    own = OmegaConf.load(overlay).model.params.personalization_config.params
    assert {key: params[key] for key in own} == dict(own)


@pytest.mark.parametrize("stage", ["first-stage", "decoder", "clip", "judge", "ldm"])
def test_a_stage_at_64_is_laid_over_the_one_at_32(stage: str, at_home: None, clip_vit_l: Path) -> None:
    merged = command(
        *(ROOT / "configs" / folder / f"{stage}.yaml" for folder in ("creatures", "creatures64"))
    )
    for split in ("train", "validation"):
        params = merged.data.params[split].params
        assert (params["size"], params["cache"]) == (64, "build/creatures64")
    said = OmegaConf.to_yaml(merged)
    assert "build/creatures/" not in said and "resolution: 32" not in said and "size: 32" not in said
    first_stages = [
        OmegaConf.load(ROOT / f"configs/creatures64/{other}.yaml") for other in ("first-stage", "ldm")
    ]
    trained, used = first_stages[0].model.params, first_stages[1].model.params.first_stage_config.params
    assert (trained.ddconfig, trained.embed_dim) == (used.ddconfig, used.embed_dim)
    if stage != "clip":  # which needs real tensors
        build(merged.model, clip_vit_l)


@pytest.mark.parametrize("path", MODELS, ids=name)
def test_models_are_built(path: Path, at_home: None, clip_vit_l: Path) -> None:
    if path.stem == "clip":
        pytest.skip("needs real tensors; tests/models/test_contrastive.py builds it")
    model = build(OmegaConf.load(path).model, clip_vit_l)
    assert sum(p.numel() for p in model.parameters()) > 100_000
    personal = OmegaConf.select(OmegaConf.load(path), "model.params.personalization_config")
    if personal is not None:
        assert list(model.embedding_manager.string_to_token_dict) == ["*"]


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_old_yamls(path: Path, clip_vit_l: Path, at_home: None) -> None:
    merged = command(path)
    lightning = complete_lightning(merged.lightning)
    options = trainer.trainer_kwargs(lightning, Devices("cpu", 1), personalization=True)
    assert options["max_steps"] == merged.lightning.trainer.get("max_steps", 6100)
    assert set(options) <= set(TRAINER_OPTIONS)
    assert "logger" not in lightning
    node = merged.model.copy()
    node.params.cond_stage_config.params = node.params.cond_stage_config.get("params") or {}
    model = build(node, clip_vit_l)
    learned = ("embedding_manager.", "model.") if node.params.get("unfreeze_model") else "embedding_manager."
    assert all(key.startswith(learned) for key, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("shipped", ["txt2img-finetune.yaml", "txt2img-finetune_style.yaml"])
def test_yamls_of_the_embedded_model_agree(shipped: str) -> None:
    """The YAML for learning words has the settings with which the denoiser was trained."""
    ours = OmegaConf.load(ROOT / "configs" / "latent-diffusion" / shipped).model.params
    trained = OmegaConf.load(ROOT / "configs" / "creatures" / "ldm.yaml").model.params
    for key in ("linear_start", "linear_end", "timesteps", "parameterization", "image_size", "channels"):
        assert ours[key] == trained[key], key
    for part in ("unet_config", "first_stage_config", "cond_stage_config"):
        leave = {"ckpt_path", "version", "image_tower", "use_checkpoint", "monitor"}
        kept = [{k: v for k, v in node[part].params.items() if k not in leave} for node in (ours, trained)]
        assert kept[0] == kept[1], part


def test_used_by_command(at_home: None) -> None:
    merged = command(ROOT / "configs/latent-diffusion/txt2img-finetune.yaml", words="-t --gpus 0,")
    assert merged.data.params.train.params.data_root == merged.data_root
    assert (ROOT / merged.data_root).is_dir()
    assert merged.actual_resume.startswith("models/ldm/creatures/")
