from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.checkpoint import load_state
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.util import ConfigError, UserError, instantiate_from_config, skip_pretrained
from tests.golden_record import Golden, fill, golden_state

UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "attention_resolutions": [],
        "num_res_blocks": 1,
        "channel_mult": [1],
        "num_heads": 4,
    },
}
IDENTITY = {"target": "ldm.models.autoencoder.IdentityFirstStage"}


def latent(unet: dict | None = None, **params) -> LatentDiffusion:
    torch.manual_seed(0)
    node = copy.deepcopy(UNET)
    node["params"] |= unet or {}
    defaults = {"cond_stage_config": "__is_unconditional__", "use_ema": False, "channels": 3}
    return LatentDiffusion(IDENTITY, unet_config=node, **(defaults | params))


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 8, 8, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1


def fit(model: DDPM, rate: float = 1e-5) -> None:
    """One training step of four images."""
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model.learning_rate = rate
    trainer.fit(model, DataLoader([{"image": image} for image in images(4)], batch_size=4))


def test_loss_is_the_squared_error_of_the_target() -> None:
    model = latent(parameterization="v", loss_type="l1")
    x0, noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([5, 200, 600, 990])
    loss, parts = model.p_losses(x0, None, t, noise)
    expected = (model.apply_model(model.q_sample(x0, t, noise), t) - model.get_v(x0, noise, t)).abs().mean()
    torch.testing.assert_close(loss, expected)
    assert set(parts) == {"train/loss_simple", "train/loss_vlb", "train/loss"}
    weighted, _ = latent(parameterization="v", original_elbo_weight=0.5).p_losses(x0, None, t, noise)
    plain, parts = latent(parameterization="v").p_losses(x0, None, t, noise)
    torch.testing.assert_close(weighted, plain + 0.5 * parts["train/loss_vlb"])


def test_a_batch_may_weight_what_counts_in_the_loss() -> None:
    model = latent()
    weight = torch.zeros(4, 8, 8)
    weight[:, :, :3] = 1

    def loss(x: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return model.shared_step({"image": x, **batch})[0]

    torch.manual_seed(0)
    z, _ = model.get_input({"image": images(4)}, "image")
    t = model.random_timesteps(4)
    noise = torch.randn_like(z)
    error = model.get_loss(model.apply_model(model.q_sample(z, t, noise), t), noise)
    torch.testing.assert_close(loss(images(4), loss_weight=weight), error[..., :3].mean())
    torch.testing.assert_close(loss(images(4)), error.mean())


def test_learned_variances_join_the_loss_and_the_optimizer() -> None:
    model = latent(learn_logvar=True, logvar_init=0.3)
    model.learning_rate = 1e-3
    x0 = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loss, parts = model.p_losses(x0, None, torch.tensor([1, 2]), x0)
    torch.testing.assert_close(loss, parts["train/loss_simple"] / torch.tensor(0.3).exp() + 0.3)
    assert any(
        model.logvar is p for group in model.configure_optimizers().param_groups for p in group["params"]
    )


@pytest.mark.parametrize(
    ("key", "unet", "condition"),
    [
        ("concat", {"in_channels": 6}, torch.ones(2, 3, 8, 8)),
        (
            "crossattn",
            {"use_spatial_transformer": True, "context_dim": 5, "attention_resolutions": [1]},
            torch.ones(2, 4, 5),
        ),
        ("adm", {"num_classes": 4}, torch.tensor([1, 3])),
        (
            "hybrid",
            {
                "in_channels": 6,
                "use_spatial_transformer": True,
                "context_dim": 5,
                "attention_resolutions": [1],
            },
            {"c_concat": [torch.ones(2, 3, 8, 8)], "c_crossattn": [torch.ones(2, 4, 5)]},
        ),
    ],
)
def test_conditioning_keys(key: str, unet: dict, condition) -> None:
    model = latent(unet, conditioning_key=key, cond_stage_config=IDENTITY)
    x, t = torch.zeros(2, 3, 8, 8), torch.tensor([1, 2])
    as_dict = (
        condition
        if isinstance(condition, dict)
        else {f"c_{'concat' if key == 'concat' else 'crossattn'}": [condition]}
    )
    torch.testing.assert_close(model.apply_model(x, t, condition), model.apply_model(x, t, as_dict))


def test_class_condition_reaches_the_denoiser_through_its_embedder() -> None:
    embedder = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 5, "n_classes": 3, "key": "class_label"},
    }
    model = latent(
        {"use_spatial_transformer": True, "context_dim": 5, "attention_resolutions": [1]},
        conditioning_key="crossattn",
        cond_stage_config=embedder,
        cond_stage_key="class_label",
        cond_stage_trainable=True,
    )
    model.learning_rate = 1e-3
    loss, _ = model.shared_step({"image": images(), "class_label": torch.tensor([0, 2])})
    for p in model.model.diffusion_model.out.parameters():
        torch.nn.init.ones_(p)
    loss, _ = model.shared_step({"image": images(), "class_label": torch.tensor([0, 2])})
    loss.backward()
    optimised = {id(p) for group in model.configure_optimizers().param_groups for p in group["params"]}
    assert all(id(p) in optimised for p in model.cond_stage_model.parameters())


