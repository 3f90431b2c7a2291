"""Flags of diffusers' training scripts: each is mapped, said to change nothing, or refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from shlex import split
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from pytorch_lightning.loggers import CSVLogger

from ldm.base_models import BaseModel, training_yaml
from ldm.training import config, flags
from ldm.training.callbacks import complete_lightning
from ldm.training.command_line import make_parser, parse
from ldm.training.learning_rate import set_learning_rate
from ldm.training.run_folder import place_to_resume
from ldm.util import UsageError
from tests.training.runs import only_run, start, state_of

BASE = "configs/latent-diffusion/txt2img-finetune.yaml"
PREVIEWS = "lightning.callbacks.image_logger.params"
OPTIMIZER = "model.params.optimizer_config.params"
SCHEDULE = "model.params.scheduler_config"

# All flags of examples/textual_inversion/textual_inversion.py and textual_inversion_sdxl.py, and those of earlier
# versions of the first; each with what it sets in the configuration, or what is said.
SETS: dict[str, tuple[str, Any]] = {
    "--pretrained_model_name_or_path models": ("actual_resume", "models"),
    "--revision main --actual_resume me/model": ("revision", "main"),
    "--variant fp16 --actual_resume me/model": ("variant", "fp16"),
    "--train_data_dir data/concepts/momo": ("data_root", "data/concepts/momo"),
    "--placeholder_token <cat-toy>": ("placeholder_string", "<cat-toy>"),
    "--initializer_token toy": ("init_word", "toy"),
    "--num_vectors 3": ("model.params.personalization_config.params.num_vectors_per_token", 3),
    "--learnable_property style": (
        "data.params.train.target",
        "ldm.data.personalized_style.PersonalizedBase",
    ),
    "--repeats 7": ("data.params.train.params.repeats", 7),
    "--seed 5": ("seed", 5),
    "--resolution 64": ("data.params.train.params.size", 64),
    "--center_crop": ("data.params.train.params.center_crop", True),
    "--train_batch_size 2": ("data.params.batch_size", 2),
    "--num_train_epochs 3": ("lightning.trainer.max_epochs", 3),
    "--max_train_steps 50": ("lightning.trainer.max_steps", 50),
    "--gradient_accumulation_steps 4": ("lightning.trainer.accumulate_grad_batches", 4),
    "--gradient_checkpointing": ("model.params.unet_config.params.use_checkpoint", True),
    "--learning_rate 5.0e-04": ("model.base_learning_rate", 5e-4),
    "--scale_lr": ("scale_lr", True),
    "--lr_scheduler constant": (SCHEDULE, None),
    "--lr_scheduler linear": (f"{SCHEDULE}.params.name", "linear"),
    "--lr_warmup_steps 25": (f"{SCHEDULE}.params.warm_up_steps", 25),
    "--lr_scheduler cosine_with_restarts --lr_num_cycles 3": (f"{SCHEDULE}.params.num_cycles", 3),
    "--dataloader_num_workers 2": ("data.params.num_workers", 2),
    "--adam_beta1 0.8": (f"{OPTIMIZER}.betas", [0.8, 0.999]),
    "--adam_beta2 0.99": (f"{OPTIMIZER}.betas", [0.9, 0.99]),
    "--adam_weight_decay 0": (f"{OPTIMIZER}.weight_decay", 0.0),
    "--adam_epsilon 1e-07": (f"{OPTIMIZER}.eps", 1e-7),
    "--mixed_precision bf16": ("lightning.trainer.precision", "bf16-mixed"),
    "--allow_tf32": ("allow_tf32", True),
    "--validation_prompt 'a <cat> on a sofa'": (f"{PREVIEWS}.prompts", ["a <cat> on a sofa"]),
    "--num_validation_images 2": (f"{PREVIEWS}.images_per_prompt", 2),
    "--validation_steps 10": (f"{PREVIEWS}.batch_frequency", 10),
    "--checkpointing_steps 20": ("lightning.modelcheckpoint.params.every_n_train_steps", 20),
    "--checkpoints_total_limit 3": ("lightning.callbacks.embedding_saver.params.keep", 3),
    "--save_steps 250": ("lightning.callbacks.embedding_saver.params.every_n_train_steps", 250),
    "--report_to wandb": ("lightning.logger.target", "pytorch_lightning.loggers.WandbLogger"),
    "--tokenizer_name other": ("model.params.cond_stage_config.params.tokenizer", "other"),
}
# These are read by their name where they act.
OPTIONS = {
    "--output_dir out": ("logdir", "out"),
    "--resume_from_checkpoint latest": ("resume", "latest"),
    "--save_as_full_pipeline": ("save_as_full_pipeline", True),
    "--push_to_hub": ("push_to_hub", True),
    "--hub_token hf_x": ("hub_token", "hf_x"),
    "--hub_model_id me/cat": ("hub_model_id", "me/cat"),
}
SAYS = {
    "--report_to tensorboard": "--report_to tensorboard needs no setting",
    "--use_8bit_adam": "--use_8bit_adam changes nothing",
    "--logging_dir logs": "--logging_dir changes nothing",
    "--local_rank -1": "--local_rank changes nothing",
    "--enable_xformers_memory_efficient_attention": "fused kernels",
    "--no_safe_serialization": "--no_safe_serialization changes nothing",
    "--only_save_embeds": "--only_save_embeds changes nothing",
    "--use_auth_token": "--use_auth_token changes nothing",
    "--lr_scheduler constant --lr_warmup_steps 500": "--lr_scheduler constant_with_warmup has one",
    "--lr_warmup_steps 0 model.params.scheduler_config=null": "the rate has no schedule",
    "--revision main --actual_resume a.ckpt": "--revision changes nothing: 'a.ckpt' is no hub id",
    "--variant fp16 --actual_resume a.ckpt": "--variant changes nothing: 'a.ckpt' is a single file",
    "--tokenizer_name me/model --actual_resume me/model": "--tokenizer_name changes nothing",
    "--num_train_epochs 5 --max_train_steps 9": "--num_train_epochs 5 changes nothing",
    "--num_train_epochs 5": "after 5 epochs, or after the YAML's 240 steps",
    "--hub_model_id me/cat": "--hub_model_id changes nothing without --push_to_hub",
    "--hub_token hf_x": "--hub_token changes nothing without --push_to_hub",
}
REFUSES = {
    "--validation_epochs 5": "--validation_epochs is not supported: give --validation_steps",
    "--local_rank 1": "start one process",
    "--lr_scheduler step": "invalid choice: 'step'",
    "--lr_num_cycles 2": "--lr_num_cycles is for --lr_scheduler cosine_with_restarts",
    "--lr_scheduler cosine model.base_learning_rate=1e-3:5,1e-4": "is a schedule already; give --learning_rate too",
    "--adam_beta1 1": "'1' is not a number from 0",
    "--adam_epsilon 0": "'0' is not a number above 0",
    "--adam_weight_decay -1": "'-1' is not a number",
    "--learning_rate nan": "'nan' is not a number above 0",
    "--lr_warmup_steps -1": "'-1' is not a whole number of at least 0",
    "--adam_beta1 0.5 model.params.optimizer_config.target=torch.optim.SGD": "the YAML's optimizer is torch.optim.SGD",
    "--tokenizer_name x --actual_resume openai/clip": "is used with its own tokenizer",
    "--lr_warmup_steps 9 model.params.scheduler_config.target=ldm.lr_scheduler.LambdaStepScheduler": "no warm-up",
}
NAMES = """
    save_steps save_as_full_pipeline num_vectors pretrained_model_name_or_path revision variant tokenizer_name
    train_data_dir placeholder_token initializer_token learnable_property repeats output_dir seed resolution center_crop
    train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps gradient_checkpointing learning_rate
    scale_lr lr_scheduler lr_warmup_steps lr_num_cycles dataloader_num_workers use_8bit_adam adam_beta1 adam_beta2
    adam_weight_decay adam_epsilon push_to_hub hub_token hub_model_id logging_dir mixed_precision allow_tf32 report_to
    validation_prompt num_validation_images validation_steps validation_epochs local_rank checkpointing_steps
    checkpoints_total_limit resume_from_checkpoint enable_xformers_memory_efficient_attention no_safe_serialization
    only_save_embeds use_auth_token
