"""Every key and shape of the full-size models, from the shipped YAMLs, on the meta device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.util import instantiate_from_config, skip_pretrained
from tests.golden_record import GOLDEN

CONFIGS = Path(__file__).parent.parent / "configs"
# Published files hold it; transformers 5 counts positions itself, and loading passes over it.
IGNORED = {"cond_stage_model.transformer.text_model.embeddings.position_ids"}


@pytest.mark.parametrize(
    ("manifest", "config", "encoder"),
    [
        ("sd_v1", "stable-diffusion/v1-finetune.yaml", {"version": "clip"}),
        (
            "ldm_text2img_large",
            "latent-diffusion/txt2img-1p4B-finetune.yaml",
            {"tokenizer": "bert_tiny_tokenizer"},
        ),
    ],
)
def test_keys_and_shapes(manifest: str, config: str, encoder: dict[str, str], clip_vit_l: Path) -> None:
    node = OmegaConf.load(CONFIGS / config).model
    own: dict[str, str] = {}
    if "version" in encoder:
        own["version"] = str(clip_vit_l)
    else:
        own["tokenizer"] = str(GOLDEN / encoder["tokenizer"])
    node.params.cond_stage_config = OmegaConf.merge(node.params.cond_stage_config, {"params": own})
    with skip_pretrained(), torch.device("meta"):
        model = instantiate_from_config({"target": node.target, "params": node.params})
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    recorded = json.loads((GOLDEN / f"{manifest}.state_dict.json").read_text())
    assert {k: v for k, v in ours.items() if k not in IGNORED} == {
        k: v for k, v in recorded.items() if k not in IGNORED
    }
