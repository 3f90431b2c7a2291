"""The loss of fixed samples: measuring, the stopping rule, the best step."""

from __future__ import annotations

import math

import pytest
import torch

from ldm import embeddings
from ldm.training.callbacks.fixed_loss import (
    DeterministicLoss,
    FixedNoiseLoss,
    Plateau,
    copy_of_state,
    temporary_state,
)
from ldm.util import UserError
from tests.golden_record import Golden
from tests.training.runs import only_run, start, state_of


class Images:
    """Six images, each three times with its own caption; reading an item draws random numbers."""

    num_images = 6

    def __len__(self) -> int:
        return 18

    def __getitem__(self, index: int) -> dict:
        torch.rand(1)
        generator = torch.Generator().manual_seed(index % 6)
        return {
            "image": torch.rand(32, 32, 3, generator=generator) * 2 - 1,
            "caption": f"photo * of {index}",
        }


@pytest.fixture
def model():
    return Golden("clip_one_vector").model()


def test_loss_at_fixed_timesteps_and_noise(model) -> None:
    fixed = FixedNoiseLoss(model, Images(), samples=8, chunk=3)
    timesteps = torch.cat(fixed.timesteps)
    assert sorted((timesteps * 8 // model.num_timesteps).tolist()) == list(range(8))
    latents, noise = torch.cat(fixed.latents), torch.cat(fixed.noise)
    captions = [caption for chunk in fixed.captions for caption in chunk]
    expected = 0.0
    for i in range(8):
        one = slice(i, i + 1)
        condition = model.get_learned_conditioning(captions[one])
        loss, _ = model.p_losses(latents[one], condition, timesteps[one], noise[one])
        expected += loss.item() / 8
    assert fixed.measure(model) == pytest.approx(expected, rel=1e-4)
    assert fixed.measure(model) == fixed.measure(model)


def test_the_fixed_loss_has_the_weights_of_the_training(model) -> None:
    class Masked(Images):
        def __getitem__(self, index: int) -> dict:
            weight = torch.zeros(32, 32)
            weight[:16] = 1
            return {**super().__getitem__(index), "loss_weight": weight}

    fixed = FixedNoiseLoss(model, Masked(), samples=3, chunk=2)
    expected = 0.0
    for latents, captions, t, noise in zip(
        fixed.latents, fixed.captions, fixed.timesteps, fixed.noise, strict=True
    ):
        condition = model.get_learned_conditioning(captions)
        output = model.apply_model(model.q_sample(latents, t, noise), t, condition)
        half = (output - noise)[:, :, : latents.shape[2] // 2]
        expected += (half**2).mean((1, 2, 3)).sum().item() / 3
    assert fixed.measure(model) == pytest.approx(expected, rel=1e-4)
    plain = FixedNoiseLoss(model, Images(), samples=3, chunk=2)
    assert fixed.measure(model) != plain.measure(model)
    assert fixed.measures(fixed.description()) and plain.measures(plain.description())
    assert not fixed.measures(plain.description()) and not plain.measures(fixed.description())
    paler = {**fixed.description(), "weights": 0.5 * fixed.description()["weights"]}
    assert not fixed.measures(paler)
    earlier = plain.description()
    del earlier["weights"]  # of runs before weights were noted
    assert plain.measures(earlier)


def test_measuring_is_reproducible_and_changes_no_generator(model) -> None:
    state = torch.get_rng_state()
    first = FixedNoiseLoss(model, Images(), samples=4, chunk=4)
    value = first.measure(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    second = FixedNoiseLoss(model, Images(), samples=4, chunk=4)
    assert second.measure(model) == value


def test_samples_are_spread_over_the_images(model) -> None:
    def shown(samples):
        chunks = FixedNoiseLoss(model, Images(), samples, 4).captions
        return [int(text.split()[-1]) for chunk in chunks for text in chunk]

    assert shown(3) == [0, 2, 4]
    assert shown(8) == list(range(8))


def test_images_of_several_sizes(model) -> None:
    class Sizes(Images):
        def __getitem__(self, index: int) -> dict:
            item = super().__getitem__(index)
            return item | {"image": item["image"][: 32 if index % 2 else 16]}

    fixed = FixedNoiseLoss(model, Sizes(), samples=4, chunk=1)
    assert {latent.shape[2:] for latent in fixed.latents} == {(4, 8), (8, 8)}
    assert fixed.measure(model) > 0


def test_loss_depends_on_the_vectors(model) -> None:
    fixed = FixedNoiseLoss(model, Images(), samples=4, chunk=4)
    before = fixed.measure(model)
    state = {key: value * 2 for key, value in copy_of_state(model.embedding_manager).items()}
    vector = next(model.embedding_manager.embedding_parameters())
    start = vector.detach().clone()
    with temporary_state(model.embedding_manager, state):
        assert torch.equal(vector, start * 2)
        assert fixed.measure(model) != before
    assert torch.equal(vector, start) and fixed.measure(model) == before


def falling(count: int) -> list[float]:
    return [math.exp(-i / 5) for i in range(count)]


def test_curve_that_becomes_flat() -> None:
    rule = Plateau(window=10, threshold=0.15)
    stops = [n for n in range(1, 60) if rule.reached(falling(n))]
    # By hand: var(exp(-i/5), the last 10 of 18) / var(all 18) is the first below 0.15.
    assert stops == list(range(stops[0], 60)) and 15 <= stops[0] <= 20


def test_more_values_than_the_window_are_needed() -> None:
    assert Plateau(window=5).ratio([1.0, 0.5, 0.5, 0.5, 0.5]) == math.inf
    assert Plateau(window=5).reached([9.0, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert Plateau(window=3).ratio([1.0, 2.0, 1.0, 2.0]) == pytest.approx((2 / 9) / 0.25)


def test_constant_curve_is_flat() -> None:
    assert Plateau(window=2).reached([1.0, 1.0, 1.0])


@pytest.mark.parametrize(("window", "threshold", "name"), [(1, 0.1, "window"), (5, 0, "threshold")])
def test_invalid_plateau(window, threshold, name) -> None:
    with pytest.raises(UserError, match=name):
        Plateau(window, threshold)


NODE = "lightning.callbacks.deterministic_loss"


OFTEN = [f"{NODE}.params.every_n_train_steps=1", "lightning.modelcheckpoint.params.every_n_train_steps=1"]


def measured(state: dict) -> dict:
    return next(value for key, value in state["callbacks"].items() if "DeterministicLoss" in key)


def test_training_is_unchanged_and_the_best_step_is_saved(tiny_yaml, capsys):
    vectors = "model.params.personalization_config.params.num_vectors_per_token=4"
    long = ["--max_steps", 30, "--seed", 1, vectors]
    assert start("--base", tiny_yaml, "-t", "-l", "with", *OFTEN, *long) == 0
    lines = capsys.readouterr().out.splitlines()
    assert start("--base", tiny_yaml, "-t", "-l", "without", f"{NODE}=null", *long) == 0
    first, second = state_of("with"), state_of("without")
    assert not any("DeterministicLoss" in key for key in second["callbacks"])
    for key, value in second["state_dict"].items():
        assert torch.equal(first["state_dict"][key], value)
    assert torch.equal(first["random_states"][0]["torch"], second["random_states"][0]["torch"])

    found = measured(first)
    assert found["steps"] == list(range(31)) and len(set(found["losses"])) > 20
    means = [sum(part) / len(part) for i in range(31) if (part := found["losses"][max(0, i - 2) : i + 1])]
    assert found["best_loss"] == min(means) and found["best_step"] == means.index(min(means))
    folder = only_run("with") / "checkpoints"
    best = embeddings.read(folder / "embeddings_best.pt").concepts[0].vectors
    assert found["best_step"] > 0, "the initial vectors are worse"
    (kept,) = (value for key, value in found["best"].items() if "string_to_param_dict" in key)
    assert torch.equal(best, kept)
    of_step = embeddings.read(folder / f"embeddings_gs-{found['best_step']}.pt")
    assert torch.equal(best, of_step.concepts[0].vectors)
    (file,) = folder.glob("*_best.safetensors")
    assert embeddings.read(file).metadata.steps == found["best_step"]
    assert f"; step {found['best_step']} is best" in lines[-1] and "it reached its limit" in lines[-1]
    assert any("fixed loss" in line for line in lines if line.startswith("step "))
    (csv,) = only_run("with").glob("csv/*/metrics.csv")
    assert "val/loss_deterministic" in csv.read_text().splitlines()[0]


def test_flat_curve_ends_the_run_also_after_resuming(tiny_yaml, capsys):
    stop = [f"{NODE}.params.stop.window=2", f"{NODE}.params.stop.threshold=0.999"]
    slow = ["model.base_learning_rate=1e-3", "--max_steps", 500]
    assert start("--base", tiny_yaml, "-t", "-l", "runs", *OFTEN, *slow, *stop) == 0
    state = state_of("runs")
    ended = state["global_step"]
    assert 2 <= ended < 100
    assert f"ended at step {ended} because the deterministic loss is flat" in capsys.readouterr().out
    assert start("-r", only_run("runs"), "-t") == 0
    assert state_of("runs")["global_step"] == ended
    assert start("-r", only_run("runs"), "-t", f"{NODE}.params.stop=null", "--max_steps", ended + 2) == 0
    assert state_of("runs")["global_step"] == ended + 2
    assert measured(state_of("runs"))["losses"][: len(measured(state)["losses"])] == measured(state)["losses"]


def test_resumed_run_measures_the_same(tiny_yaml):
    assert start("--base", tiny_yaml, "-t", "-l", "uninterrupted", *OFTEN) == 0
    assert start("--base", tiny_yaml, "-t", "-l", "stopped", *OFTEN, "--max_steps", 3) == 0
    assert start("-r", only_run("stopped"), "-t", "--max_steps", 6) == 0
    uninterrupted, resumed = measured(state_of("uninterrupted")), measured(state_of("stopped"))
    assert uninterrupted["losses"] == resumed["losses"] and uninterrupted["steps"] == resumed["steps"]
    assert uninterrupted["best_step"] == resumed["best_step"]
    assert all(torch.equal(resumed["best"][key], value) for key, value in uninterrupted["best"].items())


def test_resumed_run_keeps_a_best_step_from_before(tiny_yaml, monkeypatch):
    losses = iter([5.0, 1.0, 2.0, 3.0, 3.0])
    monkeypatch.setattr(FixedNoiseLoss, "measure", lambda self, model: next(losses))
    assert start("--base", tiny_yaml, "-t", *OFTEN, f"{NODE}.params.smooth=1", "--max_steps", 2) == 0
    best = measured(state_of())["best"]
    assert start("-r", only_run(), "-t", "--max_steps", 4) == 0
    resumed = measured(state_of())
    assert resumed["losses"] == [5.0, 1.0, 2.0, 3.0, 3.0]
    assert (resumed["best_step"], resumed["best_loss"]) == (1, 1.0)
    assert all(torch.equal(resumed["best"][key], value) for key, value in best.items())


def test_verdict_without_a_best_step(tiny_yaml, capsys, monkeypatch):
    assert start("--base", tiny_yaml, "-t", "-l", "short", "--max_steps", 1) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ended at step 1 because it reached its limit"
    folder = only_run("short") / "checkpoints"
    assert not (folder / "embeddings_best.pt").exists()
    rising = iter([1.0, 1.1, 1.2])
    monkeypatch.setattr(FixedNoiseLoss, "measure", lambda self, model: next(rising))
    assert start("--base", tiny_yaml, "-t", "-l", "worse", *OFTEN, "--max_steps", 2) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("; no step was better than the initial vectors")


def test_best_vectors_are_saved_although_saves_are_rarer(tiny_yaml, monkeypatch):
    losses = iter([5.0, 4.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(FixedNoiseLoss, "measure", lambda self, model: next(losses))
    words = [f"{NODE}.params.every_n_train_steps=1", f"{NODE}.params.smooth=1"]
    words += [
        "lightning.modelcheckpoint.params.every_n_train_steps=100",
        "lightning.trainer.limit_val_batches=0",
    ]
    words.append("lightning.callbacks.embedding_saver.params.every_n_train_steps=1")
    assert start("--base", tiny_yaml, "-t", *words) == 0
    folder = only_run() / "checkpoints"
    best, second, last = (
        embeddings.read(folder / f"embeddings_{name}.pt").concepts[0].vectors
        for name in ("best", "gs-2", "gs-6")
    )
    assert torch.equal(best, second) and not torch.equal(best, last)
    assert torch.equal(embeddings.read(folder / "embeddings.pt").concepts[0].vectors, last)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"every_n_train_steps": 0}, "every_n_train_steps is 0"),
        ({"samples": 0}, "samples is 0"),
        ({"stop": {"windows": 3}}, "windows"),
    ],
)
def test_invalid_settings(options, name):
    with pytest.raises(UserError, match=name):
        DeterministicLoss(**options)


def test_without_a_stop_it_is_measured_half_as_often():
    assert DeterministicLoss().every_n_train_steps == 20
    assert DeterministicLoss(stop={"window": 5}).every_n_train_steps == 10
    assert DeterministicLoss(7, stop={"window": 5}).every_n_train_steps == 7
