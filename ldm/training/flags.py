"""The flags of diffusers' and other tools' training scripts: what each one sets here, changes nothing or is refused.

`FLAGS` is the one list of them. `settings` is what the given flags set in the YAML, `notes` what is to be said of
those that change nothing here.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.console import argument, boolean, positive
from ldm.files import is_hub_id
from ldm.util import UsageError

# Arguments of a flag that may stand alone.
SWITCH: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}

PRECISIONS = {"no": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}
TEMPLATES = {
    "object": "ldm.data.personalized.PersonalizedBase",
    "style": "ldm.data.personalized_style.PersonalizedBase",
}
SCHEDULE = "ldm.lr_scheduler.LambdaNamedScheduler"
# The first two have no end, so that they need no number of steps.
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
LOGGERS = {"wandb": "pytorch_lightning.loggers.WandbLogger"}

_TRAIN, _VALIDATION = "data.params.train", "data.params.validation"
_PREVIEWS = "lightning.callbacks.image_logger.params"
_OPTIMIZER, _SCHEDULER = "model.params.optimizer_config", "model.params.scheduler_config"
_TOKENIZER = "model.params.cond_stage_config.params.tokenizer"
_ADAMW = "torch.optim.AdamW"

# Groups of --help.
TRAINING, RATE = "training, in the names of diffusers' script", "learning rate and optimizer"
PREVIEWS, SAVING = "previews", "files"
HUB, NOTHING = "the Hugging Face hub", "accepted from diffusers' command lines; they change nothing here"


@dataclass(frozen=True)
class Flag:
    """A flag of another tool.

    Attributes:
        names: the flag, and others with the same meaning.
        help: its line in --help.
        group: of --help.
        kind: an argument type; None for a switch.
        same_as: the flag of this program that it is another name for.
        keys: keys of the YAML that it sets; none for a flag that is asked for by its name.
        value: makes their value from the flag's.
        choices: the values it may have.
        ignored: why it changes nothing here.
        instead: what to do, if it is refused.
        metavar: its value in --help.
    """

    names: tuple[str, ...]
    help: str = ""
    group: str = TRAINING
    kind: Callable[[str], Any] | None = str
    same_as: str = ""
    keys: tuple[str, ...] = ()
    value: Callable[[Any], Any] = lambda given: given
    choices: tuple[str, ...] | None = None
    ignored: str = ""
    instead: str = ""
    metavar: str | None = None

    @property
    def dest(self) -> str:
        """The name of its value in the parsed command line."""
        return (self.same_as or self.names[0]).lstrip("-")


def _synonym(names: str, of: str, metavar: str, more: str = "") -> Flag:
    return Flag(tuple(names.split()), of + more, same_as=of, metavar=metavar)


def _sets(names: str, keys: str, help: str, kind: Any = str, group: str = TRAINING, **more: Any) -> Flag:
    return Flag(tuple(names.split()), help, group, kind, keys=tuple(keys.split()), **more)


def _ignored(name: str, why: str, kind: Any = None, **more: Any) -> Flag:
    return Flag((name,), why, NOTHING, kind, ignored=why, **more)


def _refused(name: str, instead: str) -> Flag:
    return Flag((name,), instead=instead)


FLAGS: tuple[Flag, ...] = (
    # Other names of this program's own flags.
    _synonym("--train_data_dir", "--data_root", "FOLDER"),
    _synonym("--pretrained_model_name_or_path", "--actual_resume", "MODEL"),
    _synonym("--placeholder_token --token_string", "--placeholder_string", "TEXT"),
    _synonym("--initializer_token", "--init_word", "TEXT"),
    _synonym("--weights", "--embedding_manager_ckpt", "FILE"),
    _synonym("--output_dir", "--logdir", "FOLDER"),
    _synonym("--output_name", "--name", "NAME"),
    _synonym("--resume_from_checkpoint", "--resume", "LOGDIR", "; latest is the newest run, or a new one"),
    # What is trained, how long, and on what.
    _sets(
        "--num_vectors --num_vectors_per_token",
        "model.params.personalization_config.params.num_vectors_per_token",
        "vectors of the new word",
        positive,
    ),
    _sets(
        "--learnable_property",
        f"{_TRAIN}.target {_VALIDATION}.target",
        "captions for an object or for a style",
        choices=tuple(TEMPLATES),
        value=TEMPLATES.__getitem__,
    ),
    _sets("--resolution", f"{_TRAIN}.params.size {_VALIDATION}.params.size", "side of the images", positive),
    _sets(
        "--center_crop",
        f"{_TRAIN}.params.center_crop {_VALIDATION}.params.center_crop",
        "crop the central square of each image; false stretches it",
        None,
    ),
    _sets("--repeats", f"{_TRAIN}.params.repeats", "how often an epoch has each image", positive),
    _sets("--train_batch_size", "data.params.batch_size", "images per step and GPU", positive),
    _sets(
        "--dataloader_num_workers",
        "data.params.num_workers",
        "processes that read images",
        argument("num_workers", int),
    ),
    _sets("--max_train_steps", "lightning.trainer.max_steps", "steps of the run, as --max_steps", positive),
    _sets(
        "--num_train_epochs",
        "lightning.trainer.max_epochs",
        "epochs, unless --max_train_steps is given",
        positive,
    ),
    _sets(
        "--gradient_accumulation_steps",
        "lightning.trainer.accumulate_grad_batches",
        "batches per step",
        positive,
    ),
    _sets(
        "--gradient_checkpointing",
        "model.params.unet_config.params.use_checkpoint",
        "less memory, more time",
        None,
    ),
    _sets(
        "--mixed_precision",
        "lightning.trainer.precision",
        "precision of the frozen model, as --precision",
        choices=tuple(PRECISIONS),
        value=PRECISIONS.__getitem__,
    ),
    Flag(("--allow_tf32",), "faster and less exact float32 on a GPU", kind=None),
    Flag(("--revision",), "of a hub id: a branch, a tag or a commit"),
    Flag(("--variant",), "of a folder of diffusers or a hub id: the weights of this name, as fp16"),
    Flag(("--tokenizer_name",), "tokenizer of the text encoder: a folder or hub name"),
    # Learning rate and optimizer.
    _sets(
        "--learning_rate --lr",
        "model.base_learning_rate",
        "base rate; not multiplied unless --scale_lr is given too",
        argument("base_learning_rate", float),
        RATE,
    ),
    Flag(
        ("--lr_scheduler",),
        "schedule of the rate in place of the YAML's",
        RATE,
        choices=SCHEDULES,
    ),
    Flag(("--lr_warmup_steps",), "steps of its warm-up (0)", RATE, argument("warm_up_steps", int)),
    Flag(("--lr_num_cycles",), "cycles of cosine_with_restarts (1)", RATE, argument("num_cycles", int)),
    Flag(("--lr_power",), "exponent of polynomial (1)", RATE, argument("power", float)),
    Flag(("--adam_beta1",), "AdamW's first beta (0.9)", RATE, argument("betas", float)),
    Flag(("--adam_beta2",), "AdamW's second beta (0.999)", RATE, argument("betas", float)),
    _sets(
        "--adam_weight_decay",
        f"{_OPTIMIZER}.params.weight_decay",
        "its weight decay (0.01)",
        argument("weight_decay", float),
        RATE,
    ),
    _sets("--adam_epsilon", f"{_OPTIMIZER}.params.eps", "its epsilon (1e-8)", argument("eps", float), RATE),
    # Previews.
    _sets(
        "--validation_prompt",
        f"{_PREVIEWS}.prompts",
        "prompt of the previews; {} is the new word",
        group=PREVIEWS,
        value=lambda text: [text],
        metavar="TEXT",
    ),
    _sets("--validation_steps", f"{_PREVIEWS}.batch_frequency", "steps between previews", positive, PREVIEWS),
    _sets(
        "--num_validation_images",
        f"{_PREVIEWS}.images_per_prompt",
        "images of each prompt",
        positive,
        PREVIEWS,
    ),
    Flag(
        ("--report_to",),
        "wandb logs to Weights & Biases in place of TensorBoard; a CSV is always written",
        PREVIEWS,
        choices=("tensorboard", "none", *LOGGERS),
    ),
    # Files.
    _sets(
        "--save_steps",
        "lightning.callbacks.embedding_saver.params.every_n_train_steps",
        "steps between embeddings_gs-N.pt",
        positive,
        SAVING,
    ),
    _sets(
        "--checkpointing_steps",
        "lightning.modelcheckpoint.params.every_n_train_steps",
        "steps between savings of last.ckpt, the state to resume from",
        positive,
        SAVING,
    ),
    _sets(
        "--checkpoints_total_limit",
        "lightning.callbacks.embedding_saver.params.keep",
        "how many embeddings_gs-N.pt are kept (all); last.ckpt is always one",
        positive,
        SAVING,
    ),
    Flag(
        ("--save_as_full_pipeline",),
        "when the run ends, write a pipeline of diffusers too",
        SAVING,
        None,
    ),
    # The hub.
    Flag(("--push_to_hub",), "upload the learned word with a model card at the end", HUB, None),
    Flag(
        ("--hub_model_id",),
        "repository, as OWNER/NAME (default: the name of --output_dir or of the run)",
        HUB,
        metavar="ID",
    ),
    Flag(("--hub_token",), "token (default: that of 'hf auth login' or HF_TOKEN)", HUB, metavar="TOKEN"),
    # What changes nothing here, and why.
    _ignored("--use_8bit_adam", "the optimizer holds the vectors only, a few KB"),
    _ignored("--enable_xformers_memory_efficient_attention", "attention uses torch's fused kernels already"),
    _ignored("--no_safe_serialization", "each word is written as .pt and as .safetensors"),
    _ignored("--only_save_embeds", "the frozen model is not saved"),
    _ignored("--logging_dir", "logs are in the run folder, which --logdir moves", str, metavar="FOLDER"),
    _ignored("--use_auth_token", "the token of 'hf auth login' or HF_TOKEN is used"),
    _ignored("--local_rank", "further processes are started by the run itself, see --gpus", int, metavar="N"),
    # What is refused, and what to do instead.
    _refused("--validation_epochs", "give --validation_steps, in steps"),
    _refused("--optimizer_type", "set model.params.optimizer_config.target to an optimizer of torch"),
)
_BY_NAME = {name: flag for flag in FLAGS for name in flag.names}


def refusal(name: str) -> str | None:
    """The message for a flag that is refused; None for any other."""
    flag = _BY_NAME.get(name)
    return f"{name} is not supported: {flag.instead}" if flag is not None and flag.instead else None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags but the refused ones, in their groups; those that are not given are None or absent."""
    groups: dict[str, Any] = {}
    for flag in FLAGS:
        if flag.instead:
            continue
        name = "other names of flags above" if flag.same_as else flag.group
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        typed: dict[str, Any] = SWITCH
        if flag.choices:
            typed = {"choices": flag.choices}
        elif flag.kind is not None:
            typed = {"type": flag.kind, "metavar": flag.metavar or ("NAME" if flag.kind is str else "N")}
        groups[name].add_argument(
            *flag.names,
            dest=flag.dest,
            default=argparse.SUPPRESS if flag.same_as else None,
            help=flag.help,
            **typed,
        )


