"""The precision of a run: half for frozen weights only."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import main
from ldm.training import run as run_module
from ldm.training.trainer import FrozenHalf, half_for, plugin_for, possible_precision
from tests.golden_record import Golden


def gradient(model, plugin) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 2, model.channels, 8, 8, generator=generator)
    model.zero_grad()
    with plugin.forward_context():
        condition = model.get_learned_conditioning(["a photo of *", "a rendering of *"])
        loss, _ = model.p_losses(z, condition, torch.tensor([100, 700]), noise=noise)
    loss.backward()
    (vectors,) = model.embedding_manager.embedding_parameters()
    return loss, vectors.grad.clone()


@pytest.mark.parametrize("case", ["clip_one_vector", "bert_one_vector"])
def test_same_numbers_as_autocast(case) -> None:
    model = Golden(case).model().train()
    expected = gradient(model, pl.plugins.precision.MixedPrecision("bf16-mixed", "cpu"))
    plugin = FrozenHalf("bf16-mixed", "cpu")
    plugin.convert_module(model)
    half = [p for p in model.parameters() if p.dtype == torch.bfloat16]
    assert sum(p.numel() for p in half) > 0.95 * sum(p.numel() for p in model.model.parameters())
    assert model.cond_stage_model.token_embedding.weight.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.first_stage_model.parameters())
    norms = [part for part in model.modules() if isinstance(part, (nn.GroupNorm, nn.LayerNorm))]
    assert norms and all(p.dtype == torch.float32 for norm in norms for p in norm.parameters())
    loss, found = gradient(model, plugin)
    assert torch.equal(loss, expected[0]) and torch.equal(found, expected[1])
    assert loss.dtype == found.dtype == torch.float32
    plugin.teardown()
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_trained_weights_are_not_converted() -> None:
    model = nn.Module()
    model.model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    FrozenHalf("bf16-mixed", "cpu").convert_module(model)
    assert [layer.weight.dtype for layer in model.model] == [torch.float32, torch.bfloat16]


@pytest.mark.done_or_said
def test_names_of_precisions() -> None:
    assert plugin_for(None, "cpu") is plugin_for("32-true", "gpu") is plugin_for(5, "cpu") is None
    for name in ("bf16", "bf16-mixed", "bf16-true"):
        assert plugin_for(name, "gpu").precision == "bf16-mixed"
        assert plugin_for(name, "gpu").device == "cuda"
    assert plugin_for(16, "cpu").precision == plugin_for("16-true", "cpu").precision == "bf16-mixed"


@pytest.mark.done_or_said
@pytest.mark.parametrize(("native", "kind"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_gpu_without_bfloat16(native: bool, kind: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert plugin_for("bf16-mixed", "gpu").precision == kind


@pytest.mark.done_or_said
def test_precisions_of_an_apple_gpu(apple_gpu, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO, logger="ldm")
    plugin = plugin_for("bf16-mixed", "mps")
    assert plugin is not None and (plugin.precision, plugin.device, plugin.scaler) == (
        "bf16-mixed",
        "mps",
        None,
    )
    assert not caplog.messages and plugin_for("32-true", "mps") is None
    assert plugin_for(16, "mps").precision == plugin_for(16, "auto").precision == "bf16-mixed"
    assert "16 is not supported on an Apple GPU; using bf16-mixed" in caplog.text
    assert possible_precision("bf16", "mps") == "bf16"
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: False)
    assert plugin_for("bf16-mixed", "mps") is half_for("bf16-mixed", "mps") is None
    assert "needs macOS 14; using 32-true" in caplog.text
    assert possible_precision("bf16-mixed", "mps") == "32-true"


class RecordTypes(pl.Callback):
    """Records the dtypes of what a step uses."""

    seen: list[set[torch.dtype]] = []

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        (vectors,) = model.embedding_manager.embedding_parameters()
        state = trainer.optimizers[0].state[vectors]
        learned = [vectors, outputs["loss"], *(v for v in state.values() if v.ndim)]
        frozen = model.model.diffusion_model.out[2].weight
        self.seen.append(({value.dtype for value in learned}, frozen.dtype))


def test_run_in_bf16_true_trains_in_float32(tiny_yaml, monkeypatch) -> None:
    monkeypatch.setattr(RecordTypes, "seen", [])
    models, make = [], run_module.make_model
    monkeypatch.setattr(
        run_module, "make_model", lambda *given, **by: models.append(make(*given, **by)) or models[0]
    )
    words = [
        "lightning.trainer.precision=bf16-true",
        f"lightning.callbacks.look.target={__name__}.RecordTypes",
    ]
    images = "lightning.callbacks.image_logger.params"
    words += [f"{images}.batch_frequency=2", f"{images}.log_images_kwargs.ddim_steps=1", "--max_steps", "2"]
    assert main.main(["--base", str(tiny_yaml), "-t", *words]) == 0
    assert RecordTypes.seen == [({torch.float32}, torch.bfloat16)] * 2
    (run,) = Path("logs").iterdir()
    assert list((run / "images" / "train").glob("samples_*")), "previews work in it too"
    assert {p.dtype for p in models[0].parameters()} == {torch.float32}
