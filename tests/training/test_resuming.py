"""Resuming with other settings: what the steps then use, what is said, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from ldm import embeddings
from ldm.training import resuming
from ldm.training.callbacks.latent_cache import CachedLatents
from ldm.training.run_folder import RunFolder
from ldm.util import UsageError
from tests.training.runs import only_run, start, state_of

pytestmark = pytest.mark.done_or_said

COSINE = (
    "model.params.scheduler_config.target=ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
    "model.params.scheduler_config.params={warm_up_steps: 0, lr_start: 1, lr_max: 1, lr_min: 0, max_decay_steps: null}",
)
# Callbacks that these runs do without.
QUICK = ("summary_images", "vector_stats", "deterministic_loss", "learning_rate_logger")
SLOW = pytest.mark.slow
BASE = "model.base_learning_rate"


class Probe(Callback):
    """Records what each optimizer step uses: its learning rate and weight decay, and the samples of the batches."""

    def __init__(self, kept: list[Probe]) -> None:
        self.rates: list[float] = []
        self.decays: list[float] = []
        self.samples: list[int] = []
        kept.append(self)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.decays.append(optimizer.param_groups[0].get("weight_decay"))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.samples.append(len(batch["caption"]))


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[Probe]:
    """The probes of the runs of a test, in order."""
    from ldm.training import run

    kept: list[Probe] = []
    make = run.make_callbacks
    monkeypatch.setattr(run, "make_callbacks", lambda *a, **k: [*make(*a, **k), Probe(kept)])
    return kept


@pytest.fixture(scope="module")
def begun() -> dict[str, Path]:
    return {}


@pytest.fixture
def copy_of(tiny_yaml: Path, begun: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """Copies a run that ended at step 4 of 4, of 3 batches an epoch; it is begun once for each command line."""

    def copy_of(*words: str) -> Path:
        key = " ".join(words)
        if key not in begun:
            home = tmp_path_factory.mktemp("begun")
            quick = OmegaConf.load(tiny_yaml)
            for name in QUICK:
                quick.lightning.callbacks[name] = None
            del quick.data.params.validation
            OmegaConf.save(quick, "quick.yaml")
            assert start("--base", "quick.yaml", "-t", "--max_steps", 4, "-l", home, *words) == 0
            begun[key] = only_run(home)
        return Path(shutil.copytree(begun[key], "run"))

    return copy_of


def resumed(run: Path, *words: object, capsys: Any = None) -> str:
    capsys.readouterr()
    assert start("-r", run, "-t", *words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("begun_with", "words", "rates", "said"),
    [
        ((), [f"{BASE}=5e-4"], [1e-3] * 2, "learning rate 1.00e-03 (was 1.00e-02)"),
        pytest.param(
            (),
            ["--learning_rate", "5e-4"],
            [5e-4] * 2,
            "learning rate 5.00e-04 (was 1.00e-02)",
            marks=SLOW,
        ),
        ((), ["--scale_lr", "false"], [5e-3] * 2, "learning rate 5.00e-03 (was 1.00e-02)"),
        pytest.param((), ["--train_batch_size", 1], [5e-3] * 2, "batch 1 (was 2)", marks=SLOW),
        ((), ["--accumulate_grad_batches", 2], [2e-2] * 2, "accumulation 2 (was 1)"),
        ((), [f"{BASE}=1e-3:5, 5e-4"], [2e-3, 1e-3], "learning rate 2.00e-03 (was 1.00e-02)"),
        ((), COSINE, [2.5e-3, 6.7e-4], "scheduler_config 'LambdaWarmUpCosineScheduler' (was none)"),
        (COSINE, [], [2.5e-3, 6.7e-4], "max_steps 6 (was 4)"),
        (COSINE, ["model.params.scheduler_config=null"], [1e-2] * 2, "scheduler_config none (was"),
        pytest.param(
            COSINE,
            [f"{BASE}=1e-3"],
            [5e-4, 1.34e-4],
            "learning rate 2.00e-03 (was 1.00e-02)",
            marks=SLOW,
        ),
    ],
)
def test_the_steps_use_the_changed_rate(copy_of, probes, capsys, begun_with, words, rates, said) -> None:
    run = copy_of(*begun_with)
    out = resumed(run, "--max_steps", 6, *words, capsys=capsys)
    assert probes[-1].rates == pytest.approx(rates, rel=1e-2)
    assert said in out
    assert f"last.ckpt at step 4 of 6 with learning rate {probes[-1].rates[0]:.2e}" in out
    (file,) = (run / "checkpoints").glob("*_gs-6.safetensors")
    configured = probes[-1].rates[0] if "scheduler" not in " ".join(map(str, [*words, *begun_with])) else None
    if configured is not None:
        assert embeddings.read(file).metadata.learning_rate == pytest.approx(configured)


def test_the_vectors_move_by_the_changed_rate(copy_of, capsys) -> None:
    """SphereSGD turns a vector by its rate in radians, whatever the gradient is."""
    run = copy_of(
        "model.params.optimizer_config.target=ldm.models.optimizers.SphereSGD", "--scale_lr", "false"
    )
    before = state_of(run)["state_dict"]["embedding_manager.string_to_param_dict.*"]
    resumed(run, "--max_steps", 5, f"{BASE}=0.1", capsys=capsys)
    after = state_of(run)["state_dict"]["embedding_manager.string_to_param_dict.*"]
    assert float(torch.cosine_similarity(before, after).arccos()) == pytest.approx(0.1, rel=0.02)


@pytest.mark.slow
def test_a_run_that_changed_twice_goes_on_with_the_last(copy_of, probes, capsys) -> None:
    run = copy_of()
    resumed(run, "--max_steps", 5, f"{BASE}=5e-4", capsys=capsys)
    out = resumed(run, "--max_steps", 6, capsys=capsys)
    assert probes[-1].rates == [1e-3]
    assert "changed since then: max_steps 6 (was 5)\n" in out


def test_settings_of_the_optimizer(copy_of, probes, capsys) -> None:
    run, node = copy_of(), "model.params.optimizer_config"
    resumed(
        run,
        "--max_steps",
        5,
        f"{node}={{target: torch.optim.AdamW, params: {{weight_decay: 0.5}}}}",
        capsys=capsys,
    )
    assert probes[-1].decays == [0.5] and state_of(run)["optimizer_states"][0]["state"][0]["step"] == 5
    out = resumed(
        run, "--max_steps", 7, f"{node}={{target: torch.optim.SGD}}", f"{node}.params=null", capsys=capsys
    )
    assert "the optimizer, SGD, begins without its moments" in out
    assert probes[-1].rates == [1e-2] * 2 and "exp_avg" not in str(state_of(run)["optimizer_states"])


@pytest.mark.parametrize(
    ("words", "samples"),
    [
        # Of an epoch of 6 samples in batches of 2, step 4 is the first batch of the second epoch.
        pytest.param(["--train_batch_size", "1"], [1, 1, 1, 1, 1], marks=SLOW),
        pytest.param(["--train_batch_size", "3"], [3, 3, 3, 3, 3], marks=SLOW),
        (["--train_batch_size", "4"], [4, 2, 4, 2, 4]),
        (["--train_batch_size", "64"], [6, 6, 6, 6, 6]),
        # A step of two batches begins with the first of them.
        (["--accumulate_grad_batches", "2"], [2] * 8),
        pytest.param(["data.params.train.params.repeats=3"], [2, 2, 2, 1, 2], marks=SLOW),
    ],
)
def test_the_position_in_the_data_follows_the_batch_size(copy_of, probes, capsys, words, samples) -> None:
    run = copy_of()
    out = resumed(run, "--max_steps", 9, *words, capsys=capsys)
    assert probes[-1].samples == samples
    state = state_of(run)
    progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert state["global_step"] == 9
    assert state["DataModuleFromConfig"]["batches_done"] == progress["total"]["processed"]
    if "64" in words:
        assert "9 steps of batch 6 (64 asked for, but an epoch has no more samples)" in out
        assert "learning rate 3.00e-02 = 5.00e-03 x 6 (batch)" in out


def test_samples_are_not_skipped_by_a_smaller_batch(copy_of, monkeypatch, capsys) -> None:
    run, rows = copy_of(), []
    get = CachedLatents.__getitem__
    monkeypatch.setattr(CachedLatents, "__getitem__", lambda self, i: rows.append(i) or get(self, i))
    resumed(run, "--max_steps", 8, "--train_batch_size", 1, capsys=capsys)
    # Step 4 ended after 2 of the 6 samples of epoch 1; its other four have the numbers 6 to 11.
    assert len(rows) == 4 and len(set(rows)) == 4 and all(6 <= row < 12 for row in rows)


def test_nothing_changed_and_nothing_left(copy_of, capsys) -> None:
    run = copy_of()
    before = state_of(run)
    assert start("-r", run, "-t") == 0
    shown = capsys.readouterr()
    assert "all settings are those of the saved state" in shown.out
    assert (
        "nothing is left to train: the run is at step 4 and max_steps is 4; go on with --max_steps 8"
        in shown.err
    )
    assert (
        state_of(run)["optimizer_states"][0]["param_groups"] == before["optimizer_states"][0]["param_groups"]
    )


def test_a_halved_rate_stays_until_another_is_asked_for(copy_of, probes, capsys) -> None:
    run = copy_of()
    path = run / "checkpoints" / "last.ckpt"
    state = state_of(run)
    state["optimizer_states"][0]["param_groups"][0]["lr"] /= 4
    next(value for key, value in state["callbacks"].items() if "Tripwires" in key)["rolled_back"] = 2
    torch.save(state, path)
    out = resumed(run, "--max_steps", 5, capsys=capsys)
    assert probes[-1].rates == [2.5e-3] and "learning rate halved 2 times" in out
    (file,) = (run / "checkpoints").glob("*_gs-5.safetensors")
    assert embeddings.read(file).metadata.learning_rate == pytest.approx(2.5e-3)
    resumed(run, "--max_steps", 6, f"{BASE}=4e-3", capsys=capsys)
    assert probes[-1].rates == [8e-3]


@pytest.mark.parametrize("rollbacks", [pytest.param(0, marks=SLOW), 1])
def test_states_of_earlier_versions(copy_of, probes, capsys, rollbacks: int) -> None:
    """They hold no settings: rates are compared with those in the state itself."""
    run = copy_of(*COSINE)
    path, state = run / "checkpoints" / "last.ckpt", state_of(run)
    del state["settings"]
    group = state["optimizer_states"][0]["param_groups"][0]
    group["initial_lr"] = group["initial_lr"] / 2**rollbacks
    next(value for key, value in state["callbacks"].items() if "Tripwires" in key)["rolled_back"] = rollbacks
    torch.save(state, path)
    plain = shutil.copytree(run, "plain")
    same = ("all settings are those", "learning rate halved once")[rollbacks]
    assert same in (out := resumed(run, capsys=capsys)) and "(was" not in out
    out = resumed(plain, "--max_steps", 6, f"{BASE}=1e-3", "--train_batch_size", 1, capsys=capsys)
    assert probes[-1].rates == pytest.approx([2.5e-4, 6.7e-5], rel=1e-2)
    assert "learning rate 1.00e-03 (was 1.00e-02), batch 1 (was 2), max_steps 6 (was 4)" in out


@pytest.mark.slow
def test_measurements_of_the_fixed_loss_stay_comparable(copy_of, capsys) -> None:
    def measured(run: Path) -> dict[str, Any]:
        return next(value for key, value in state_of(run)["callbacks"].items() if "DeterministicLoss" in key)

    often = "lightning.callbacks.deterministic_loss={params: {every_n_train_steps: 1}}"
    run = copy_of(often)
    resumed(run, "--max_steps", 5, "--train_batch_size", 6, capsys=capsys)
    assert (measured(run)["samples"], measured(run)["chunk"], measured(run)["steps"]) == (
        4,
        2,
        [0, 1, 2, 3, 4, 5],
    )
    samples = "lightning.callbacks.deterministic_loss.params.samples=3"
    assert "its curve begins anew with 3 samples" in resumed(run, "--max_steps", 6, samples, capsys=capsys)
    assert (measured(run)["samples"], measured(run)["steps"]) == (3, [5, 6])


@pytest.mark.parametrize(
    "word",
    [
        "data_root=others",
        pytest.param("model.params.loss_weighting=min_snr", marks=pytest.mark.slow),
        pytest.param("data.params.train.params.use_captions=true", marks=pytest.mark.slow),
    ],
)
def test_the_fixed_loss_of_other_samples_begins_anew(copy_of, image_folder, capsys, word) -> None:
    for name in ("own", "others"):
        shutil.copytree(image_folder, name)
        for image in Path(name).glob("*.png"):
            image.with_suffix(".txt").write_text("* in the snow")
            if name == "others":
                Image.new("RGB", (32, 32), "red").save(image)
    run = copy_of("lightning.callbacks.deterministic_loss={}")
    same = "data_root=own"
    assert "begins anew" not in resumed(run, "--max_steps", 5, same, capsys=capsys)
    words = [word] if word.startswith("data_root") else [same, word]
    message = "its curve begins anew with other images, masks, captions or settings of the loss"
    assert message in resumed(run, "--max_steps", 6, *words, capsys=capsys)
    assert "begins anew" not in resumed(run, "--max_steps", 7, *words, capsys=capsys)


@pytest.mark.one_reader
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {},
            "is empty, as the original left it; begin a new run from its vectors: --base YAML --embedding_manager_ckpt",
        ),
        (
            {"state_dict": {}, "pytorch-lightning_version": "1.5.9"},
            "is a state of Lightning 1.x, which cannot be resumed",
        ),
        ({"callbacks": {ModelCheckpoint: 1}}, "is a state of Lightning 1.x, which cannot"),
        ([1, 2], "is not the state of a run; begin a new run from its vectors"),
    ],
)
def test_states_of_the_original_and_its_forks(copy_of, capsys, monkeypatch, content, message) -> None:
    run = copy_of()
    torch.save(content, run / "checkpoints" / "last.ckpt")
    monkeypatch.setattr("ldm.training.run.make_data", lambda config: pytest.fail("something is loaded"))
    capsys.readouterr()
    assert start("-r", run, "-t") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and len(line) < 300


@pytest.mark.one_reader
def test_the_command_of_older_forks(copy_of, tiny_yaml, tiny_model, capsys) -> None:
    run = copy_of()
    checkpoints = run / "checkpoints"
    words = [
        "--base",
        tiny_yaml,
        "-t",
        "--actual_resume",
        tiny_model,
        "-n",
        "NAME",
        "--project",
        run,
        "--gpus",
        "0,",
    ]
    words += ["--embedding_manager_ckpt", checkpoints / "embeddings_gs-4.pt", "--max_steps", 5]
    capsys.readouterr()
    assert start(*words, "--resume_from_checkpoint", checkpoints / "last.ckpt") == 0
    out = capsys.readouterr().out
    assert "--name 'NAME' is ignored: a resumed run keeps its folder" in out and "at step 4 of 5" in out
    assert start("-r", run, "-t", "--project", "new", "--max_steps", 6) == 0
    assert "--project 'new' is ignored" in capsys.readouterr().out
    shutil.copytree(run, "another")
    assert start("-r", run, "-t", "--project", "another") == 2
    assert "--project 'another' and -r 'run' are two runs" in capsys.readouterr().err
    assert (
        start("--base", tiny_yaml, "-t", f"lightning.trainer.resume_from_checkpoint={run}", "--max_steps", 7)
        == 0
    )
    # The images are those of the run, as its saved YAML says.
    yaml = OmegaConf.load(tiny_yaml)
    del yaml.data
    OmegaConf.save(yaml, "without.yaml")
    resumed = f"lightning.trainer.resume_from_checkpoint={run}"
    assert start("--base", "without.yaml", "-t", resumed, "--max_steps", 8) == 0
    assert state_of(run)["global_step"] == 8 and not Path("logs").exists()


@pytest.mark.slow
def test_another_seed_is_other_noise(copy_of, capsys) -> None:
    found = []
    for seed in (23, 5):
        run = copy_of()
        out = resumed(run, "--max_steps", 5, "--seed", seed, capsys=capsys)
        assert ("seed 5 (was 23)" in out) is (seed == 5)
        found.append(state_of(run)["state_dict"]["embedding_manager.string_to_param_dict.*"])
        shutil.rmtree(run)
    assert not torch.equal(*found)


PERSONALIZATION = "model.params.personalization_config.params"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--placeholder_string", "<cat>"], "keeps its placeholder, '*'; '<cat>' is asked for"),
        (["--num_vectors", "3"], "keeps its number of vectors, 1; 3 is asked for"),
        (["--init_word", "cat"], "keeps its initializer, 'sculpture'; 'cat' is asked for"),
        ([f"{PERSONALIZATION}.per_image_tokens=true"], "keeps its per_image_tokens, none; True is asked for"),
        ([f"{PERSONALIZATION}.progressive_words=true"], "keeps its progressive_words"),
        (
            [f"{PERSONALIZATION}.placeholder_strings=[a,b]"],
            "keeps its placeholder, '*'; ['a', 'b'] is asked for",
        ),
        (
            ["model.params.personalization_config.target=tests.training.own_personalization.Offset"],
            "keeps its personalization",
        ),
        (["model.params.unfreeze_model=true"], "keeps its unfreeze_model"),
        (["--actual_resume", "other.safetensors"], "keeps its base model"),
        (["--actual_resume", "missing.ckpt"], "keeps its base model"),
        (["--embedding_manager_ckpt", "vectors.pt"], "'vectors.pt' and -r exclude each other"),
    ],
)
def test_what_cannot_change(copy_of, capsys, monkeypatch, words, message) -> None:
    run = copy_of()
    Path("other.safetensors").write_bytes(b"other weights")
    shutil.copy(run / "checkpoints" / "embeddings.pt", "vectors.pt")
    monkeypatch.setattr("ldm.training.run.make_data", lambda config: pytest.fail("something is loaded"))
    capsys.readouterr()
    assert start("-r", run, "-t", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and len(line) < 300


def test_every_parameter_of_another_personalization_is_fixed(copy_of, capsys) -> None:
    node = "model.params.personalization_config"
    run = copy_of(f"{node}={{target: tests.training.own_personalization.Offset, params: {{word: '*'}}}}")
    assert start("-r", run, "-t", f"{PERSONALIZATION}.word=@") == 2
    assert "keeps its word, '*'; '@' is asked for" in capsys.readouterr().err


@pytest.mark.slow
def test_norm_control_may_change(copy_of, capsys) -> None:
    run = copy_of()
    out = resumed(run, "--max_steps", 5, f"{PERSONALIZATION}.norm_control=fixed", capsys=capsys)
    assert "norm_control 'fixed' (was none)" in out


def test_a_base_model_that_was_moved(copy_of, tiny_model, capsys) -> None:
    run = copy_of()
    shutil.copy(tiny_model, "moved.safetensors")
    resumed(run, "--max_steps", 5, "--actual_resume", "moved.safetensors", capsys=capsys)
    assert state_of(run)["global_step"] == 5


@pytest.mark.slow
def test_previews_and_other_settings_are_those_asked_for(copy_of, capsys) -> None:
    run, images = copy_of(), "lightning.callbacks.image_logger.params"
    words = [f"{images}.batch_frequency=5", f"{images}.increase_log_steps=false", f"{images}.max_images=1"]
    out = resumed(run, "--max_steps", 5, *words, f"{images}.log_images_kwargs.ddim_steps=1", capsys=capsys)
    assert "image_logger.batch_frequency 5 (was 0)" in out
    assert list((run / "images" / "train").glob("samples_gs-000005*"))


@pytest.mark.one_reader
def test_a_run_begun_from_a_file_resumes_without_it(copy_of, tiny_yaml, capsys) -> None:
    vectors = Path(shutil.copy(copy_of() / "checkpoints" / "embeddings.pt", "vectors.pt"))
    words = ["--embedding_manager_ckpt", vectors, "--max_steps", 1, "-l", "second"]
    assert start("--base", tiny_yaml, "-t", *words) == 0
    vectors.unlink()
    resumed(only_run("second"), "--max_steps", 2, capsys=capsys)


@pytest.mark.one_reader
@pytest.mark.slow
def test_a_file_of_the_run_itself_is_not_needed(copy_of, capsys) -> None:
    run = copy_of()
    file = run / "checkpoints" / "embeddings_gs-4.pt"
    assert "is not needed" in resumed(run, "--max_steps", 5, "--embedding_manager_ckpt", file, capsys=capsys)


@pytest.mark.one_reader
def test_vectors_of_an_earlier_step_are_not_taken_for_those_of_the_state(
    copy_of, capsys, monkeypatch
) -> None:
    run = copy_of()
    earlier = shutil.copy(
        run / "checkpoints" / "embeddings_gs-4.pt", run / "checkpoints" / "embeddings_gs-2.pt"
    )
    monkeypatch.setattr("ldm.training.run.make_data", lambda config: pytest.fail("something is loaded"))
    assert start("-r", run, "-t", "--embedding_manager_ckpt", earlier) == 2
    assert "gs-2.pt' and -r exclude each other: a resumed run goes on with its own" in capsys.readouterr().err


def test_fewer_epochs_than_the_state_has_are_refused_and_not_kept(copy_of, capsys, monkeypatch) -> None:
    """Lightning refuses them after everything is built and the settings are saved."""
    run = copy_of()
    saved = sorted(path.name for path in (run / "configs").iterdir())
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] = 3
    torch.save(state, run / "checkpoints" / "last.ckpt")
    monkeypatch.setattr("ldm.training.run.make_data", lambda config: pytest.fail("something is loaded"))
    assert start("-r", run, "-t", "--num_train_epochs", 1) == 2
    assert "3 of 1 epochs are done; go on with --max_epochs 4" in capsys.readouterr().err
    assert sorted(path.name for path in (run / "configs").iterdir()) == saved


@pytest.mark.one_reader
@pytest.mark.parametrize("place", ["run", "run/checkpoints", "run/checkpoints/last.ckpt"])
def test_a_project_is_a_place_in_a_run(copy_of, capsys, place) -> None:
    copy_of()
    capsys.readouterr()
    assert start("--project", place, "-t", "--max_steps", 4) == 0
    out = capsys.readouterr().out
    assert "resuming from run/checkpoints/last.ckpt" in out and "is ignored" not in out


def changed(was: object, now: object) -> list[str]:
    return resuming.differences({"config": was, "batch": 2}, {"config": now, "batch": 2})


@pytest.mark.parametrize("at_once", [False, True])
def test_a_default_that_is_given_is_no_change(tmp_path, at_once: bool) -> None:
    def check(method: str, **params: Any) -> None:
        node = {"target": f"ldm.modules.methods.{method}", "params": {"placeholder_strings": ["*"]}}
        configs = [
            OmegaConf.create(
                {"model": {"params": {"personalization_config": node | {"params": node["params"] | more}}}}
            )
            for more in ({}, params)
        ]
        resuming.check_fixed(*configs, RunFolder(tmp_path, "now"), at_once=at_once)

    check("XTI", num_vectors_per_token=1)  # an argument of the class that it derives from
    check("ProSpect", stages=4)
    with pytest.raises(UsageError, match="keeps its number of vectors, 1; 2 is asked for"):
        check("XTI", num_vectors_per_token=2)
    with pytest.raises(UsageError, match="keeps its stages, 4; 5 is asked for"):
        check("ProSpect", stages=5)


def test_differences_in_words() -> None:
    node: Callable[..., dict[str, Any]] = lambda name, **params: {"target": f"a.b.{name}", "params": params}  # noqa: E731
    assert changed({"model": node("A", x=1)}, {"model": node("A", x=1)}) == []
    assert changed({"model": node("A", x=1)}, {"model": node("A", x=2)}) == ["model.x 2 (was 1)"]
    assert changed({"model": node("A", x=1)}, {"model": node("B", y=2)}) == ["model 'B' (was 'A')"]
    assert changed({}, {"data_root": "pics"}) == ["data_root 'pics' (was none)"]
    assert changed({"seed": 1}, {"seed": 2, "scale_lr": True}) == ["seed 2 (was 1)"]
    many = changed({}, {f"key{i}": i for i in range(9)})
    assert len(many) == 6 and many[-1] == "4 more"
    assert resuming.differences({"batch": 2}, {"batch": 4}) == ["batch 4 (was 2)"]
    long = changed({}, {"key": "x" * 500})
    assert len(long[0]) < 100


def test_settings_are_plain_values(copy_of) -> None:
    settings = state_of(copy_of())["settings"]
    assert (settings["learning rate"], settings["batch"], settings["batches"]) == (1e-2, 2, 3)
    assert OmegaConf.create(settings["config"]).lightning.trainer.max_steps == 4