def check(options: argparse.Namespace) -> None:
    """Check what flags need beside them.

    Raises:
        UsageError: a package is missing, or two flags exclude each other.
    """
    if options.report_to in LOGGERS and importlib.util.find_spec(options.report_to) is None:
        raise UsageError(
            f"--report_to {options.report_to} needs a package: pip install {options.report_to}, or leave the flag out: "
            "CSV and TensorBoard logs are written"
        )
    if options.report_to in LOGGERS and options.hub_token:
        raise UsageError(
            f"--hub_token would be shown to {options.report_to} with the command line; leave it out and run "
            "'hf auth login' once"
        )
    if options.save_as_full_pipeline and importlib.util.find_spec("diffusers") is None:
        raise UsageError(
            "--save_as_full_pipeline needs diffusers: pip install diffusers, or leave the flag out"
        )
    if (options.local_rank or 0) > 0:
        raise UsageError(
            f"--local_rank {options.local_rank}: start one process, and name the GPUs as --gpus 0,1"
        )
    for flag, needed in (("lr_num_cycles", "cosine_with_restarts"), ("lr_power", "polynomial")):
        if (getattr(options, flag) or 1) != 1 and options.lr_scheduler != needed:
            raise UsageError(f"--{flag} is for --lr_scheduler {needed}; leave it out or give that schedule")


