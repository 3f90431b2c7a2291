from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.checkpoint import load_state
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel
from ldm.util import ConfigError, UserError, skip_pretrained

DDCONFIG = {
    "double_z": True,
    "z_channels": 2,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "num_groups": 4,
}
LOSSES = "ldm.modules.losses."
NO_LOSS = {"target": "torch.nn.Identity"}


def kl_model(loss: dict | None = None, **params) -> AutoencoderKL:
    node = loss or {"target": LOSSES + "KLReconstructionLoss", "params": {"kl_weight": 1e-6}}
    model = AutoencoderKL(DDCONFIG, node, embed_dim=2, **params)
    model.learning_rate = 2e-3
    return model


def vq_model() -> VQModel:
    node = {"target": LOSSES + "VQReconstructionLoss"}
    model = VQModel(DDCONFIG | {"double_z": False}, node, n_embed=16, embed_dim=2)
    model.learning_rate = 2e-3
    return model


def batches(count: int) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand(4, 1, 1, 3, generator=generator) * 2 - 1
    images = colors.expand(4, 16, 16, 3)
    return DataLoader([{"image": image} for image in images] * count, batch_size=4)


def fit(model: pl.LightningModule, steps: int) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches(steps))
    return trainer


def test_psnr_is_the_mean_over_images_in_decibels_of_the_range_of_2(monkeypatch):
    model, logged = kl_model(), {}
    x = torch.zeros(2, 3, 4, 4)
    errors = torch.tensor([0.2, 0.02]).reshape(2, 1, 1, 1)  # 1/10 and 1/100 of the range: 20 and 40 dB
    monkeypatch.setattr(model, "shared_step", lambda batch: (x, x + errors, None, {}))
    monkeypatch.setattr(model, "log_dict", lambda parts, **options: logged.update(parts))
    model.validation_step({}, 0)
    assert logged["val/psnr"].item() == pytest.approx(30, abs=1e-4)


def reconstruction_error(model: pl.LightningModule) -> float:
    x = next(iter(batches(1)))["image"].movedim(-1, 1)
    with torch.no_grad():
        return (model.eval()(x)[0] - x).pow(2).mean().item()


@pytest.mark.parametrize("make", [kl_model, vq_model])
def test_training_lowers_the_error(make) -> None:
    torch.manual_seed(0)
    model = make()
    before = reconstruction_error(model)
    trainer = fit(model.train(), 60)
    assert trainer.global_step == 60
    assert reconstruction_error(model) < 0.5 * before


def test_the_optimizer_holds_what_is_trained_at_the_scaled_rate() -> None:
    loss = {"target": LOSSES + "KLReconstructionLoss", "params": {"learn_logvar": True}}
    model = kl_model(loss, lr_g_factor=0.1, decoder_only=True)
    model.configure_model()
    (group,) = model.configure_optimizers().param_groups
    assert group["lr"] == pytest.approx(2e-4) and tuple(group["betas"]) == (0.5, 0.9)
    trained = [*model.decoder.parameters(), *model.post_quant_conv.parameters(), model.loss.logvar]
    assert {id(p) for p in group["params"]} == {id(p) for p in trained}


def test_a_loss_that_cannot_be_trained_is_an_error_in_training_only() -> None:
    adversarial = {
        "target": LOSSES + "LPIPSWithDiscriminator",
        "params": {"disc_start": 1, "disc_weight": 0.5},
    }
    for node, words in [
        (adversarial, "disc_weight is 0.5 and perceptual_weight 1, but only reconstruction losses"),
        (NO_LOSS, "lossconfig torch.nn.Identity is no loss; to train, name ldm.modules.losses.KLRec"),
    ]:
        model = kl_model(node)
        assert model.decode(model.encode(torch.zeros(1, 3, 16, 16)).mode()).shape == (1, 3, 16, 16)
        with pytest.raises(ConfigError, match=words):
            fit(model, 1)