"""


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Weights & Biases counts as installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: name == "wandb" or find(name, *of))


def merged(words: str) -> tuple[Any, DictConfig]:
    options = parse(split(words))
    return options, config.load_run_config(options, [BASE])


def plain(node: Any) -> Any:
    return OmegaConf.to_container(node) if OmegaConf.is_config(node) else node


@pytest.mark.client_files
def test_every_flag_of_diffusers_scripts_is_in_a_table_of_this_test():
    tables = (*SETS, *OPTIONS, *SAYS, *REFUSES)
    used = {word.lstrip("-") for line in tables for word in split(line) if word.startswith("--")}
    assert set(NAMES.split()) <= used
    known = {name.lstrip("-") for action in make_parser()._actions for name in action.option_strings}
    assert set(NAMES.split()) - known == {"validation_epochs"}


@pytest.mark.parametrize("words", SETS)
@pytest.mark.client_files
def test_flags_that_set_a_key(words):
    key, value = SETS[words]
    before = OmegaConf.select(config.load_run_config(parse([]), [BASE]), key)
    options, after = merged(words)
    assert plain(OmegaConf.select(after, key)) == value != plain(before)
    assert not [line for line in flags.notes(options, after) if "changes nothing" in line]


@pytest.mark.parametrize("words", OPTIONS)
@pytest.mark.client_files
def test_flags_that_are_read_by_their_name(words):
    name, value = OPTIONS[words]
    assert getattr(parse(split(words)), name) == value


@pytest.mark.parametrize("words", SAYS)
@pytest.mark.client_files
def test_flags_that_change_nothing_are_said(words):
    lines = flags.notes(*merged(words))
    assert len([line for line in lines if SAYS[words] in line]) == 1, lines
    assert all(len(line) < 300 for line in lines)


@pytest.mark.parametrize("words", REFUSES)
@pytest.mark.client_files
def test_flags_that_are_refused(words):
    with pytest.raises(UsageError, match=".") as caught:
        merged(words)
    assert REFUSES[words] in str(caught.value)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None)
    with pytest.raises(UsageError, match="--report_to wandb needs a package: pip install wandb"):
        parse(["--report_to", "wandb"])
    with pytest.raises(UsageError, match="needs diffusers: pip install diffusers"):
        parse(["--save_as_full_pipeline"])


def test_a_token_is_not_shown_to_a_logger():
    with pytest.raises(UsageError, match="--hub_token would be shown to wandb"):
        parse(split("--report_to wandb --push_to_hub --hub_token hf_x"))


def test_a_validation_set_is_not_created_by_a_flag_about_images():
    assert OmegaConf.select(merged("--resolution 64 --center_crop")[1], "data.params.validation") is None


def test_tensorboard_replaces_another_logger_of_the_yaml():
    other = "lightning.logger={target: pytorch_lightning.loggers.CSVLogger, params: {flush_logs_every_n_steps: 1}}"
    options, after = merged(f"--report_to tensorboard '{other}'")
    assert after.lightning.logger is None and "logger" not in complete_lightning(after.lightning)
    (line,) = flags.notes(options, after)
    assert line == "--report_to tensorboard needs no setting: CSV and TensorBoard logs are in the run folder"
    project = merged(f"--report_to wandb '{other}'")[1].lightning.logger.params
    assert project == {"project": "textual_inversion"}


def test_epochs_do_not_end_a_run_whose_steps_are_given():
    _, after = merged("--num_train_epochs 5 --max_train_steps 9")
    assert after.lightning.trainer.max_steps == 9 and "max_epochs" not in after.lightning.trainer


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--learning_rate 1e-3", True),
        ("--lr 1e-3", True),
        ("model.base_learning_rate=1e-3", True),
        ("--learning_rate 1e-3 --lr_scheduler constant", False),
        ("--learning_rate 1e-3 --lr_scheduler cosine", False),
        ("", False),
    ],
)
@pytest.mark.client_files
def test_a_given_rate_says_that_the_schedule_stays(words, said):
    options, after = merged(words)
    line = flags.rate_note(options, OmegaConf.select(after, SCHEDULE))
    assert (line is not None) is said
    if said:
        assert "LambdaWarmUpCosineScheduler; --lr_scheduler constant makes it constant" in str(line)


@pytest.mark.client_files
def test_a_run_with_flags_of_diffusers(tiny_yaml, capsys):
    words = "--allow_tf32 --learning_rate 1e-3 --lr_scheduler linear --lr_warmup_steps 2 "
    words += "--adam_beta1 0.8 --adam_epsilon 1e-6"
    assert start("--base", tiny_yaml, "-t", *split(words)) == 0
    shown = capsys.readouterr().out
    assert "learning rate 1.00e-03; times the factor of linear (2 steps of warm-up)" in shown
    assert "--allow_tf32 changes nothing" in shown or torch.cuda.is_available()
    (group,) = state_of()["optimizer_states"][0]["param_groups"]
    assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.999), 1e-6, pytest.approx(0, abs=1e-12))
    run = only_run()
    assert start("-r", run, "-t", "--max_steps", 8, *split(words)) == 0
    assert not capsys.readouterr().err
    (group,) = state_of(run)["optimizer_states"][0]["param_groups"]
    assert group["betas"] == (0.8, 0.999)


def test_a_run_that_is_all_warm_up_is_a_warning(caplog):
    _, after = merged("--learning_rate 1e-3 --lr_warmup_steps 500")
    model = SimpleNamespace(scheduler_config=after.model.params.scheduler_config)
    rate = {"batch": 1, "accumulation": 1, "processes": 1, "max_steps": 9}
    assert "times the factor of LambdaWarmUpCosineScheduler" in set_learning_rate(after, model, **rate)
    assert "the warm-up of 500 steps is not shorter than the run of 9" in caplog.text


def test_latest_begins_a_run_where_there_is_none(tmp_path):
    words = f"--resume_from_checkpoint latest -n cat -l {tmp_path}"
    assert place_to_resume(parse(split(words))) == ("", "cat")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    assert place_to_resume(parse(split(words))) == ("latest", "cat")
    assert place_to_resume(parse(["-r", "latest", "-l", "nowhere"])) == ("latest", "")


@pytest.mark.client_files
def test_weights_and_biases(tiny_yaml, monkeypatch):
    """The logger is built with the run's folder; the package itself is played."""
    built: list[dict[str, Any]] = []

    class Wandb(CSVLogger):
        def __init__(self, save_dir: str = ".", project: str = "") -> None:
            built.append({"save_dir": save_dir, "project": project})
            super().__init__(save_dir, name="wandb")

    monkeypatch.setattr("pytorch_lightning.loggers.WandbLogger", Wandb)
    assert start("--base", tiny_yaml, "-t", "--report_to", "wandb", "--max_steps", 1) == 0
    run = only_run()
    assert built == [{"save_dir": str(run), "project": "textual_inversion"}]
    assert not (run / "tensorboard").exists() and list(run.glob("csv/*/metrics.csv"))


