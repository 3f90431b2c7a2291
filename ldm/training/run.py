"""A run, from its command line to its last log line."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import LambdaCallback
from pytorch_lightning.utilities.model_helpers import is_overridden

from ldm.base_models import recognise
from ldm.checkpoint import load_model_from_config
from ldm.console import Interrupted
from ldm.training import command_line, config, flags, hub, preflight, resuming, run_folder
from ldm.training.callbacks import OPTIONAL_CALLBACKS, complete_lightning, is_gone_logger
from ldm.training.callbacks.base import (
    RunCallback,
    callbacks_of,
    is_personalization,
    personalization_of,
    shared_vectors,
)
from ldm.training.callbacks.embedding_saver import EmbeddingSaver, Provenance
from ldm.training.callbacks.fixed_loss import DeterministicLoss
from ldm.training.callbacks.interruption import Requests, handle_signals
from ldm.training.callbacks.progress import total_steps
from ldm.training.callbacks.resumption import Resumption, settings_of_run
from ldm.training.fitting import check_is_state, fit
from ldm.training.learning_rate import check_rate, set_learning_rate
from ldm.training.record import Recorder
from ldm.training.run_folder import RunFolder
from ldm.training.trainer import (
    Devices,
    build_trainer,
    check_options,
    choose_devices,
    half_for,
    make_callbacks,
    make_loggers,
    processes,
    refusals,
    trainer_kwargs,
    translate_old_keys,
)
from ldm.util import ConfigError, UsageError, UserError, instantiate_from_config

logger = logging.getLogger(__name__)

SEED = 23
# The default model of scripts/txt2img.py.
EMBEDDED_MODEL = "models/ldm/creatures/model.safetensors"


@dataclass
class Plan:
    """A checked command line: the configuration, the run folder, and what it resumes.

    `state` is the state file, `saved` the configuration of the run before; both are None for a new run. Without
    `train` the configuration is only checked.
    """

    options: argparse.Namespace
    config: DictConfig
    run: RunFolder
    state: Path | None
    saved: DictConfig | None = None
    train: bool = True


def run(argv: Sequence[str], prog: str = "main.py", callbacks: Sequence[pl.Callback] = ()) -> int:
    """Run a command line and return the exit code; `callbacks` are added to those of the configuration.

    Raises:
        UserError: a mistake that the user can correct; it has the exit code 1 or 2.
        Interrupted: a signal asked the run to stop before its training.
    """
    recorder = Recorder()
    with recorder.recording():
        return _run(make_plan(command_line.parse(argv, prog)), recorder, callbacks)


def _run(plan: Plan, recorder: Recorder, callbacks: Sequence[pl.Callback]) -> int:
    pl.seed_everything(plan.config["seed"], verbose=False)
    data = make_data(plan.config)
    preflight.check_keys(plan.config, getattr(data, "datasets", {}).get("train"))
    trainer_node = OmegaConf.select(plan.config, "lightning.trainer") or {}
    devices = choose_devices(trainer_node.get("gpus"), trainer_node.get("accelerator"))
    if plan.config.get("allow_tf32"):
        if devices.accelerator == "cuda":
            torch.set_float32_matmul_precision("high")
        else:
            logger.info("--allow_tf32 changes nothing: TF32 is for NVIDIA GPUs")
    half = half_for(trainer_node.get("precision"), devices.accelerator)
    check_options(
        trainer_kwargs(plan.config.get("lightning") or {}, devices, personalization=False), plan.run.path
    )
    model = make_model(plan.config, half=half)
    datasets = getattr(data, "datasets", {})
    hub.check_model(plan.options, plan.config, plan.run, model)
    preflight.check_captions(model, datasets.get("train"))
    preflight.check_progress(model, OmegaConf.select(plan.config, "lightning.trainer.max_steps"))
    requests = Requests()
    with handle_signals(requests):
        trainer = make_trainer(plan, model, devices, requests, [recorder, *callbacks, *samplers(plan)])
        figures = settle(plan, model, trainer, data)
        if trainer.is_global_zero:
            log_plan(plan, model, datasets, trainer, figures)
        if not plan.train:
            logger.info("the configuration is valid; add -t to train")
            return 0
        try:
            fit(plan.run, plan.state, trainer, model, data)
        except Interrupted as stop:
            logger.info("stopped by %s at step %d", stop, trainer.global_step)
            if plan.options.push_to_hub:
                logger.info(
                    "nothing is uploaded, because the run is not finished; resume it with --push_to_hub"
                )
            recorder.end("stopped", log_results(plan, model, trainer, finished=False))
            # The exit code is that of the first process; with another code, Lightning would kill the first one.
            return stop.exit_code if trainer.is_global_zero else 0
    verdict = log_results(plan, model, trainer, finished=True)
    shared = share(plan, model) if trainer.is_global_zero else True
    recorder.end("finished", verdict)
    if (
        not plan.options.no_test
        and is_overridden("test_step", model, pl.LightningModule)
        and datasets.get("test")
    ):
        trainer.test(model, datamodule=data)
    return 0 if shared else 1


def make_plan(options: argparse.Namespace) -> Plan:
    """Read and check the configuration; this builds and writes nothing."""
    resume, name = run_folder.place_to_resume(options)
    base, folder, state = list(options.base), None, None
    if resume:
        folder, state = run_folder.existing_run_folder(resume, options.logdir, options.resume_flag)
        _check_names(options, folder)
    else:
        base = config.complete_base(options)
    merged, saved, where = config.of_run(options, base, folder)
    trainer_node = OmegaConf.select(merged, "lightning.trainer")
    trainer_node = trainer_node if isinstance(trainer_node, DictConfig) else OmegaConf.create({})
    # Lightning 1.x had this key in place of -r; a run's saved YAMLs need it no more.
    if (place := trainer_node.pop("resume_from_checkpoint", None)) and not resume:
        given = {"resume": str(place), "resume_flag": "lightning.trainer.resume_from_checkpoint"}
        return make_plan(argparse.Namespace(**vars(options) | given))
    if trainer_node:
        merged["lightning"]["trainer"] = translate_old_keys(trainer_node)
    config.check_run_config(merged, where)
    check_rate(merged)
    if folder is not None and state is not None and saved is not None:
        resuming.check_fixed(saved, merged, folder)
        resuming.check_epochs(check_is_state(state, folder), merged)
        resuming.forget_first_vectors(merged, saved)
    else:
        preflight.check_first_vectors(merged)
    merged["seed"] = merged.get("seed", SEED)
    config.seed_vectors(merged)
    merged["scale_lr"] = merged.get("scale_lr", True)
    if folder is None:
        folder = run_folder.new_run_folder(
            options.logdir,
            name=name or Path(base[0]).stem,
            data_root=merged.get("data_root") if options.datadir_in_name else None,
            postfix=options.postfix,
            several=processes(OmegaConf.select(merged, "lightning.trainer") or {}) > 1,
            label=name,
        )
    # Without --base the command line is one of diffusers' script, which always trains.
    train = not (options.base or resume) if options.train is None else options.train
    return Plan(options, merged, folder, state, saved, train)


def _check_names(options: argparse.Namespace, folder: RunFolder) -> None:
    """Say that a resumed run keeps its folder, if the command line names another one.

    Raises:
        UsageError: --project is a run too.
    """
    # Without --resume, --project is the run or a place in it.
    if options.resume and options.project and Path(options.project).resolve() != folder.path.resolve():
        if run_folder.is_run_folder(options.project):
            raise UsageError(
                f"--project '{options.project}' and {options.resume_flag} '{options.resume}' are two runs; leave one "
                "of them out"
            )
        logger.info("--project '%s' is ignored: a resumed run keeps its folder", options.project)
    if options.name:
        logger.info("--name '%s' is ignored: a resumed run keeps its folder", options.name)


def make_data(merged: DictConfig) -> pl.LightningDataModule:
    """The data module with its datasets; built first, so that a wrong folder is found before weights are read."""
    data = instantiate_from_config(merged["data"])
    data.prepare_data()
    data.setup("fit")
    return data


def make_model(merged: DictConfig, half: torch.dtype | None = None) -> pl.LightningModule:
    """The model, with the weights of `actual_resume` if that is given.

    With a personalization frozen layers are read in `half`, the type that training keeps them in.
    """
    node = merged["model"]
    if path := merged.get("actual_resume"):
        logger.info("reading %s", path)
        personalised = OmegaConf.select(node, "params.personalization_config") is not None
        half = half if personalised else None
        model = load_model_from_config(
            node,
            path,
            vae=merged.get("vae"),
            half=half,
            variant=merged.get("variant"),
            revision=merged.get("revision"),
        )
    else:
        model = instantiate_from_config({key: node[key] for key in ("target", "params") if key in node})
        if is_personalization(model) and not OmegaConf.select(node, "params.ckpt_path"):
            logger.warning(
                "no --actual_resume: the frozen model has random weights, so nothing useful is learned"
            )
    if not isinstance(model, pl.LightningModule):
        raise ConfigError(f"model.target {node['target']} is not a LightningModule")
    # Lightning keeps the mode of the model, and loading a checkpoint sets evaluation mode.
    return model.train()


def make_trainer(
    plan: Plan,
    model: pl.LightningModule,
    devices: Devices,
    requests: Requests,
    further: Sequence[pl.Callback] = (),
) -> pl.Trainer:
    """Lightning's Trainer for this run; `further` are callbacks beside those of the configuration."""
    personalization = is_personalization(model)
    if is_gone_logger(node := OmegaConf.select(plan.config, "lightning.logger") or {}):
        logger.info("lightning.logger %s no longer exists: TensorBoard takes its place", node["target"])
    lightning = complete_lightning(plan.config.get("lightning"), personalization=personalization)
    if devices.accelerator == "cuda":
        lightning["callbacks"].setdefault("cuda_callback", OPTIONAL_CALLBACKS["cuda_callback"])
    kwargs = trainer_kwargs(lightning, devices, personalization=personalization)
    callbacks = make_callbacks(
        lightning, plan.config, plan.run, model, requests, resume=str(plan.state or "")
    )
    for callback in callbacks:
        if isinstance(callback, EmbeddingSaver):
            callback.describe = Provenance(plan.config, model)
            callback.stems = plan.run.word_stems
        if isinstance(callback, RunCallback) and (name := plan.config.get("actual_resume")):
            callback.model_name = f"'{name}'"
    with refusals():
        return build_trainer(
            kwargs,
            plan.run,
            [*callbacks, *further],
            make_loggers(lightning, plan.run),
            personalization=personalization,
        )