def test_pixel_diffusion_without_latents() -> None:
    model = DDPM(UNET, use_ema=True, channels=3)
    assert model.log_images({"image": images(3)}, N=2).keys() == {"inputs"}
    assert model.log_images({"image": images(3)}, N=2)["inputs"].shape == (2, 3, 8, 8)
    loss, _ = model.shared_step({"image": images()})
    assert loss.requires_grad
    model.learning_rate = 1e-3
    assert len(model.configure_optimizers().param_groups[0]["params"]) == len(list(model.model.parameters()))


def test_scale_by_std_gives_the_first_batch_unit_variance() -> None:
    model = latent(scale_by_std=True)
    fit(model)
    z, _ = model.get_input({"image": images(4)}, "image")
    assert z.std().item() == pytest.approx(1.0, abs=1e-5)
    assert "scale_factor" in model.state_dict()


def test_scale_by_std_changes_no_scale_after_the_first_step(monkeypatch) -> None:
    batch = {"image": images(4)}
    for step, changed in ((1, False), (0, True)):
        model = latent(scale_by_std=True)
        monkeypatch.setattr(LatentDiffusion, "global_step", step)
        model.on_train_batch_start(batch, 1)
        assert model.scale_factor == 1.0
        model.on_train_batch_start(batch, 0)
        assert (model.scale_factor != 1.0) == changed


def test_averages_follow_training_and_are_used_in_their_scope() -> None:
    model = latent(use_ema=True, ema_decay=0.5)
    weight = model.model.diffusion_model.out[2].bias
    start = weight.detach().clone()
    fit(model, rate=1e-2)
    trained = weight.detach().clone()
    with model.ema_scope():
        # one update: the decay begins at 2 / 11
        torch.testing.assert_close(weight, start + (trained - start) * 9 / 11)
    assert torch.equal(weight, trained) and not torch.equal(trained, start)


def test_unsupported_settings_are_named() -> None:
    for params, words in [
        ({"parameterization": "epsilon"}, "parameterization 'epsilon'.*eps"),
        ({"loss_type": "huber"}, "loss_type 'huber'"),
        ({"num_timesteps_cond": 5}, "num_timesteps_cond is 5"),
        ({"conditioning_key": "film", "cond_stage_config": IDENTITY}, "conditioning_key 'film'"),
    ]:
        with pytest.raises(ConfigError, match=words):
            latent(**params)
    model = latent(optimizer_config={"target": "torch.optim.AdamW", "params": {"momentum": 1}})
    model.learning_rate = 1.0
    with pytest.raises(ConfigError, match="AdamW.*momentum"):
        model.configure_optimizers()


class DDPMOfAUser(DDPM):
    pass


class LatentDiffusionOfAUser(LatentDiffusion):
    pass


