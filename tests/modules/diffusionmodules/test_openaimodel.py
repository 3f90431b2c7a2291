from __future__ import annotations

import pytest
import torch

from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import ConfigError
from tests.golden_record import Golden, fill

SMALL = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 3,
    "model_channels": 32,
    "attention_resolutions": [1, 2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 4,
}
SPATIAL = {"use_spatial_transformer": True, "context_dim": 16}


def unet(**options) -> UNetModel:
    torch.manual_seed(0)
    model = UNetModel(**(SMALL | options))
    for parameter in model.parameters():  # the last layers begin at zero, which would hide everything
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def inputs(**options) -> tuple:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 5, 16, generator=generator) if "context_dim" in options else None
    return x, torch.tensor([3, 700]), context


@pytest.mark.parametrize(
    "options",
    [
        {},
        SPATIAL,
        SPATIAL | {"transformer_depth": 2, "legacy": False},
        SPATIAL | {"num_heads": -1, "num_head_channels": 16, "legacy": False},
        {"num_heads": -1, "num_head_channels": 8},
        {"use_new_attention_order": True},
        {"resblock_updown": True, "use_scale_shift_norm": True},
        {"conv_resample": False},
        {"channel_mult": [1, 1, 2], "attention_resolutions": [4], "num_heads_upsample": 2},
    ],
)
def test_options_build_run_and_learn(options: dict) -> None:
    model = unet(**options)
    x, t, context = inputs(**options)
    output = model(x, t, context)
    assert output.shape == (2, 3, 8, 8)
    output.square().mean().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert idle == []


def test_depends_on_timestep_context_and_class() -> None:
    model = unet(**SPATIAL, num_classes=7)
    x, t, context = inputs(**SPATIAL)
    y = torch.tensor([1, 2])
    base = model(x, t, context, y)
    for other in (model(x, t + 1, context, y), model(x, t, context + 1, y), model(x, t, context, y + 1)):
        assert (other - base).abs().max() > 1e-5
    with pytest.raises(ValueError, match="class labels missing"):
        model(x, t, context)


def test_attention_orders_differ_only_in_the_order_of_the_projection() -> None:
    old, new = unet(), unet(use_new_attention_order=True)
    state = old.state_dict()
    for name, value in state.items():
        if "qkv" in name:  # heads first -> q, k, v first
            heads_first = value.unflatten(0, (4, 3, -1))
            state[name] = heads_first.transpose(0, 1).flatten(0, 2)
    new.load_state_dict(state)
    x, t, _ = inputs()
    torch.testing.assert_close(new(x, t), old(x, t))


def test_checkpointing_recomputes_and_changes_no_result() -> None:
    """The original read the switch and ignored it."""
    results = []
    for enabled in (False, True):
        model = unet(**SPATIAL, use_checkpoint=enabled)
        kept = []
        x, t, context = inputs(**SPATIAL)
        context.requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda v, kept=kept: kept.append(v.numel()) or v, lambda v: v
        ):
            output = model(x, t, context)
        output.square().sum().backward()
        results.append((output.detach(), context.grad, sum(kept)))
    (plain, plain_grad, plain_kept), (saved, saved_grad, saved_kept) = results
    torch.testing.assert_close(saved, plain)
    torch.testing.assert_close(saved_grad, plain_grad)
    assert saved_kept < 0.5 * plain_kept


def test_settings_that_do_not_fit_together_are_errors() -> None:
    with pytest.raises(ConfigError, match="use_spatial_transformer=True and context_dim=None"):
        unet(use_spatial_transformer=True)
    with pytest.raises(ConfigError, match="num_heads and num_head_channels"):
        unet(num_heads=-1)


@pytest.mark.parametrize(
    ("case", "context", "vector"), [("sd2_tiny", "penultimate", None), ("sdxl_tiny", "context", "vector")]
)
def test_numbers_of_stable_diffusion_2_and_xl(case: str, context: str, vector: str | None) -> None:
    golden = Golden(case)
    params = golden.meta["unet_params"] | {"image_size": 8, "use_spatial_transformer": True}
    model = fill(UNetModel(**params), "model.diffusion_model.")
    io = golden.io
    out = model(io["unet_x"], io["unet_t"], io[context], y=io[vector] if vector else None)
    assert (out - io["unet_out"]).abs().max() <= 2e-4 * io["unet_out"].abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": "sequential"}, "adm_in_channels"),
        ({"num_classes": "several", "adm_in_channels": 4}, "several"),
        ({"transformer_depth": [1, 2, 3]}, "2 levels"),
        ({"transformer_depth": [1, -1]}, "2 levels"),
        ({"disable_middle_self_attn": True}, "disable_middle_self_attn"),
    ],
)
def test_values_that_are_not_possible(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UNetModel(**(SMALL | SPATIAL | options))
