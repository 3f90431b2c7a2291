"""Runs that learn nothing or have a loss that is not finite, and the statistics of the vectors."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import embeddings
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.callbacks.guard import TrainingGuard, VectorStats
from ldm.util import UserError, instantiate_from_config, skip_pretrained
from tests.golden_record import Golden, fill, sdxl_node
from tests.modules.methods.conftest import words
from tests.training.runs import only_run, start, state_of

OFTEN = [
    "lightning.callbacks.training_guard.params.every_n_train_steps=2",
    "lightning.callbacks.deterministic_loss=null",
    "lightning.modelcheckpoint.params.every_n_train_steps=1",
    "lightning.trainer.limit_val_batches=0",
]


ZERO = "model.params.scheduler_config"


@pytest.fixture
def loss_times(monkeypatch):
    """Multiplies the training loss by a function of the step."""
    p_losses = LatentDiffusion.p_losses

    def install(factor):
        def scaled(self, *args, **kwargs):
            loss, parts = p_losses(self, *args, **kwargs)
            return loss * factor(self.trainer.global_step), parts

        monkeypatch.setattr(LatentDiffusion, "p_losses", scaled)

    return install


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [
                f"{ZERO}.target=ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
                *(f"{ZERO}.params.{name}=0" for name in ("warm_up_steps", "lr_min", "lr_max", "lr_start")),
                f"{ZERO}.params.max_decay_steps=9",
            ],
            "the learning rate is 0",
        ),
        (["model.base_learning_rate=1e-30"], "the vectors do not change at a learning rate of 2.0e-30"),
    ],
)
def test_run_that_learns_nothing_ends_at_the_first_check(tiny_yaml, capsys, words, message):
    assert start("--base", tiny_yaml, "-t", *OFTEN, *words) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert line.startswith("error: nothing is learned until step 2: ") and message in line
    assert state_of()["global_step"] == 2


def test_no_gradient(tiny_yaml, capsys, loss_times):
    loss_times(lambda step: 0)
    assert start("--base", tiny_yaml, "-t", *OFTEN) == 1
    assert "no gradient reaches the vectors" in capsys.readouterr().err


def test_later_loss_of_the_gradient_is_one_warning(tiny_yaml, capsys, loss_times):
    loss_times(lambda step: 0 if step >= 2 else 1)
    assert start("--base", tiny_yaml, "-t", *OFTEN) == 0
    assert capsys.readouterr().err.count("step 4: nothing more is learned: no gradient") == 1


def test_warning_is_not_repeated_after_resuming(tiny_yaml, capsys, loss_times):
    loss_times(lambda step: 0 if step >= 2 else 1)
    assert start("--base", tiny_yaml, "-t", *OFTEN, "--max_steps", 4) == 0
    assert start("-r", only_run(), "-t", "--max_steps", 6) == 0
    assert capsys.readouterr().err.count("nothing more is learned: no gradient") == 1


def test_nan_loss_is_rolled_back(tiny_yaml, capsys, loss_times):
    loss_times(lambda step: float("nan") if step == 3 else 1)
    assert start("--base", tiny_yaml, "-t", "-l", "uninterrupted", *OFTEN) == 0
    shown = capsys.readouterr().err
    assert (
        "not finite at step 4: training continues from the vectors of step 2 with half the learning rate"
        in shown
    )
    uninterrupted = state_of("uninterrupted")
    (vectors,) = (v for k, v in uninterrupted["state_dict"].items() if "string_to_param_dict" in k)
    assert vectors.isfinite().all()
    (optimizer,) = uninterrupted["optimizer_states"]
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(5e-3)
    assert optimizer["state"][0]["step"] == 4, "two of the six steps are undone"
    folder = only_run("uninterrupted") / "checkpoints"
    second, fourth = (embeddings.read(folder / f"embeddings_gs-{n}.pt").concepts[0].vectors for n in (2, 4))
    assert torch.equal(second, fourth)
    last = embeddings.read(folder / "embeddings.pt").concepts[0].vectors
    assert not torch.equal(last, fourth)

    for stop in (3, 5):
        name = f"stopped-{stop}"
        assert start("--base", tiny_yaml, "-t", "-l", name, *OFTEN, "--max_steps", stop) == 0
        assert start("-r", only_run(name), "-t", "--max_steps", 6) == 0
        resumed = state_of(name)
        assert all(torch.equal(resumed["state_dict"][k], v) for k, v in uninterrupted["state_dict"].items())
        assert resumed["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(5e-3)


def test_rate_of_a_schedule_is_halved(tiny_yaml, loss_times):
    loss_times(lambda step: float("nan") if step == 1 else 1)
    node = [
        f"{ZERO}.target=ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
        *(f"{ZERO}.params.{name}=1" for name in ("lr_min", "lr_max", "lr_start")),
        f"{ZERO}.params.warm_up_steps=0",
        f"{ZERO}.params.max_decay_steps=9",
    ]
    assert start("--base", tiny_yaml, "-t", *OFTEN, *node) == 0
    assert state_of()["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(5e-3)


@pytest.mark.done_or_said
def test_too_many_rollbacks_are_an_error(tiny_yaml, capsys, loss_times):
    loss_times(lambda step: float("nan") if step >= 2 else 1)
    words = ["lightning.callbacks.training_guard.params.rollbacks=1"]
    assert start("--base", tiny_yaml, "-t", *OFTEN, *words) == 1
    assert "error: the loss is not finite at step 6 (rollbacks: 1)" in capsys.readouterr().err
    last = embeddings.read(only_run() / "checkpoints" / "embeddings.pt").concepts[0].vectors
    second = embeddings.read(only_run() / "checkpoints" / "embeddings_gs-2.pt").concepts[0].vectors
    assert torch.equal(last, second)
    assert not (only_run() / "checkpoints" / "embeddings_gs-3.pt").exists(), (
        "no file of vectors that are not finite"
    )


@pytest.mark.done_or_said
@pytest.mark.parametrize("steps", [1, 6])  # before the first check, and beyond it
def test_a_model_whose_loss_is_never_finite_is_named(tiny_yaml, tiny_model, capsys, steps):
    broken = load_file(tiny_model)
    next(value for name, value in broken.items() if name.endswith("diffusion_model.out.2.weight"))[:] = float(
        "nan"
    )
    save_file(broken, "broken.safetensors")
    words = ["--actual_resume", "broken.safetensors", "--max_steps", steps]
    assert start("--base", tiny_yaml, "-t", *OFTEN, *words) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert line.startswith(
        "error: no loss is finite: 'broken.safetensors' gives NaN or infinity from the first"
    )


def test_invalid_guard():
    with pytest.raises(UserError, match="every_n_train_steps is 0"):
        TrainingGuard(every_n_train_steps=0)


MEASURE_OFTEN = ["lightning.callbacks.vector_stats.params.every_n_train_steps=2"]


def rows_of(folder: str) -> list[list[float]]:
    (run,) = Path(folder).iterdir()
    callbacks = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    return next(value for key, value in callbacks.items() if "Health" in key)["rows"]


def test_norm_ratio_and_cosine(tiny_yaml, tiny_model, capsys):
    words = [*MEASURE_OFTEN, "lightning.modelcheckpoint.params.every_n_train_steps=2"]
    start_file = "start.pt"
    table = load_file(tiny_model)["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
    first = table[7][None]
    concept = embeddings.Concept("*", first, encoder=embeddings.encoder_kind("clip", 32))
    embeddings.write(embeddings.LearnedEmbeddings((concept,)), Path(start_file), "original")
    assert start("--base", tiny_yaml, "-t", "-l", "a", *words, "--embedding_manager_ckpt", start_file) == 0
    (run,) = Path("a").iterdir()
    found = rows_of("a")
    assert [row[0] for row in found] == [2, 4, 6]
    for step, ratio, cosine, rate in found:
        file = run / "checkpoints" / f"embeddings_gs-{int(step)}.pt"
        vectors = embeddings.read(file).concepts[0].vectors
        assert ratio == pytest.approx(float(vectors.norm() / table.norm(dim=1).mean()), rel=1e-5)
        assert cosine == pytest.approx(float(torch.cosine_similarity(vectors, first)), rel=1e-5)
        assert rate == pytest.approx(1e-2)
    assert found[-1][2] < 0.9999, "the direction has changed"
    last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 6/6")]
    assert f"norm x{found[-1][1]:.2f}, cos {found[-1][2]:.2f}" in last[0]
    (csv,) = run.glob("csv/*/metrics.csv")
    assert "vectors/norm_ratio" in csv.read_text().splitlines()[0]


def test_initial_vectors_are_those_of_the_run(tiny_yaml):
    assert start("--base", tiny_yaml, "-t", "-l", "uninterrupted", *MEASURE_OFTEN) == 0
    assert start("--base", tiny_yaml, "-t", "-l", "stopped", *MEASURE_OFTEN, "--max_steps", 3) == 0
    (run,) = Path("stopped").iterdir()
    assert start("-r", run, "-t", "--max_steps", 6) == 0
    assert rows_of("stopped") == rows_of("uninterrupted")


def test_invalid_stats():
    with pytest.raises(UserError, match="every_n_train_steps is 0"):
        VectorStats(every_n_train_steps=0)


def test_personalization_without_vectors_has_its_learning_rate_only(tiny_yaml):
    swap = "model.params.personalization_config.target=tests.training.own_personalization.Offset"
    params = "model.params.personalization_config.params={word: '*'}"
    assert start("--base", tiny_yaml, "-t", *MEASURE_OFTEN, "--max_steps", 2, swap, params) == 0
    rows = rows_of("logs")
    assert [row[0] for row in rows] == [2] and all(row[3] > 0 and math.isnan(row[1]) for row in rows)
    assert not list((only_run() / "checkpoints").glob("embedding.*"))
    assert (only_run() / "checkpoints" / "embeddings.pt").is_file()


def test_norms_of_an_encoder_of_two_towers_are_compared_tower_by_tower() -> None:
    with skip_pretrained():
        model = fill(instantiate_from_config(sdxl_node()))
    with torch.no_grad():
        for tower, factor in zip(model.cond_stage_model.towers, (1, 50), strict=True):
            tower.token_embedding.weight.mul_(factor)  # words of the second are 50 times as long
    manager = model.embedding_manager
    manager.reset(model.cond_stage_model)
    logged: dict[str, float] = {}
    log = SimpleNamespace(log_metrics=lambda metrics, step: logged.update(metrics))
    optimizers = [SimpleNamespace(param_groups=[{"lr": 0.1}])]
    trainer = SimpleNamespace(global_step=1, optimizers=optimizers, loggers=[log])
    stats = VectorStats(every_n_train_steps=1)
    stats.on_train_start(trainer, model)
    with torch.no_grad():
        manager.vectors("*")[:, :32] *= -2
    stats.on_train_batch_end(trainer, model, None, None, 0)
    first, second = logged["vectors/norm_ratio_1"], logged["vectors/norm_ratio_2"]
    assert first == pytest.approx(2, rel=0.5) and second == pytest.approx(1, rel=0.5)
    assert logged["vectors/norm_ratio"] == pytest.approx((first + second) / 2)
    assert logged["vectors/cosine_to_initial"] == pytest.approx(0, abs=1e-5)  # -1 and 1


@pytest.mark.parametrize("method", ["prospect", "neti"])
def test_statistics_of_words_that_share_no_vectors(method) -> None:
    """Means over stages where there are vectors; the learning rate in any case."""
    model = Golden("clip_one_vector").model(load_embeddings=False)
    made = words(model, method)
    logged: dict[str, float] = {}
    log = SimpleNamespace(log_metrics=lambda metrics, step: logged.update(metrics))
    trainer = SimpleNamespace(
        global_step=1, optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])], loggers=[log]
    )
    stats = VectorStats(every_n_train_steps=1)
    stats.on_train_start(trainer, model)
    first = stats._vocabulary_norms[0]
    with torch.no_grad():
        for parameter in made.input_vectors():
            parameter.mul_(-2)
    stats.on_train_batch_end(trainer, model, None, None, 0)
    (row,) = stats.rows
    assert row.learning_rate == 0.1 and not made.export()
    if method == "neti":
        assert math.isnan(row.norm_ratio) and not logged and not stats.figures()
        return
    (vectors,) = made.input_vectors()
    assert row.norm_ratio == pytest.approx(float(vectors.detach().norm(dim=-1).mean()) / first)
    assert row.cosine == pytest.approx(-1) and logged["vectors/cosine_to_initial"] == row.cosine