@pytest.mark.parametrize("kind", [DDPM, DDPMOfAUser, LatentDiffusion, LatentDiffusionOfAUser])
def test_every_class_loads_its_checkpoint(tmp_path, kind: type[DDPM]) -> None:
    rest = {"unet_config": UNET, "channels": 3}
    if issubclass(kind, LatentDiffusion):
        rest |= {"first_stage_config": IDENTITY, "cond_stage_config": "__is_unconditional__"}
    path = str(tmp_path / "model.ckpt")
    first = kind(**rest)
    with torch.no_grad():
        first.model.diffusion_model.out[2].bias.fill_(7.0)
    torch.save({"state_dict": first.state_dict()}, path)
    assert (kind(**rest, ckpt_path=path).model.diffusion_model.out[2].bias == 7.0).all()
    with skip_pretrained():
        assert (kind(**rest, ckpt_path=path).model.diffusion_model.out[2].bias == 0.0).all()


@pytest.mark.parametrize("kind", [DDPM, LatentDiffusion])
def test_averages_start_at_loaded_weights_without_averages_of_their_own(tmp_path, kind: type[DDPM]) -> None:
    rest = {"unet_config": UNET, "channels": 3}
    if issubclass(kind, LatentDiffusion):
        rest |= {"first_stage_config": IDENTITY, "cond_stage_config": "__is_unconditional__"}
    first = kind(**rest)
    with torch.no_grad():
        first.model.diffusion_model.out[2].bias.fill_(7.0)  # the average stays at 0
    state = first.state_dict()
    name = "model_ema.diffusion_modelout2bias"
    assert (state[name] == 0.0).all()
    torch.save({"state_dict": state}, tmp_path / "with.ckpt")
    weights = {key: value for key, value in state.items() if not key.startswith("model_ema.")}
    torch.save({"state_dict": weights}, tmp_path / "without.ckpt")
    assert (kind(**rest, ckpt_path=str(tmp_path / "with.ckpt")).state_dict()[name] == 0.0).all()
    assert (kind(**rest, ckpt_path=str(tmp_path / "without.ckpt")).state_dict()[name] == 7.0).all()


def test_keys_to_ignore_keep_their_fresh_weights(tmp_path) -> None:
    torch.save({"state_dict": latent().state_dict()}, tmp_path / "m.ckpt")
    path, name = str(tmp_path / "m.ckpt"), "model.diffusion_model.out"
    with pytest.raises(UserError, match="does not fit the config"):
        latent({"out_channels": 6}, ckpt_path=path)
    for only_unet in (False, True):
        model = latent({"out_channels": 6}, ckpt_path=path, ignore_keys=[name], load_only_unet=only_unet)
        assert model.model.diffusion_model.out[2].bias.shape == (6,)


def test_builds_without_personalization_and_trains_the_denoiser_only() -> None:
    config = Golden("clip_one_vector").config()
    del config.params["personalization_config"]
    config.params.cond_stage_trainable = False
    with skip_pretrained():
        model = fill(instantiate_from_config(config)).train()
    model.learning_rate = 1e-3
    loss, _ = model.shared_step({"image": torch.zeros(2, 64, 64, 3), "caption": ["a dog", "a photo"]})
    loss.backward()
    with_gradient = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"model"}
    assert model.trainable_state_dict().keys() == model.state_dict().keys()


def test_captions_are_dropped_at_the_rate_for_guidance(monkeypatch) -> None:
    config = Golden("clip_one_vector").config()
    del config.params["personalization_config"]
    config.params.ucg_rate = 0.25
    config.params.cond_stage_trainable = False
    with skip_pretrained():
        model = instantiate_from_config(config).train()
    seen = []
    monkeypatch.setattr(model, "get_learned_conditioning", lambda c: seen.extend(c))
    monkeypatch.setattr(model, "p_losses", lambda *a: None)
    torch.manual_seed(0)
    model(torch.zeros(2000, 1, 1, 1), ["a dog"] * 2000)
    assert 0.2 < seen.count("") / 2000 < 0.3
    model.eval()
    seen.clear()
    model(torch.zeros(100, 1, 1, 1), ["a dog"] * 100)
    assert seen.count("") == 0


