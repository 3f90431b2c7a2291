"""The two layouts of the same model: names of weights and settings of LDM and of diffusers, translated both ways.

One table per part pairs the names of its modules. Text encoders that LDM keeps in OpenCLIP's layout are kept by
diffusers in that of transformers' CLIP, with one matrix for each of query, key and value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.model_kinds import UNET, VAE
from ldm.weights import CheckpointError, Folder, located, read_shards, read_state_dict

Modules = dict[str, str]
Direction = Literal["ldm", "diffusers"]
State = Mapping[str, Tensor]

# Family -> part -> the prefix of its text encoder, and whether it is in OpenCLIP's layout.
TEXT_ENCODERS: dict[str, dict[str, tuple[str, bool]]] = {
    "sd1": {"text_encoder": ("cond_stage_model.transformer.text_model.", False)},
    "sd2": {"text_encoder": ("cond_stage_model.model.", True)},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.text_model.", False),
        "text_encoder_2": ("conditioner.embedders.1.model.", True),
    },
}

_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def unet_modules(names: Iterable[str]) -> Modules:
    """Pair the modules of a denoiser, LDM's names with those of diffusers; `names` are all its weights in either."""
    names = set(names)
    if "conv_in.weight" in names:
        levels = _count(names, r"down_blocks\.(\d+)\.")
        blocks = _count(names, r"down_blocks\.0\.resnets\.(\d+)\.")
        attended = _numbers(names, r"down_blocks\.(\d+)\.attentions\.")
    else:
        downs = sorted(_numbers(names, r"input_blocks\.(\d+)\.0\.op\."))
        levels = len(downs) + 1
        blocks = downs[0] - 1 if downs else _count(names, r"input_blocks\.(\d+)\.") - 1
        attended = {
            (index - 1) // (blocks + 1)
            for index in _numbers(names, r"input_blocks\.(\d+)\.1\.transformer_blocks\.")
        }
    pairs = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    residual = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    for level in range(levels):
        first = 1 + level * (blocks + 1)
        for block in range(blocks):
            residual[f"input_blocks.{first + block}.0"] = f"down_blocks.{level}.resnets.{block}"
            pairs[f"input_blocks.{first + block}.1"] = f"down_blocks.{level}.attentions.{block}"
        pairs[f"input_blocks.{first + blocks}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        up, has_attention = levels - 1 - level, level in attended
        first = up * (blocks + 1)
        for block in range(blocks + 1):
            residual[f"output_blocks.{first + block}.0"] = f"up_blocks.{up}.resnets.{block}"
            if has_attention:
                pairs[f"output_blocks.{first + block}.1"] = f"up_blocks.{up}.attentions.{block}"
        sampler = f"output_blocks.{first + blocks}.{1 + has_attention}.conv"
        pairs[sampler] = f"up_blocks.{up}.upsamplers.0.conv"
    for ours, theirs in residual.items():
        pairs |= {f"{ours}.{own}": f"{theirs}.{their}" for own, their in _RESIDUAL.items()}
    return pairs


def vae_modules(names: Iterable[str]) -> Modules:
    """Pair the modules of a first stage; `names` are all its weights in either naming."""
    names = set(names)
    levels = _count(names, r"encoder\.(?:down|down_blocks)\.(\d+)\.")
    blocks = _count(names, r"encoder\.(?:down|down_blocks)\.0\.(?:block|resnets)\.(\d+)\.")
    pairs = {name: name for name in ("quant_conv", "post_quant_conv")}
    residual: Modules = {}
    for side in ("encoder", "decoder"):
        pairs |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        pairs[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        residual |= {f"{side}.mid.block_{i + 1}": f"{side}.mid_block.resnets.{i}" for i in (0, 1)}
        attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        pairs |= {
            f"{side}.mid.attn_1.{own}": f"{side}.mid_block.attentions.0.{their}"
            for own, their in attention.items()
        }
    for level in range(levels):
        up = levels - 1 - level
        for block in range(blocks + 1):
            residual[f"encoder.down.{level}.block.{block}"] = f"encoder.down_blocks.{level}.resnets.{block}"
            residual[f"decoder.up.{level}.block.{block}"] = f"decoder.up_blocks.{up}.resnets.{block}"
        pairs[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        pairs[f"decoder.up.{level}.upsample.conv"] = f"decoder.up_blocks.{up}.upsamplers.0.conv"
    for ours, theirs in residual.items():
        pairs |= {f"{ours}.{name}": f"{theirs}.{name}" for name in ("norm1", "conv1", "norm2", "conv2")}
        pairs[f"{ours}.nin_shortcut"] = f"{theirs}.conv_shortcut"
    return pairs


# Names that older releases of diffusers gave to the attention of the first stage.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_TOWER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")


def tower_modules(layers: int) -> Modules:
    """Pair the modules of a text tower of so many layers, OpenCLIP's names with those of transformers' CLIP."""
    pairs = {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
    for layer in range(layers):
        ours, theirs = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        pairs |= {f"{ours}.{own}": f"{theirs}.{their}" for own, their in _TOWER.items()}
    return pairs


def _count(names: Iterable[str], pattern: str) -> int:
    return max(_numbers(names, pattern), default=-1) + 1


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}


def _renamed(state: State, pairs: Modules, to: Direction, what: str) -> dict[str, Tensor]:
    """The weights under the other names; CheckpointError for one that the table does not know."""
    table = pairs if to == "diffusers" else {theirs: ours for ours, theirs in pairs.items()}
    renamed = {}
    for name, value in state.items():
        head, tail = name, ""
        while head and head not in table:
            head, _, last = head.rpartition(".")
            tail = f".{last}{tail}"
        if not head:
            raise CheckpointError(
                f"{what} has the weight '{name}', which the layout of {to} has no place for: it is of another kind"
            )
        renamed[table[head] + tail] = value
    return renamed


def unet_weights(state: State, to: Direction) -> dict[str, Tensor]:
    """The weights of a denoiser, without a prefix, under the names of the other layout."""
    return _renamed(state, unet_modules(state), to, "the unet")


def vae_weights(state: State, to: Direction) -> dict[str, Tensor]:
    """The weights of a first stage under the names of the other layout, where attention has other shapes."""
    if to == "ldm":
        state = {_new_attention(name): value for name, value in state.items()}
    renamed = _renamed(state, vae_modules(state), to, "the vae")
    for name, value in renamed.items():
        if to == "ldm" and re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$", name) and value.ndim == 2:
            renamed[name] = value[:, :, None, None]
        elif to == "diffusers" and re.search(r"mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight$", name):
            renamed[name] = value[:, :, 0, 0]
    return renamed


def _new_attention(name: str) -> str:
    match = re.fullmatch(r"(.*mid_block\.attentions\.0\.)(query|key|value|proj_attn)(\..*)", name)
    return f"{match[1]}{_OLD_ATTENTION[match[2]]}{match[3]}" if match else name


def clip_weights(state: State) -> dict[str, Tensor]:
    """The weights of transformers' CLIP text model without the prefix that its versions differ in, and positions."""
    bare = {name.removeprefix("text_model."): value for name, value in state.items()}
    return {name: value for name, value in bare.items() if name != "embeddings.position_ids"}


def tower_to_clip(state: State, skip_last: int = 0) -> dict[str, Tensor]:
    """A text tower in OpenCLIP's layout as transformers' CLIP, without its last blocks if these are not used."""
    layers = _count(state, r"transformer\.resblocks\.(\d+)\.") - skip_last
    kept: dict[str, Tensor] = {}
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        match = re.match(r"transformer\.resblocks\.(\d+)\.(attn\.in_proj_(weight|bias))?", name)
        if match and int(match[1]) >= layers:
            continue
        if match and match[2]:
            for target, part in zip(_QKV, value.chunk(3), strict=True):
                converted[f"encoder.layers.{match[1]}.{target}.{match[3]}"] = part
        elif name == "positional_embedding":
            converted["embeddings.position_embedding.weight"] = value
        elif name == "text_projection":
            converted["text_projection.weight"] = value.T
        elif name != "logit_scale":
            kept[name] = value
    return converted | _renamed(kept, tower_modules(layers), "diffusers", "the text encoder")


def clip_to_tower(state: State) -> dict[str, Tensor]:
    """A CLIP text model of transformers in OpenCLIP's layout.

    Where it has no projection, as in Stable Diffusion 2, which does not use it, that is the identity.
    """
    state = clip_weights(state)
    layers = _count(state, r"encoder\.layers\.(\d+)\.")
    table = state["embeddings.token_embedding.weight"]
    projection = state.get("text_projection.weight")
    tower = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "text_projection": torch.eye(table.shape[1], dtype=table.dtype)
        if projection is None
        else projection.T,
        "logit_scale": torch.tensor(100.0).log(),  # where contrastive training ends
    }
    for layer in range(layers):
        for kind in ("weight", "bias"):
            parts = [state[f"encoder.layers.{layer}.{name}.{kind}"] for name in _QKV]
            tower[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    separate = ("text_projection.weight", "embeddings.position_embedding.weight")
    rest = {
        name: value
        for name, value in state.items()
        if name not in separate and not re.search(r"self_attn\.[qkv]_proj\.", name)
    }
    return tower | _renamed(rest, tower_modules(layers), "ldm", "the text encoder")


def to_ldm(parts: Mapping[str, State], family: str) -> dict[str, Tensor]:
    """A whole model: the weights of the parts of a folder of diffusers under the names of LDM's checkpoints.

    Parts that are missing are left out. Raises CheckpointError if a part is of another kind.
    """
    state: dict[str, Tensor] = {}
    if unet := parts.get("unet"):
        state |= _prefixed(unet_weights(unet, "ldm"), UNET)
    if vae := parts.get("vae"):
        state |= _prefixed(vae_weights(vae, "ldm"), VAE)
    for part, (prefix, is_tower) in TEXT_ENCODERS[family].items():
        if weights := parts.get(part):
            state |= _prefixed(clip_to_tower(weights) if is_tower else clip_weights(weights), prefix)
    return state


def to_diffusers(state: State, family: str, skip_last: int = 0) -> dict[str, dict[str, Tensor]]:
    """A whole model: a checkpoint in LDM's naming as the parts of a folder of diffusers.

    Args:
        skip_last: how many of the last blocks Stable Diffusion 2's text encoder does not use.
    """
    parts = {
        "unet": unet_weights(_under(state, UNET), "diffusers"),
        "vae": vae_weights(_under(state, VAE), "diffusers"),
    }
    for part, (prefix, is_tower) in TEXT_ENCODERS[family].items():
        own = _under(state, prefix)
        parts[part] = (
            tower_to_clip(own, skip_last if family == "sd2" else 0) if is_tower else clip_weights(own)
        )
        if family == "sd2":  # its folders hold a text model without a projection
            parts[part].pop("text_projection.weight", None)
    return parts


def _prefixed(state: State, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def _under(state: State, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


# -- folders -------------------------------------------------------------------------------------------------


def read_folder(folder: Folder, family: str) -> dict[str, Tensor]:
    """The weights of a folder of diffusers under the names of LDM's checkpoints, mapped into memory.

    Parts that the folder lacks are left out.
    """
    try:
        wanted = ("unet", "vae", *TEXT_ENCODERS[family])
        return to_ldm({part: read_shards(folder.weights(part)) for part in wanted}, family)
    except KeyError as error:
        raise CheckpointError(
            f"'{folder.path}': the text encoder has no weight {error}; download it again"
        ) from error


def read_vae(source: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a first stage in LDM's naming, without a prefix, and the settings beside them if there are any.

    Args:
        source: a file or folder in the layout of LDM or diffusers, of a first stage alone or of a whole model; or a
            hub id.

    Raises:
        CheckpointError: it holds no first stage.
    """
    path, settings = located(source), dict[str, Any]()
    if path.is_dir():
        folder = Folder(path)
        files = folder.weights("vae")
        settings = folder.config("vae" if files else "")
        state = read_shards(files or folder.own_weights())
    else:
        state = read_state_dict(path)
    for prefix in (VAE, "vae."):
        if any(name.startswith(prefix) for name in state):
            state = _under(state, prefix)
    if "decoder.conv_in.weight" not in state:
        raise CheckpointError(f"'{source}' holds no first stage (VAE); name the file or folder of one")
    state = {name: value for name, value in state.items() if not name.startswith(("loss.", "model_ema."))}
    return (vae_weights(state, "ldm") if any("_blocks." in name for name in state) else state), settings
