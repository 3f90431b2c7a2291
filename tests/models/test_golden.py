"""The numbers of the original, reproduced with its weights (tests/golden/README.md)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler
from tests.golden_record import CASES, Golden

TIGHT, LOOSE = 2e-4, 2e-3


def assert_close(ours: Tensor, recorded: Tensor, relative: float) -> None:
    """Within `relative` of the recorded tensor's own scale, element by element."""
    error = (ours.detach() - recorded).abs().max() / recorded.abs().max().clamp_min(1e-8)
    assert error <= relative, f"off by {error:.2e} of the largest value, allowed {relative:.0e}"


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module")
def model(golden: Golden):
    return golden.model()


def test_schedule(golden: Golden, model) -> None:
    names = [name for name in golden.io if name.startswith("schedule/")]
    assert len(names) == 5
    for name in names:
        torch.testing.assert_close(
            getattr(model, name.removeprefix("schedule/")), golden.io[name], rtol=1e-6, atol=0
        )


def test_first_stage(golden: Golden, model) -> None:
    io = golden.io
    encoded = model.encode_first_stage(io["image"])
    if "latent" in io:
        assert_close(encoded, io["latent"], TIGHT)
        latent = encoded
    else:
        assert_close(encoded.mean, io["posterior_mean"], TIGHT)
        assert_close(encoded.logvar, io["posterior_logvar"], TIGHT)
        latent = encoded.mode()
    assert_close(model.scale_factor * latent, io["latent_scaled"], TIGHT)
    assert_close(model.decode_first_stage(io["latent_scaled"]), io["decoded"], TIGHT)


def test_conditioning(golden: Golden, model) -> None:
    prompts = golden.meta["prompts"]
    with torch.no_grad():
        assert_close(model.get_learned_conditioning(prompts), golden.io["conditioning"], TIGHT)
        assert_close(model.cond_stage_model.encode(prompts), golden.io["conditioning_plain"], TIGHT)


def test_denoiser(golden: Golden, model) -> None:
    io = golden.io
    with torch.no_grad():
        assert_close(model.apply_model(io["unet_x"], io["unet_t"], io["conditioning"]), io["unet_out"], TIGHT)


def test_loss_and_gradient(golden: Golden, model) -> None:
    io, meta = golden.io, golden.meta
    model.zero_grad()
    model.train()
    condition = model.get_learned_conditioning(meta["train_prompts"])
    loss, parts = model.p_losses(io["loss_x0"], condition, io["loss_t"], noise=io["loss_noise"])
    loss.backward()
    model.eval()
    assert loss.item() == pytest.approx(meta["loss_value"], rel=TIGHT)
    for name, value in meta["loss"].items():
        assert parts[name].item() == pytest.approx(value, rel=TIGHT), name
    vectors = model.embedding_manager.string_to_param_dict["*"]
    assert_close(vectors, io["param/*"], 1e-7)
    assert_close(vectors.grad, io["grad/*"], LOOSE)
    assert [p for p in model.parameters() if p.grad is not None] == [vectors]


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler])
def test_samples(golden: Golden, model, sampler: type) -> None:
    io = golden.io
    kind = "ddim" if sampler is DDIMSampler else "plms"
    with torch.no_grad():
        condition = model.get_learned_conditioning([golden.meta["prompts"][0]] * 2)
        uncond = model.get_learned_conditioning([""])
        assert_close(uncond, io["uncond"], TIGHT)
        samples, _ = sampler(model).sample(
            S=10,
            batch_size=2,
            shape=tuple(io["x_T"].shape[1:]),
            conditioning=condition,
            x_T=io["x_T"],
            eta=0.0,
            unconditional_guidance_scale=5.0,
            unconditional_conditioning=uncond.repeat(2, 1, 1),
            verbose=False,
        )
        assert_close(samples, io[f"sample_{kind}_10_scale5"], LOOSE)
        if kind == "ddim":
            assert_close(model.decode_first_stage(samples), io["sample_ddim_image"], LOOSE)


def test_five_optimizer_steps(golden: Golden) -> None:
    """Through the model's own optimiser: five steps of AdamW end at the recorded vectors."""
    model, io, meta = golden.model(), golden.io, golden.meta
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.learning_rate = meta["learning_rate"]
    optimizer = model.configure_optimizers()
    model.train()
    for step, (t, noise) in enumerate(zip(io["train_t"], io["train_noise"], strict=True)):
        condition = model.get_learned_conditioning(meta["train_prompts"])
        loss, _ = model.p_losses(io["loss_x0"], condition, t, noise=noise)
        assert loss.item() == pytest.approx(meta["train_losses"][step], rel=TIGHT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(model.embedding_manager.string_to_param_dict["*"], io["trained/*"], LOOSE)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["embedding_manager.string_to_param_dict.*"]
