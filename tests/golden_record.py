"""Read the numbers recorded from the original (tests/golden), and build models with the weights of that record."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.util import instantiate_from_config, skip_pretrained

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = Path(__file__).parents[1] / "configs"
CASES = ("clip_one_vector", "clip_three_vectors", "bert_one_vector", "vq_one_vector")


def golden_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the weight of a state-dict name, by the rule of tests/golden/README.md."""
    r = np.random.RandomState(zlib.crc32(name.encode()) % 2**32).standard_normal(shape)
    if any(part in name for part in ("embedding", "token_emb", "pos_emb")):
        r = r * 0.05
    elif len(shape) >= 2:
        r = r * 0.9 / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("weight"):
        r = 1 + 0.1 * r
    else:
        r = r * 0.05
    return torch.tensor(r, dtype=torch.float32)


def golden_state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Return the golden weights of a module's parameters by state-dict name, without those of the embedding manager."""
    parameters = {id(parameter) for parameter in module.parameters()}
    kept = module.state_dict(keep_vars=True)
    return {
        name: golden_weight(prefix + name, tuple(value.shape))
        for name, value in kept.items()
        if id(value) in parameters and not name.startswith("embedding_manager.")
    }


def fill(module: nn.Module, prefix: str = "") -> nn.Module:
    """Load a module's golden weights; `prefix` is its prefix in the whole model, such as `cond_stage_model.`."""
    result = module.load_state_dict(golden_state(module, prefix), strict=False)
    assert not result.unexpected_keys
    return module.eval()


@dataclass(frozen=True)
class Golden:
    """One recorded case."""

    name: str

    @property
    def folder(self) -> Path:
        return GOLDEN / self.name

    @cached_property
    def io(self) -> dict[str, Tensor]:
        return load_file(self.folder / "io.safetensors")

    @cached_property
    def meta(self) -> dict:
        return json.loads((self.folder / "meta.json").read_text())

    @property
    def embeddings(self) -> Path:
        return self.folder / "embeddings.pt"

    def config(self):
        """Return the `model:` node, with absolute paths of tokenizers."""
        node = OmegaConf.load(self.folder / "config.yaml").model
        params = node.params.cond_stage_config.params
        for key in ("version", "tokenizer"):
            if key in params:
                params[key] = str(GOLDEN / params[key])
        return node

    def model(self, load_embeddings: bool = True) -> nn.Module:
        """Return the whole model with the weights, and by default the vectors, of the record."""
        with skip_pretrained():
            model = instantiate_from_config(self.config())
        fill(model)
        if load_embeddings:
            model.embedding_manager.load(self.embeddings)
        return model

    def write_model(self, folder: Path) -> Path:
        """Write the model as a checkpoint without vectors, with its config.yaml; return the checkpoint's path."""
        state = self.model(load_embeddings=False).state_dict()
        own = {key: value for key, value in state.items() if not key.startswith("embedding_manager.")}
        torch.save({"state_dict": own}, folder / "model.ckpt")
        OmegaConf.save({"model": self.config()}, folder / "config.yaml")
        return folder / "model.ckpt"


def sdxl_node(**params: Any) -> dict[str, Any]:
    """Return the `model:` node of the YAML that trains a word on Stable Diffusion XL, with the sizes of the record."""
    record = Golden("sdxl_tiny")
    model: Any = OmegaConf.load(CONFIGS / "stable-diffusion" / "xl-finetune.yaml").model
    unet = {k: v for k, v in record.meta["unet_params"].items() if k != "spatial_transformer_attn_type"}
    tower = {name: record.meta["open_clip_text_cfg"][name] for name in ("width", "heads", "layers")}
    tiny = {
        "image_size": 8,
        "unet_config": {"params": unet},
        "first_stage_config": {
            "params": {"ddconfig": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "resolution": 16}}
        },
        "cond_stage_config": {"params": {"version": str(GOLDEN / "clip_tiny"), "arch": tower}},
    }
    whole: Any = OmegaConf.merge(model, {"params": tiny}, {"params": params})
    return {
        "target": whole.target,
        "base_learning_rate": whole.base_learning_rate,
        "params": OmegaConf.to_container(whole.params),
    }
