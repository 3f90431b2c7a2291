from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

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
LOSS = "ldm.modules.losses."


def kl_model(decoder_only: bool = False, latent_noise: float = 0.0, **loss) -> AutoencoderKL:
    params = {"perceptual_weight": 0.0, "disc_weight": 0.0, "kl_weight": 1e-6} | loss
    node = {"target": LOSS + "LPIPSWithDiscriminator", "params": params}
    model = AutoencoderKL(DDCONFIG, node, embed_dim=2, decoder_only=decoder_only, latent_noise=latent_noise)
    model.learning_rate = 2e-3
    return model


def vq_model(**loss) -> VQModel:
    params = {"perceptual_weight": 0.0, "disc_weight": 0.0} | loss
    node = {"target": LOSS + "VQLPIPSWithDiscriminator", "params": params}
    model = VQModel(DDCONFIG | {"double_z": False}, node, n_embed=16, embed_dim=2)
    model.learning_rate = 2e-3
    return model


def batches(count: int) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand(4, 1, 1, 3, generator=generator) * 2 - 1
    pictures = colors.expand(4, 16, 16, 3)
    return DataLoader([{"image": picture} for picture in pictures] * count, batch_size=4)


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


def test_with_an_adversary_a_batch_is_still_one_step() -> None:
    torch.manual_seed(0)
    model = kl_model(disc_weight=0.5, disc_start=3, disc_num_layers=1)
    judge = {k: v.clone() for k, v in model.loss.discriminator.state_dict().items() if "weight" in k}
    trainer = fit(model, 6)
    assert trainer.global_step == 6
    assert any(
        not torch.equal(v, judge[k]) for k, v in model.loss.discriminator.state_dict().items() if k in judge
    )
    assert trainer.callback_metrics["train/disc_loss"] > 0


def test_the_factor_is_for_the_rate_of_all_but_the_discriminator() -> None:
    model = kl_model(disc_weight=0.5)
    model.lr_g_factor = 0.1
    generator, adversary = model.configure_optimizers()
    assert [len(o.param_groups) for o in (generator, adversary)] == [1, 1]
    assert generator.param_groups[0]["lr"] == pytest.approx(2e-4)
    assert adversary.param_groups[0]["lr"] == pytest.approx(2e-3)
    both = [p for o in (generator, adversary) for p in o.param_groups[0]["params"]]
    assert len(both) == sum(p.requires_grad for p in model.parameters())
    assert not any(p is model.loss.logvar for p in both)  # held, as the original held it


def test_the_decoder_alone_learns_from_noisy_latents_and_the_encoder_stays() -> None:
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


def test_noise_for_an_encoder_that_learns_is_an_error() -> None:
    with pytest.raises(ConfigError, match="latent_noise is 0.1, .* set decoder_only"):
        kl_model(latent_noise=0.1)


def test_starts_from_an_earlier_checkpoint(tmp_path) -> None:
    torch.manual_seed(0)
    first = kl_model()
    torch.save({"state_dict": first.state_dict()}, tmp_path / "f.ckpt")
    node = {"target": "torch.nn.Identity"}
    second = AutoencoderKL(DDCONFIG, node, 2, ckpt_path=str(tmp_path / "f.ckpt"))
    assert torch.equal(second.decoder.conv_out.weight, first.decoder.conv_out.weight)
    with skip_pretrained():
        AutoencoderKL(DDCONFIG, node, 2, ckpt_path="absent.ckpt")


def test_a_checkpoint_that_does_not_fit_is_an_error(tmp_path) -> None:
    node = {"target": "torch.nn.Identity"}
    path = str(tmp_path / "f.ckpt")
    torch.save({"state_dict": kl_model().state_dict()}, path)
    with pytest.raises(UserError, match=r"first stage '.*f\.ckpt' does not fit the config"):
        AutoencoderKL(DDCONFIG | {"ch": 16}, node, 2, ckpt_path=path)
    AutoencoderKL(DDCONFIG | {"ch": 16}, node, 2, ckpt_path=path, ignore_keys=["encoder", "decoder"])
    torch.save({"state_dict": {"first_stage_model.encoder.conv_in.bias": torch.ones(8)}}, path)
    with pytest.raises(UserError, match="holds no weight of AutoencoderKL"):
        AutoencoderKL(DDCONFIG, node, 2, ckpt_path=path)


def test_shapes_and_errors() -> None:
    model = kl_model()
    posterior = model.encode(torch.zeros(1, 3, 16, 24))
    assert posterior.mean.shape == (1, 2, 8, 12)
    assert model.decode(posterior.mode()).shape == (1, 3, 16, 24)
    with pytest.raises(ConfigError, match="double_z"):
        AutoencoderKL(DDCONFIG | {"double_z": False}, {"target": "torch.nn.Identity"}, 2)


def test_identity() -> None:
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(IdentityFirstStage().decode(IdentityFirstStage().encode(x)), x)