def settings(options: argparse.Namespace, config: DictConfig) -> dict[str, Any]:
    """The dotted YAML keys and values that the given flags set; `config` is the configuration without them.

    Raises:
        UsageError: a flag does not fit the configuration.
    """
    found: dict[str, Any] = {}
    for flag in FLAGS:
        given = getattr(options, flag.dest, None)
        if given is None or not flag.keys:
            continue
        for key in flag.keys:
            # A flag about images must not create a validation set.
            if not key.startswith(_VALIDATION) or OmegaConf.select(config, _VALIDATION):
                found[key] = flag.value(given)
    if options.max_train_steps and options.num_train_epochs:  # as in diffusers' script
        del found["lightning.trainer.max_epochs"]
    found |= _betas(options, config)
    if any(key.startswith(_OPTIMIZER) for key in found):
        target = str(OmegaConf.select(config, f"{_OPTIMIZER}.target") or _ADAMW)
        if "Adam" not in target:
            raise UsageError(
                f"--adam_* flags are for AdamW, and the YAML's optimizer is {target}; leave them out, or give "
                f"{_OPTIMIZER}.target={_ADAMW} too"
            )
        found = {f"{_OPTIMIZER}.target": target} | found
    return found | _tokenizer(options, config)


def keys_of(options: argparse.Namespace) -> dict[str, str]:
    """The YAML keys that the given flags set, with the flags, for messages."""
    given = [flag for flag in FLAGS if getattr(options, flag.dest, None) is not None]
    found = {key: flag.names[0] for flag in given for key in flag.keys}
    betas = (("adam_beta1", "betas[0]"), ("adam_beta2", "betas[1]"))
    return found | {
        f"{_OPTIMIZER}.params.{key}": f"--{name}" for name, key in betas if getattr(options, name)
    }