@dataclass(frozen=True)
class Figures:
    """What a run really uses: batch size per process, batches in an epoch, accumulation, and the rate in words.

    `batches` is None for a stream of samples.
    """

    batch: int
    batches: int | None
    accumulation: int
    rate: str


def settle(plan: Plan, model: pl.LightningModule, trainer: pl.Trainer, data: Any) -> Figures:
    """Set the learning rate for what the data delivers, and let the trainer keep these settings with its state."""
    asked = OmegaConf.select(plan.config, "data.params.batch_size") or 1
    delivered = None
    if hasattr(data, "delivered"):
        delivered = data.delivered(trainer.world_size, trainer.limit_train_batches)
    batch, batches = delivered or (asked, None)
    accumulation = min(trainer.accumulate_grad_batches, batches or trainer.accumulate_grad_batches)
    rate = set_learning_rate(
        plan.config,
        model,
        batch=batch,
        accumulation=accumulation,
        processes=trainer.world_size,
        max_steps=trainer.max_steps,
    )
    used: dict[str, Any] = {
        "learning rate": model.learning_rate,
        "batch": batch,
        "accumulation": accumulation,
    }
    if batches is not None:
        used["batches"] = batches
    settings = settings_of_run(plan.config, trainer, used)
    # Before all others: its update of a state is for what they restore.
    callbacks_of(trainer).insert(0, Resumption(settings, plan.saved))
    return Figures(batch, batches, accumulation, rate)


