"""Counting memory on a model without memory gives what a model with memory keeps."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counted_memory import kept_by_a_step, without_memory
from ldm.checkpoint import halved
from ldm.util import instantiate_from_config, skip_pretrained
from tests.golden_record import sdxl_node


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_without_memory_is_counted_as_one_with(checkpointing: bool) -> None:
    with skip_pretrained():
        model = instantiate_from_config(
            sdxl_node(unet_config={"params": {"use_checkpoint": checkpointing}})
        ).train()
    half = set(halved(model))
    assert any("in_proj_weight" in name for name in half)
    for name, parameter in model.named_parameters():
        if name in half:
            parameter.data = parameter.data.bfloat16()
    kept, inside = kept_by_a_step(model, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        without_memory(model, half)
        assert kept_by_a_step(model, 8) == (kept, inside)
    assert (inside > 0) == checkpointing and kept > 0
    if checkpointing:
        model.model.apply(lambda module: setattr(module, "use_checkpoint", False))
        with FakeTensorMode(allow_non_fake_inputs=True):
            without_memory(model, half)
            everything, _ = kept_by_a_step(model, 8)
        assert kept + inside < everything
    torch.clear_autocast_cache()
