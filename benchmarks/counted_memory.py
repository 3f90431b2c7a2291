"""Memory of a training step of a word on a GPU, counted without a GPU and without weights.

    python -m benchmarks.counted_memory sdxl

Weights are counted in the types that a run with precision bf16-mixed keeps them in, with the first stage off the GPU
because latents are cached. What the forward pass keeps for the backward pass is counted tensor by tensor on a model
without memory, under autocast of bfloat16 as on a GPU, with attention as the fused kernel keeps it: queries, keys,
values, the result and one number per row. Not counted are what kernels use for a moment, the gradients of activations,
fragmentation, and what CUDA itself takes; together that is usually 1 to 3 GB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from benchmarks.loading_memory import use_tokenizer
from benchmarks.machine import ROOT
from benchmarks.subjects import stand_in_encoder
from ldm.checkpoint import halved, uninitialised
from ldm.commands.base import guarded
from ldm.console import Parser, positive
from ldm.modules import attention
from ldm.modules.diffusionmodules import util
from ldm.modules.encoders import clip_text
from ldm.util import instantiate_from_config, skip_pretrained

FAMILIES = {
    "sd1": ("stable-diffusion/v1-finetune.yaml", 512),
    "sd2": ("stable-diffusion/v2-finetune.yaml", 512),
    "sdxl": ("stable-diffusion/xl-finetune.yaml", 1024),
}


class _Fused(torch.autograd.Function):
    """Attention that keeps for the backward pass what the fused kernel keeps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, result, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("only counted")


def _fused(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
    half = (part.to(torch.bfloat16) for part in (q, k, v))
    result: Tensor = _Fused.apply(*half)  # type: ignore[no-untyped-call]
    return result


class Kept:
    """The bytes of what is kept for a backward pass; tensors that share memory, and `excluded` ones, count once."""

    def __init__(self, excluded: set[int]) -> None:
        self.sizes: dict[int, int] = {}
        self._alive: list[Any] = []  # so that an address is not used again
        self._excluded = excluded

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._excluded:
            self.sizes[storage._cdata] = storage.nbytes()
            self._alive.append(storage)
        return tensor

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


class Word:
    """A word whose vectors enter every prompt, without a look at the ids, which are no numbers here."""

    placeholders, string_to_token_dict = {"*": 1}, {"*": 265}

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    def __call__(self, ids: Tensor, embedded: Tensor) -> Tensor:
        return embedded + self.vectors


_layer_norm = F.layer_norm


def _norm_in_float32(x: Tensor, *rest: Any, **options: Any) -> Tensor:
    return _layer_norm(x.float(), *rest, **options)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Autocast to bfloat16 and attention as on a GPU, where layer norms compute in float32."""
    with (
        mock.patch.object(F, "scaled_dot_product_attention", _fused),
        mock.patch.object(F, "layer_norm", _norm_in_float32),
        mock.patch.object(attention, "is_short", lambda *sizes: False),
        mock.patch.object(clip_text, "is_short", lambda *sizes: False),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        yield


def count(family: str, encoder: Path, size: int | None = None) -> dict[str, float]:
    """The gigabytes of weights, and of what is kept without and with checkpointing, at batch 1."""
    config, usual = FAMILIES[family]
    node = OmegaConf.load(ROOT / "configs" / config).model
    use_tokenizer(node, encoder)
    side = (size or usual) // 8
    counted: dict[str, float] = {}
    for checkpointing in (False, True):
        node.params.unet_config.params.use_checkpoint = checkpointing
        with skip_pretrained(), uninitialised(), torch.device("meta"):
            model = instantiate_from_config({"target": node.target, "params": node.params}).train()
        half = set(halved(model))
        parts = {
            name: parameter.numel() * (2 if name in half else 4)
            for name, parameter in model.named_parameters()
            if not name.startswith("first_stage_model.")
        }
        counted["weights"] = sum(parts.values()) / 1e9
        counted["first stage, on the CPU"] = (
            sum(p.numel() * 4 for p in model.first_stage_model.parameters()) / 1e9
        )
        with FakeTensorMode(allow_non_fake_inputs=True):
            without_memory(model, half)
            kept, inside = kept_by_a_step(model, side)
        counted["with checkpointing" if checkpointing else "without checkpointing"] = (kept + inside) / 1e9
    return counted


def without_memory(model: nn.Module, half: set[str]) -> None:
    """Give a model weights that claim memory and have none, in bfloat16 those named in `half`; in a FakeTensorMode."""
    for name, parameter in list(model.named_parameters()):
        holder, _, key = name.rpartition(".")
        fake = torch.empty(parameter.shape, dtype=torch.bfloat16 if name in half else torch.float32)
        model.get_submodule(holder)._parameters[key] = nn.Parameter(fake, parameter.requires_grad)


def kept_by_a_step(model: Any, side: int) -> tuple[int, int]:
    """Bytes kept by a step on latents of this side: outside of checkpointed blocks, and by the largest of these when
    it is computed again."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept, largest = Kept(weights), [0]

    def checkpointed(function: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
        for value in inputs:
            if isinstance(value, Tensor):
                kept.keep(value)
        inner = Kept(weights)
        with saved_tensors_hooks(inner.keep, lambda tensor: tensor):
            result = function(*inputs)
        largest[0] = max(largest[0], inner.total)
        return result

    with (
        mock.patch.object(util, "torch_checkpoint", checkpointed),
        as_on_a_gpu(),
        saved_tensors_hooks(kept.keep, lambda tensor: tensor),
    ):
        ids = torch.zeros(1, 77, dtype=torch.long)
        (vectors,) = model.embedding_manager.embedding_parameters()
        condition = model.completed(model.cond_stage_model.embed_ids(ids, Word(vectors)))
        output = model.apply_model(
            torch.zeros(1, model.channels, side, side), torch.zeros(1, dtype=torch.long), condition
        )
        ((torch.zeros_like(output) - output) ** 2).mean()
    return kept.total, largest[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, after one line on stderr if it failed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--size", type=positive, help="side of the images in pixels")
    return guarded(lambda: show(parser.parse_args(argv)))


def show(options: argparse.Namespace) -> None:
    """Print the table of a family."""
    with tempfile.TemporaryDirectory() as name:
        counted = count(options.family, stand_in_encoder(Path(name) / "text_encoder"), options.size)
    for what, gigabytes in counted.items():
        sys.stdout.write(f"{what:26} {gigabytes:6.2f} GB\n")


if __name__ == "__main__":
    sys.exit(main())