def _betas(options: argparse.Namespace, config: DictConfig) -> dict[str, Any]:
    given = (options.adam_beta1, options.adam_beta2)
    if given == (None, None):
        return {}
    before = OmegaConf.select(config, f"{_OPTIMIZER}.params.betas") or (0.9, 0.999)
    both = [old if new is None else new for old, new in zip(before, given, strict=True)]
    return {f"{_OPTIMIZER}.params.betas": both}


def _tokenizer(options: argparse.Namespace, config: DictConfig) -> dict[str, Any]:
    name, model = options.tokenizer_name, options.actual_resume or config.get("actual_resume")
    if name is None or name == model:
        return {}
    if model is not None and (
        is_hub_id(str(model)) or not str(model).endswith((".ckpt", ".safetensors", ".pt"))
    ):
        raise UsageError(
            f"--tokenizer_name '{name}': a folder of diffusers is used with its own tokenizer, so that words mean what "
            "its text encoder learned; leave the flag out"
        )
    return {_TOKENIZER: name}


def replaced(options: argparse.Namespace, config: DictConfig) -> dict[str, dict[str, Any] | None]:
    """The nodes of the configuration that the given flags replace as a whole, by their dotted keys.

    Raises:
        UsageError: a flag does not fit the configuration.
    """
    found: dict[str, dict[str, Any] | None] = {}
    if (node := _schedule(options, config)) is not None:
        found[_SCHEDULER] = node or None
    if options.report_to:
        target, before = LOGGERS.get(options.report_to), OmegaConf.select(config, "lightning.logger.target")
        if before != target:
            node = {"target": target, "params": {"project": "textual_inversion"}} if target else None
            found["lightning.logger"] = node
    return found