def log_plan(
    plan: Plan, model: pl.LightningModule, datasets: Mapping[str, Any], trainer: pl.Trainer, figures: Figures
) -> None:
    """Log what is trained, on what, and where."""
    asked = OmegaConf.select(plan.config, "data.params.batch_size")
    batch = f"batch {figures.batch}"
    if asked and asked != figures.batch:
        batch += f" ({asked} asked for, but an epoch has no more samples)"
    lines = preflight.summary(
        model=model,
        datasets=datasets,
        device=_device_name(trainer),
        steps=total_steps(trainer),
        batch=batch,
        rate=figures.rate,
        folder=plan.run.path,
    )
    if note := flags.rate_note(plan.options, getattr(model, "scheduler_config", None)):
        lines.append(note)
    for line in [*lines, *flags.notes(plan.options, plan.config)]:
        logger.info("%s", line)


def _device_name(trainer: pl.Trainer) -> str:
    root = trainer.strategy.root_device
    names = {"cpu": "the CPU", "mps": "the Apple GPU"}
    name = torch.cuda.get_device_name(root) if root.type == "cuda" else names.get(root.type, str(root))
    several = f"{trainer.world_size} x " if trainer.world_size > 1 or root.type == "cuda" else ""
    return f"{several}{name} with precision {trainer.precision}"


