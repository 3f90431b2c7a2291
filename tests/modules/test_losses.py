from __future__ import annotations

import pytest
import torch

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import KLReconstructionLoss, VQReconstructionLoss
from ldm.util import ConfigError, check_config, get_obj_from_str, instantiate_from_config

NO_ADVERSARY = {"disc_start": 50001, "disc_weight": 0.0, "perceptual_weight": 0.0}
OLD_KL = [
    "ldm.modules.losses.LPIPSWithDiscriminator",
    "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator",
]
OLD_VQ = [
    "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
]


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 2, 3, 32, 32, generator=generator) * 2 - 1
    return x, y


def test_kl_loss_is_likelihood_plus_weighted_divergence(images) -> None:
    x, y = images
    posterior = DiagonalGaussianDistribution(torch.full((2, 8, 4, 4), 0.3))
    loss, parts = KLReconstructionLoss(kl_weight=0.01, mse_weight=2.0, logvar_init=0.2)(x, y, posterior)
    error = (x - y).abs() + 2 * (x - y) ** 2
    nll = (error / torch.tensor(0.2).exp() + 0.2).sum() / 2
    torch.testing.assert_close(loss, nll + 0.01 * posterior.kl().mean())
    assert parts["rec_loss"].item() == pytest.approx(error.mean().item())


def test_vq_loss_is_mean_error_plus_weighted_codebook_loss(images) -> None:
    x, y = images
    loss, parts = VQReconstructionLoss(pixelloss_weight=0.5, mse_weight=2.0, codebook_weight=3.0)(
        x, y, torch.tensor([0.1, 0.3])
    )
    error = 0.5 * (x - y).abs() + 2 * (x - y) ** 2
    torch.testing.assert_close(loss, error.mean() + 0.6)
    assert parts["quant_loss"].item() == pytest.approx(0.2)


def test_the_output_variance_is_trained_on_request_only() -> None:
    assert not KLReconstructionLoss().logvar.requires_grad
    assert KLReconstructionLoss(learn_logvar=True).logvar.requires_grad


@pytest.mark.parametrize(
    ("targets", "kind"), [(OLD_KL, KLReconstructionLoss), (OLD_VQ, VQReconstructionLoss)]
)
def test_the_original_names_build_a_loss_without_adversary(targets: list[str], kind: type) -> None:
    for target in targets:
        node = {"target": target, "params": NO_ADVERSARY | {"mse_weight": 2.0}}
        check_config(node)
        loss = instantiate_from_config(node)
        assert isinstance(loss, kind) and loss.mse_weight == 2.0


@pytest.mark.parametrize("target", [OLD_KL[0], OLD_VQ[0]])
@pytest.mark.parametrize("weights", [{"disc_weight": 0.0}, {"perceptual_weight": 0.0}])
def test_an_adversarial_or_perceptual_weight_is_an_error(target: str, weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="only reconstruction losses are trained here; set both to 0"):
        instantiate_from_config({"target": target, "params": {"disc_start": 1, **weights}})


def test_a_squared_pixel_loss_of_the_original_is_an_error() -> None:
    with pytest.raises(ConfigError, match="pixel_loss is 'l2'"):
        instantiate_from_config({"target": OLD_VQ[0], "params": NO_ADVERSARY | {"pixel_loss": "l2"}})


def test_the_dummy_loss_of_old_yamls_is_the_identity() -> None:
    assert get_obj_from_str("ldm.modules.losses.contperceptual.DummyLoss") is torch.nn.Identity