def _schedule(options: argparse.Namespace, config: DictConfig) -> dict[str, Any] | None:
    """The `scheduler_config` that --lr_scheduler and --lr_warmup_steps ask for, given that of `config`.

    Returns:
        the node, {} for a constant rate, or None if it stays as it is.

    Raises:
        UsageError: the YAML's schedule has no warm-up, or its rate is a schedule by steps.
    """
    name, warm_up = options.lr_scheduler, options.lr_warmup_steps
    if name is None and warm_up is None:
        return None
    rate = OmegaConf.select(config, "model.base_learning_rate")
    asked = f"--lr_scheduler {name}" if name else f"--lr_warmup_steps {warm_up}"
    if isinstance(rate, str) and options.learning_rate is None:
        raise UsageError(f"{asked}: the YAML's rate '{rate}' is a schedule already; give --learning_rate too")
    before = OmegaConf.select(config, _SCHEDULER)
    if name is None:
        if before is None:
            return _named("constant_with_warmup", warm_up) if warm_up else None
        node: dict[str, Any] = OmegaConf.to_container(before)  # type: ignore[assignment]
        params = node.get("params") or {}
        if "warm_up_steps" not in params:
            if not warm_up:
                return None
            raise UsageError(
                f"{asked}: the YAML's schedule {node['target']} has no warm-up; give --lr_scheduler too, as linear"
            )
        old = params["warm_up_steps"]
        return node | {
            "params": params | {"warm_up_steps": [warm_up, *old[1:]] if isinstance(old, list) else warm_up}
        }
    if name == "constant":
        return {}
    further = {"num_cycles": options.lr_num_cycles or 1} if name == "cosine_with_restarts" else {}
    further |= {"power": options.lr_power or 1.0} if name == "polynomial" else {}
    return _named(name, warm_up or 0, **further)


def _named(name: str, warm_up: int, **further: Any) -> dict[str, Any]:
    if name not in SCHEDULES[:2]:
        further["max_decay_steps"] = None
    return {"target": SCHEDULE, "params": {"name": name, "warm_up_steps": warm_up, **further}}


def notes(options: argparse.Namespace, config: DictConfig) -> list[str]:
    """What is to be said of given flags: those that change nothing, and what they leave as it is.

    `config` is the configuration of the run.
    """
    lines = []
    for flag in FLAGS:
        if flag.ignored and getattr(options, flag.dest, None) not in (None, False):
            lines.append(f"{flag.names[0]} changes nothing: {flag.ignored}")
    if options.report_to in ("tensorboard", "none"):
        lines.append(
            f"--report_to {options.report_to} needs no setting: CSV and TensorBoard logs are in the run folder"
        )
    if options.lr_scheduler == "constant" and options.lr_warmup_steps:
        lines.append(
            f"--lr_warmup_steps {options.lr_warmup_steps} changes nothing: a constant rate has no warm-up; "
            "--lr_scheduler constant_with_warmup has one"
        )
    elif (
        options.lr_warmup_steps == 0
        and options.lr_scheduler is None
        and not OmegaConf.select(config, _SCHEDULER)
    ):
        lines.append("--lr_warmup_steps 0 changes nothing: the rate has no schedule")
    model = str(config.get("actual_resume"))
    if options.tokenizer_name == model:
        lines.append("--tokenizer_name changes nothing: it is the model's own")
    if options.revision and not is_hub_id(model):
        lines.append(f"--revision changes nothing: '{model}' is no hub id")
    if options.variant and not is_hub_id(model) and not Path(model).is_dir():
        lines.append(f"--variant changes nothing: '{model}' is a single file")
    if options.num_train_epochs and options.max_train_steps:
        lines.append(
            f"--num_train_epochs {options.num_train_epochs} changes nothing: --max_train_steps is given"
        )
    elif options.num_train_epochs and "max_steps" not in options.trainer:
        steps = OmegaConf.select(config, "lightning.trainer.max_steps")
        if steps not in (None, -1):
            lines.append(
                f"the run ends after {options.num_train_epochs} epochs, or after the YAML's {steps} steps if these are "
                "fewer; --max_steps -1 lifts that limit"
            )
    if options.hub_model_id and not options.push_to_hub:
        lines.append("--hub_model_id changes nothing without --push_to_hub")
    if options.hub_token and not options.push_to_hub:
        lines.append("--hub_token changes nothing without --push_to_hub")
    return lines


def rate_note(options: argparse.Namespace, scheduler: Mapping[str, Any] | None) -> str | None:
    """The line that says that a rate of the command line keeps the schedule of the YAML; None if it does not."""
    key = "model.base_learning_rate="
    given = options.learning_rate is not None or any(word.startswith(key) for word in options.overrides)
    if not given or scheduler is None or options.lr_scheduler is not None:
        return None
    name = str(scheduler["target"]).rpartition(".")[2]
    if name == "LambdaStepScheduler":  # the rate itself is the schedule
        return None
    return f"the given rate keeps the schedule of the YAML, {name}; --lr_scheduler constant makes it constant"