def test_unfreezing_trains_the_denoiser_at_its_own_rate() -> None:
    case = Golden("clip_one_vector")
    config = case.config()
    config.params.unfreeze_model, config.params.model_lr = True, 1e-6
    with skip_pretrained():
        model = fill(instantiate_from_config(config)).train()
    model.learning_rate = 5e-3
    vectors, denoiser = model.configure_optimizers().param_groups
    assert (vectors["lr"], denoiser["lr"]) == (5e-3, 1e-6)
    assert len(denoiser["params"]) == len(list(model.model.parameters()))
    prefixes = {name.split(".")[0] for name in model.trainable_state_dict()}
    assert prefixes == {"embedding_manager", "model"}


def test_regularisation_pulls_towards_the_initial_word() -> None:
    config = Golden("clip_one_vector").config()
    config.params.embedding_reg_weight = 0.1
    with skip_pretrained():
        model = instantiate_from_config(config)
    with torch.no_grad():
        model.embedding_manager.string_to_param_dict["*"] += 0.5
    x, cond = torch.zeros(1, 4, 8, 8), model.get_learned_conditioning(["a *"])
    weighted, parts = model.p_losses(x, cond, torch.tensor([1]), noise=x)
    model.embedding_reg_weight = 0.0
    plain, _ = model.p_losses(x, cond, torch.tensor([1]), noise=x)
    assert (weighted - plain).item() == pytest.approx(0.1 * 0.25 * 32, rel=1e-4)
    assert parts["train/loss_emb_reg"].item() == pytest.approx(0.25 * 32, rel=1e-5)


def test_a_frozen_denoiser_is_not_averaged_unless_a_checkpoint_holds_averages() -> None:
    config = Golden("clip_one_vector").config()
    config.params.use_ema = True

    def loaded(state: dict[str, torch.Tensor], **params) -> LatentDiffusion:
        with skip_pretrained():
            model = instantiate_from_config({**config, "params": {**config.params, **params}})
        load_state(model, state, "test")
        return model

    plain = golden_state(Golden("clip_one_vector").model(load_embeddings=False))
    model = loaded(plain)
    assert not model.use_ema and not any(key.startswith("model_ema.") for key in model.state_dict())
    with model.ema_scope():
        pass
    trained = loaded(plain, unfreeze_model=True)
    assert trained.use_ema
    averages = {k: v for k, v in trained.state_dict().items() if k.startswith("model_ema.")}
    assert loaded(plain | averages, unfreeze_model=True).use_ema
    assert LatentDiffusion.optional_state[1] == "model_ema."


def test_a_frozen_denoiser_is_in_eval_mode_and_an_unfrozen_one_is_not() -> None:
    config = Golden("clip_one_vector").config()
    config.params.unet_config.params.dropout = 0.5
    x, t = torch.ones(1, 4, 8, 8), torch.tensor([5])
    for unfrozen in (False, True):
        config.params.unfreeze_model = unfrozen
        with skip_pretrained():
            model = fill(instantiate_from_config(config)).train()
        cond = model.get_learned_conditioning(["a *"]).detach()
        same = torch.equal(model.apply_model(x, t, cond), model.apply_model(x, t, cond))
        assert same is not unfrozen
        assert model.training and not model.first_stage_model.training and not model.cond_stage_model.training


def test_a_target_that_is_no_personalization_is_an_error() -> None:
    config = Golden("clip_one_vector").config()
    config.params.personalization_config = {"target": f"{__name__}.NoPersonalization"}
    with (
        skip_pretrained(),
        pytest.raises(ConfigError, match="is no Personalization; .*ldm/modules/personalization.py"),
    ):
        instantiate_from_config(config)


class NoPersonalization(torch.nn.Module):
    def __init__(self, embedder: object) -> None:
        super().__init__()


def test_the_optimizer_takes_the_groups_of_the_personalization() -> None:
    with skip_pretrained():
        model = instantiate_from_config(Golden("clip_one_vector").config())
    (vector,) = model.embedding_manager.embedding_parameters()
    model.embedding_manager.parameter_groups = lambda: [{"params": [vector], "lr": 0.25}]
    model.learning_rate = 1.0
    assert [group["lr"] for group in model.configure_optimizers().param_groups] == [0.25]