README = """
    --pretrained_model_name_or_path=me/model --use_auth_token --train_data_dir=photos --learnable_property=object
    --placeholder_token=<cat-toy> --initializer_token=toy --resolution=16 --train_batch_size=1
    --gradient_accumulation_steps=4 --max_train_steps=2 --learning_rate=5.0e-04 --scale_lr --lr_scheduler=constant
    --lr_warmup_steps=0 --output_dir=textual_inversion_cat
"""


@pytest.mark.client_files
def test_the_readmes_command_with_a_model_of_the_hub(tmp_path, monkeypatch, capsys):
    """Without --base the YAML follows from the files of the hub id, those of --variant and --revision."""
    pytest.importorskip("diffusers")
    from tests.pipelines import make_pipeline

    folder = tmp_path / "snapshots" / "abc"
    make_pipeline("sd1", tmp_path / "tokenizers").save_pretrained(folder, variant="fp16")
    asked = set()

    def fetch(
        repository: str, variant: str | None = None, revision: str | None = None, *parts: object
    ) -> Path:
        asked.add((repository, variant, revision))
        return folder

    monkeypatch.setattr("ldm.weights.fetch", fetch)
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Image.new("RGB", (32, 32), "red").save("photos/one.png")
    words = ["--variant=fp16", "--revision=abc", "--mixed_precision=no", "data.params.num_workers=0"]
    assert start(*split(README), *words) == 0
    shown = capsys.readouterr().out
    assert asked == {("me/model", "fp16", "abc")}
    assert "the settings are those of " in shown and "v1-finetune.yaml, for 'me/model'" in shown
    assert "learning '<cat-toy>' (1 vector) from 1 image" in shown
    assert "--use_auth_token changes nothing: the token of 'hf auth login' or HF_TOKEN is used" in shown
    assert f"--ckpt_path {folder} " in shown, "txt2img.py would take other weights of the hub id"
    saved = OmegaConf.load(next(only_run("textual_inversion_cat").glob("configs/*-project.yaml")))
    assert (saved.actual_resume, saved.variant, saved.revision) == ("me/model", "fp16", "abc")
    assert start("-r", only_run("textual_inversion_cat"), "-t", "--revision", "other") == 2
    assert "a resumed run keeps its revision of the base model, 'abc'" in capsys.readouterr().err


def test_what_weights_do_not_tell_is_asked_in_one_line(tmp_path, monkeypatch, caplog):
    guessed = BaseModel("v2.ckpt", tmp_path, "sd2", "v", "guess")
    monkeypatch.setattr("ldm.base_models.recognise", lambda *named: guessed)
    caplog.set_level("WARNING", logger="ldm")
    assert training_yaml("v2.ckpt").name == "v2-finetune_v.yaml"
    (line,) = caplog.messages
    assert "v is assumed" in line and "v2-finetune.yaml to train" in line


def test_an_overlay_alone_follows_the_model(tiny_yaml, tmp_path, capsys):
    """--base may name what goes over the model's own YAML; without -t nothing is trained."""
    checkout = Path(__file__).resolve().parents[2]
    overlay = checkout / "configs/personalization/three_vectors.yaml"
    model = checkout / "models/ldm/creatures/model.safetensors"
    assert start("--base", overlay, "--actual_resume", model) == 0
    shown = capsys.readouterr().out
    assert "txt2img-finetune.yaml, for" in shown and "(3 vectors)" in shown and "add -t to train" in shown
