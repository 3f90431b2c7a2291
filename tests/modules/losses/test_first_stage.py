from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import LPIPSWithDiscriminator, VQLPIPSWithDiscriminator
from ldm.modules.losses.discriminator import NLayerDiscriminator
from ldm.modules.losses.lpips import LPIPS
from ldm.util import ConfigError, skip_pretrained

PLAIN = {"perceptual_weight": 0.0, "disc_weight": 0.0}


@pytest.fixture
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(2, 2, 3, 32, 32, generator=generator) * 2 - 1)


def posterior() -> DiagonalGaussianDistribution:
    return DiagonalGaussianDistribution(torch.full((2, 8, 4, 4), 0.3))


def test_kl_loss_is_likelihood_plus_weighted_divergence(pictures) -> None:
    x, y = pictures
    loss, parts = LPIPSWithDiscriminator(kl_weight=0.01, mse_weight=2.0, logvar_init=0.2, **PLAIN)(
        x, y, posterior(), 0, last_layer=None
    )
    error = (x - y).abs() + 2 * (x - y) ** 2
    nll = (error / torch.tensor(0.2).exp() + 0.2).sum() / 2
    torch.testing.assert_close(loss, nll + 0.01 * posterior().kl().mean())
    assert parts["rec_loss"].item() == pytest.approx(error.mean().item())


def test_adversary_joins_at_its_step_with_a_balanced_gradient(pictures) -> None:
    x, noise = pictures
    last = nn.Conv2d(3, 3, 1)
    loss = LPIPSWithDiscriminator(disc_start=10, perceptual_weight=0.0, disc_weight=1.0)
    y = last(noise)
    _, before = loss(x, y, posterior(), 9, last.weight)
    total, after = loss(x, y, posterior(), 10, last.weight)
    assert before["g_loss"] == 0 and after["g_loss"] != 0
    nll_grad, total_grad = (
        torch.autograd.grad(value, last.weight, retain_graph=True)[0]
        for value in (loss.reconstruction(x, y).sum() / 2, total)
    )
    ratio = (total_grad - nll_grad).norm() / nll_grad.norm()
    assert ratio.item() == pytest.approx(1.0, abs=0.05)


def test_discriminator_learns_to_tell_and_leaves_the_generator_alone(pictures) -> None:
    x, noise = pictures
    last = nn.Conv2d(3, 3, 1)
    torch.manual_seed(0)
    loss = VQLPIPSWithDiscriminator(perceptual_weight=0.0)
    optimizer = torch.optim.Adam(loss.discriminator.parameters(), 2e-3)
    values = []
    for _ in range(8):
        value = loss.discriminate(x, last(noise))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]
    assert last.weight.grad is None


def test_discriminator_sees_patches() -> None:
    assert NLayerDiscriminator(n_layers=3)(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 6, 6)


def test_lpips_is_a_distance_and_reads_its_file(tmp_path, pictures) -> None:
    x, y = pictures
    with skip_pretrained():
        fresh = LPIPS(None)
    for head in fresh.heads:
        nn.init.uniform_(head.weight, 0, 1)
    state = {
        f"net.slice1.{k.removeprefix('features.')}": v for k, v in fresh.state_dict().items() if "feat" in k
    }
    state |= {f"lin{i}.model.1.weight": head.weight for i, head in enumerate(fresh.heads)}
    torch.save(state, tmp_path / "vgg.pth")
    loaded = LPIPS(str(tmp_path / "vgg.pth"))
    assert loaded(x, x).abs().max() == 0 and (loaded(x, y) > 0).all() and loaded(x, y).shape == (2, 1, 1, 1)
    torch.testing.assert_close(loaded(x, y), fresh(x, y))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_errors_name_the_remedy(tmp_path) -> None:
    with pytest.raises(ConfigError, match="perceptual_ckpt.*perceptual_weight: 0"):
        LPIPSWithDiscriminator(perceptual_weight=1.0)
    with pytest.raises(ConfigError, match="disc_loss 'wasserstein'"):
        LPIPSWithDiscriminator(disc_loss="wasserstein", perceptual_weight=0)
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(ConfigError, match="lacks"):
        LPIPS(str(tmp_path / "part.pth"))