def log_results(plan: Plan, model: pl.LightningModule, trainer: pl.Trainer, *, finished: bool) -> str | None:
    """Log where the results are and the next command to type; returns the verdict on the run, if there is one."""
    if not trainer.is_global_zero:
        return None
    logger.info("run folder: %s", plan.run.path)
    manager = personalization_of(model)
    if manager is not None and plan.run.embeddings.is_file():
        logger.info("embeddings: %s", plan.run.embeddings)
        words = list(manager.string_to_token_dict)
        base = plan.config.get("actual_resume")
        command = ["python", "scripts/txt2img.py", "--embedding_path", str(plan.run.embeddings)]
        which = {key: plan.config.get(key) for key in ("variant", "revision")}
        if base and any(which.values()):
            base = recognise(base, **which).path  # the folder of that revision, already fetched
        if base and Path(base) != Path(EMBEDDED_MODEL):
            command += ["--ckpt_path", str(base), "--config", str(plan.run.saved_configs()[-1])]
            command += ["--vae", str(plan.config["vae"])] if plan.config.get("vae") else []
        logger.info("generate:   %s", shlex.join([*command, "--prompt", f"a photo of {words[0]}"]))
        for line in elsewhere(plan.run, model):
            logger.info("%s", line)
    elif plan.run.last.is_file():
        logger.info("checkpoint: %s", plan.run.last)
    if not finished and plan.run.last.is_file():
        logger.info("resume with: %s", shlex.join(["python", "main.py", "-r", str(plan.run.path), "-t"]))
    for callback in callbacks_of(trainer):
        if isinstance(callback, DeterministicLoss) and (
            verdict := callback.verdict(trainer, finished=finished)
        ):
            logger.info("%s", verdict)
            return verdict
    return None


def samplers(plan: Plan) -> list[pl.Callback]:
    """The callback that samples images for the model card at the end, while the model is on its device."""
    if not plan.options.push_to_hub:
        return []
    params = OmegaConf.select(plan.config, "lightning.callbacks.image_logger.params") or {}
    prompts, each = list(params.get("prompts") or hub.PROMPTS), params.get("images_per_prompt") or 1

    def sample(trainer: pl.Trainer, model: Any) -> None:
        hub.save_samples(trainer, model, prompts, each)

    return [LambdaCallback(on_train_end=sample)]


def share(plan: Plan, model: pl.LightningModule) -> bool:
    """Write the pipeline and upload the word, if that is asked for; returns whether all of it was done."""
    options, done = plan.options, True
    if options.save_as_full_pipeline:
        try:
            logger.info("pipeline:   %s", hub.write_pipeline(plan.config, plan.run))
        except UserError as error:
            logger.warning("no pipeline is written: %s", error)
            done = False
    if options.push_to_hub:
        done = hub.upload(options, plan.config, plan.run, model) and done
    return done


def elsewhere(run: RunFolder, model: pl.LightningModule) -> list[str]:
    """How other programs load the first word of a run; nothing for a text encoder that they do not have."""
    words = list(shared_vectors(personalization_of(model)))
    family = getattr(model.cond_stage_model, "family", "")
    if not words or family not in ("clip", "sdxl"):
        return []
    stem = run.word_stems(words)[words[0]]
    path = run.checkpoints / f"{stem}.safetensors"
    if not path.is_file():
        return []
    token = hub.diffusers_token(words[0], stem)
    reason = "" if token == words[0] else " (diffusers refuses words of its vocabulary, such as *)"
    call = f'pipe.load_textual_inversion("{path.as_posix()}", token="{token}")'
    if family == "sdxl":  # the pipeline of diffusers is given the vectors of each text encoder by itself
        call = (
            f'v = safetensors.torch.load_file("{path.as_posix()}"), then for both (key, end) of ("clip_l", ""), '
            f'("clip_g", "_2"): pipe.load_textual_inversion(v[key], token="{token}", tokenizer=getattr(pipe, '
            '"tokenizer" + end), text_encoder=getattr(pipe, "text_encoder" + end))'
        )
    return [
        f'diffusers:  {call}, then the prompt "a photo of {token}"{reason}',
        f'AUTOMATIC1111: copy {path.name} to embeddings/, then the prompt "a photo of {stem}"',
        f'ComfyUI:    copy {path.name} to models/embeddings/, then the prompt "a photo of embedding:{stem}"',
    ]