def test_the_loss_in_a_published_checkpoint_is_ignored(tmp_path, caplog) -> None:
    first = kl_model()
    state = first.state_dict() | {
        "loss.discriminator.main.0.weight": torch.zeros(2),
        "loss.logvar": torch.ones(()),
    }
    torch.save({"state_dict": state}, tmp_path / "f.ckpt")
    second = kl_model(NO_LOSS, ckpt_path=str(tmp_path / "f.ckpt"))
    assert torch.equal(second.decoder.conv_out.weight, first.decoder.conv_out.weight)
    holder = torch.nn.ModuleDict({"first_stage_model": kl_model(NO_LOSS)})
    load_state(holder, {f"first_stage_model.{key}": value for key, value in state.items()}, "test")
    assert torch.equal(holder["first_stage_model"].decoder.conv_out.weight, first.decoder.conv_out.weight)
    assert "unexpected" not in caplog.text


def test_decoder_only_trains_the_decoder_on_noisy_latents() -> None:
    model = kl_model(decoder_only=True, latent_noise=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    error = reconstruction_error(model)
    fit(model.train(), 30)
    after = model.state_dict()
    for key, value in before.items():
        learns = key.startswith(("decoder.", "post_quant_conv.", "loss."))
        assert learns or torch.equal(after[key], value), key
    assert reconstruction_error(model) < 0.7 * error
    x = next(iter(batches(1)))["image"].movedim(-1, 1)
    assert torch.equal(model(x, sample_posterior=False)[0], model(x, sample_posterior=False)[0])
    model.train()
    assert not torch.equal(model(x, sample_posterior=False)[0], model(x, sample_posterior=False)[0])


def test_latent_noise_needs_decoder_only() -> None:
    with pytest.raises(ConfigError, match="latent_noise is 0.1, .*; set decoder_only"):
        kl_model(latent_noise=0.1)


def test_starts_from_an_earlier_checkpoint(tmp_path) -> None:
    torch.manual_seed(0)
    first = kl_model()
    torch.save({"state_dict": first.state_dict()}, tmp_path / "f.ckpt")
    second = AutoencoderKL(DDCONFIG, NO_LOSS, 2, ckpt_path=str(tmp_path / "f.ckpt"))
    assert torch.equal(second.decoder.conv_out.weight, first.decoder.conv_out.weight)
    with skip_pretrained():
        AutoencoderKL(DDCONFIG, NO_LOSS, 2, ckpt_path="absent.ckpt")


def test_a_checkpoint_that_does_not_fit_is_an_error(tmp_path) -> None:
    path = str(tmp_path / "f.ckpt")
    torch.save({"state_dict": kl_model().state_dict()}, path)
    with pytest.raises(UserError, match=r"first stage '.*f\.ckpt' does not fit the config"):
        AutoencoderKL(DDCONFIG | {"ch": 16}, NO_LOSS, 2, ckpt_path=path)
    AutoencoderKL(DDCONFIG | {"ch": 16}, NO_LOSS, 2, ckpt_path=path, ignore_keys=["encoder", "decoder"])
    torch.save({"state_dict": {"first_stage_model.encoder.conv_in.bias": torch.ones(8)}}, path)
    with pytest.raises(UserError, match="holds no first stage"):
        AutoencoderKL(DDCONFIG, NO_LOSS, 2, ckpt_path=path)


def test_shapes_and_errors() -> None:
    model = kl_model()
    posterior = model.encode(torch.zeros(1, 3, 16, 24))
    assert posterior.mean.shape == (1, 2, 8, 12)
    assert model.decode(posterior.mode()).shape == (1, 3, 16, 24)
    with pytest.raises(ConfigError, match="double_z"):
        AutoencoderKL(DDCONFIG | {"double_z": False}, NO_LOSS, 2)


def test_identity() -> None:
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(IdentityFirstStage().decode(IdentityFirstStage().encode(x)), x)


def test_attention_can_be_left_out() -> None:
    def keys(kind: str) -> set[str]:
        return {
            key
            for key in AutoencoderKL(DDCONFIG | {"attn_type": kind}, NO_LOSS, 2).state_dict()
            if "attn" in key
        }

    assert keys("none") == set() and "decoder.mid.attn_1.q.weight" in keys("vanilla")
    with pytest.raises(ConfigError, match="attn_type is 'linear'; use vanilla or none"):
        keys("linear")