def test_token_ids_of_a_batch_are_the_condition_as_they_are() -> None:
    ids = torch.tensor([[1, 2, 3]])
    model = latent(
        {"use_spatial_transformer": True, "context_dim": 5, "attention_resolutions": [1]},
        conditioning_key="crossattn",
        cond_stage_config={
            "target": "ldm.modules.encoders.modules.BERTEmbedder",
            "params": {"n_embed": 5, "n_layer": 1, "vocab_size": 8, "max_seq_len": 3, "use_tokenizer": False},
        },
        cond_stage_key="coordinates_bbox",
        cond_stage_trainable=True,
    )
    _, condition = model.get_input({"image": images(1), "coordinates_bbox": ids}, "image")
    assert torch.equal(condition, ids)
    assert model.get_learned_conditioning(condition).shape == (1, 3, 5)


CAPTIONS = ["a photo of *", "a rendering of *", "a photo of *", "a photo of *"]


@pytest.fixture(params=["clip_one_vector", "bert_one_vector"])
def golden_model(request):
    return Golden(request.param).model()


def test_each_different_caption_is_encoded_once(golden_model, monkeypatch) -> None:
    encode, seen = golden_model.cond_stage_model.encode, []
    monkeypatch.setattr(
        golden_model.cond_stage_model,
        "encode",
        lambda text, **rest: seen.append(text) or encode(text, **rest),
    )
    shared = golden_model.get_learned_conditioning(CAPTIONS)
    assert seen == [CAPTIONS[:2]]
    assert torch.equal(shared[0], shared[2]) and torch.equal(shared[0], shared[3])
    alone = torch.cat([golden_model.get_learned_conditioning([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_captions_encoded_apart(golden_model) -> None:
    (vectors,) = golden_model.embedding_manager.embedding_parameters()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(golden_model.get_learned_conditioning(CAPTIONS).shape, generator=generator)

    def gradient(encoded: torch.Tensor) -> torch.Tensor:
        vectors.grad = None
        (encoded * weights).sum().backward()
        return vectors.grad

    shared = gradient(golden_model.get_learned_conditioning(CAPTIONS))
    encoder, manager = golden_model.cond_stage_model, golden_model.embedding_manager
    apart = gradient(torch.cat([encoder.encode([text], embedding_manager=manager) for text in CAPTIONS]))
    assert shared.abs().max() > 0
    torch.testing.assert_close(shared, apart, rtol=1e-3, atol=1e-4 * float(apart.abs().max()))


def test_one_prompt_and_two_different_ones(golden_model) -> None:
    assert golden_model.get_learned_conditioning("a photo of *").shape[0] == 1
    assert golden_model.get_learned_conditioning(CAPTIONS[:2]).shape[0] == 2


@pytest.mark.parametrize("negative", ["", "a photo of *"])
def test_a_training_step_is_guided_by_the_scale_of_the_personalization(
    golden_model, monkeypatch, negative
) -> None:
    """The gradient is that of the guided output; a negative prompt without learned words has no backward pass."""
    golden_model.eval()
    monkeypatch.setattr(golden_model.embedding_manager, "training_guidance", 3.0)
    monkeypatch.setattr(golden_model.embedding_manager, "negative_prompt", lambda *texts: negative)
    (vectors,) = golden_model.embedding_manager.embedding_parameters()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, golden_model.channels, 8, 8, generator=generator)
    t, captions = torch.tensor([900, 100]), ["a *", "two of *"]
    encode = golden_model.get_learned_conditioning
    start, end = (golden_model.apply_model(x, t, encode(texts)) for texts in ([negative] * 2, captions))
    expected = start + 3 * (end - start)
    (wanted,) = torch.autograd.grad(expected.square().sum(), vectors)
    condition = golden_model.training_condition(captions)
    assert condition.uncond.requires_grad is bool(negative)
    guided = golden_model.apply_model(x, t, condition)
    torch.testing.assert_close(guided, expected, rtol=1e-3, atol=1e-4)
    (found,) = torch.autograd.grad(guided.square().sum(), vectors)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
