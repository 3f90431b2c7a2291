"""The command line of a training run: the original's flags, Lightning's, and aliases of other tools."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ldm.console import Parser
from ldm.files import in_checkout
from ldm.front_ends import setting
from ldm.training import flags
from ldm.util import UsageError, shown
from ldm.yaml_files import is_number, place_in, yaml_value

# Options of Lightning 0.x and 1.x -> their current names; None if there is no such option any more.
OLD_TRAINER_KEYS: dict[str, str | None] = {
    "gpus": "gpus",
    "num_processes": "devices",
    "nb_gpu_nodes": "num_nodes",
    "distributed_backend": "strategy",
    "replace_sampler_ddp": "use_distributed_sampler",
    "checkpoint_callback": "enable_checkpointing",
    "weights_summary": "enable_model_summary",
    "progress_bar_refresh_rate": "enable_progress_bar",
    "show_progress_bar": "enable_progress_bar",
    "reload_dataloaders_every_epoch": "reload_dataloaders_every_n_epochs",
    "row_log_interval": "log_every_n_steps",
    "add_row_log_interval": "log_every_n_steps",
    "max_nb_epochs": "max_epochs",
    "min_nb_epochs": "min_epochs",
    "nb_sanity_val_steps": "num_sanity_val_steps",
    "train_percent_check": "limit_train_batches",
    "val_percent_check": "limit_val_batches",
    "test_percent_check": "limit_test_batches",
    "overfit_pct": "overfit_batches",
    "gradient_clip": "gradient_clip_val",
    "use_amp": "precision",
    "resume_from_checkpoint": None,
    "terminate_on_nan": None,
    "print_nan_grads": None,
    "flush_logs_every_n_steps": None,
    "log_save_interval": None,
    "auto_select_gpus": None,
    "auto_scale_batch_size": None,
    "auto_lr_find": None,
    "amp_backend": None,
    "amp_level": None,
    "prepare_data_per_node": None,
    "track_grad_norm": None,
    "move_metrics_to_cpu": None,
    "log_gpu_memory": None,
    "stochastic_weight_avg": None,
    "process_position": None,
    "truncated_bptt_steps": None,
    "multiple_trainloader_mode": None,
    "automatic_optimization": None,
    "enable_pl_optimizer": None,
    "early_stop_callback": None,
    "progress_bar_callback": None,
    "training_tqdm_dict": None,
    "weights_save_path": None,
    "default_save_path": None,
    "tpu_cores": None,
    "num_tpu_cores": None,
    "ipus": None,
    "hpus": None,
}

# Top-level keys of a YAML beside model, data and lightning, and their types; flags of the same names replace them.
RUN_TYPES: dict[str, Any] = {
    "actual_resume": str | None,
    "vae": str | None,
    "data_root": str | Mapping[str, str] | None,
    "embedding_manager_ckpt": str | None,
    "placeholder_string": str | None,
    "init_word": str | None,
    "seed": int,
    "scale_lr": bool,
    "revision": str | None,
    "variant": str | None,
    "allow_tf32": bool | None,
}
RUN_KEYS = tuple(RUN_TYPES)
# A dotted key, or one of RUN_KEYS, followed by "=".
OVERRIDE = re.compile(rf"(--)?((model|data|lightning)\.[\w.\[\]-]+|{'|'.join(RUN_KEYS)})=")
# The same without the key that it lies under.
_ROOTLESS = re.compile(r"(trainer|base_learning_rate)\b[\w.]*=")


# The arguments of Lightning's Trainer; the class itself takes seconds to import.
_TRAINER = """
    accelerator strategy devices num_nodes precision logger callbacks fast_dev_run max_epochs min_epochs max_steps
    min_steps max_time limit_train_batches limit_val_batches limit_test_batches limit_predict_batches overfit_batches
    val_check_interval check_val_every_n_epoch num_sanity_val_steps log_every_n_steps enable_checkpointing
    enable_progress_bar enable_model_summary accumulate_grad_batches gradient_clip_val gradient_clip_algorithm
    deterministic benchmark inference_mode use_distributed_sampler profiler detect_anomaly barebones plugins
    sync_batchnorm reload_dataloaders_every_n_epochs default_root_dir enable_autolog_hparams model_registry
"""
TRAINER_OPTIONS = tuple(_TRAINER.split())
# Without Lightning's float64: the text encoders and the images are float32.
_PRECISIONS = Literal[
    16,
    32,
    "16",
    "32",
    "bf16",
    "16-mixed",
    "bf16-mixed",
    "32-true",
    "16-true",
    "bf16-true",
    "transformer-engine",
    "transformer-engine-float16",
]
# The types of those whose annotations in Lightning's source need Lightning itself.
TRAINER_TYPES: dict[str, Any] = {
    "precision": _PRECISIONS,
    "max_time": str | Mapping[str, int],
    "val_check_interval": int | float | str | Mapping[str, int],
    "deterministic": bool | Literal["warn"],
    "profiler": str,
}
# Values of `accelerator`; and of `accelerator` and `strategy` of Lightning 1.x -> those of `strategy`.
ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")
OLD_STRATEGIES = {"ddp_spawn": "ddp_spawn"} | dict.fromkeys(
    ("ddp", "ddp2", "dp", "horovod", "ddp_cpu", "ddp_sharded"), "ddp"
)
# What lightning.trainer may hold.
TRAINER_KEYS = (*TRAINER_OPTIONS, *OLD_TRAINER_KEYS)


def make_parser(prog: str = "main.py") -> Parser:
    """The parser for all flags except the options of Lightning's Trainer."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s --base YAML [YAML ...] -t [flags] [model.params.KEY=VALUE ...]\n"
        "       %(prog)s --pretrained_model_name_or_path MODEL --train_data_dir FOLDER [flags]",
        description="Learn the vectors of a new word from a few images, or train a model from a YAML.",
        epilog="A dotted override sets any key of the YAMLs, such as model.base_learning_rate=1e-3; a flag sets any "
        "option of Lightning's Trainer, such as --max_steps 500. "
        "Exit codes: 0, 1 after an error, 2 for a wrong command line, 130 after Ctrl-C, 143 after SIGTERM; after the "
        "last two everything is saved and -r LOGDIR resumes the run. SIGUSR1 saves and continues.",
        allow_abbrev=False,
    )
    run = parser.add_argument_group("the run")
    run.add_argument(
        "-b",
        "--base",
        nargs="*",
        type=in_checkout,
        default=[],
        metavar="YAML",
        help="merged from left to right (default: that of the model)",
    )
    run.add_argument(
        "-t",
        "--train",
        default=None,
        **flags.SWITCH,
        help="train; with --base and without -t the configuration is only checked",
    )
    run.add_argument(
        "--no-test", default=False, **flags.SWITCH, help="do not run the test loop of a model that has one"
    )
    run.add_argument("-s", "--seed", type=int, metavar="N", help="seed of all random numbers (23)")
    run.add_argument(
        "-d", "--debug", default=False, **flags.SWITCH, help="show tracebacks and all log messages"
    )
    run.add_argument(
        "--gpus",
        metavar="GPUS",
        help='"0," is GPU 0, "0,1" GPUs 0 and 1, "2" any two, "-1" all, "0" none (default: one)',
    )
    run.add_argument(
        "--scale_lr", default=None, **flags.SWITCH, help="rate x batch x GPUs x accumulation (true)"
    )

    folder = parser.add_argument_group("the run folder")
    folder.add_argument(
        "-n",
        "--name",
        default="",
        metavar="NAME",
        help="end of the folder's name (default: that of the YAML)",
    )
    folder.add_argument("-f", "--postfix", default="", metavar="TEXT", help="appended to the name")
    folder.add_argument("-l", "--logdir", default="logs", metavar="FOLDER", help="parent of the run folders")
    folder.add_argument(
        "-p", "--project", default="", metavar="NAME", help="a new name, or an existing run folder to resume"
    )
    folder.add_argument(
        "--datadir_in_name", default=True, **flags.SWITCH, help="start the name with that of the data folder"
    )
    folder.add_argument("-r", "--resume", default="", metavar="LOGDIR", help="resume a run folder or ckpt")

    concept = parser.add_argument_group("the concept (also as keys of the YAML)")
    concept.add_argument("--actual_resume", metavar="MODEL", help="frozen model: a file, folder or hub id")
    concept.add_argument("--vae", metavar="MODEL", help="first stage in place of the model's own")
    concept.add_argument("--data_root", metavar="FOLDER", help="folder with the training images")
    concept.add_argument("--placeholder_string", metavar="TEXT", help="the new word, as * or <my-cat>")
    concept.add_argument("--init_word", metavar="TEXT", help="word or phrase that the vectors start from")
    concept.add_argument("--embedding_manager_ckpt", metavar="FILE", help="embedding file to start from")

    flags.add_flags(parser)
    return parser


def parse(argv: Sequence[str], prog: str = "main.py") -> argparse.Namespace:
    """Read a command line.

    The result holds every flag by its name, `overrides` (a list of "dotted.key=value") and `trainer` (options for
    Lightning's Trainer).

    Raises:
        UsageError: the command line is wrong; for a misspelt flag, the error has the nearest name.
    """
    # Overrides are removed first: argparse would read one as another --base file or as the value of -t. Flags such as
    # --data_root=x are not overrides.
    own = {f"--{key}" for key in RUN_KEYS}
    is_override = [bool(OVERRIDE.match(word)) and word.partition("=")[0] not in own for word in argv]
    words = [word for word, taken in zip(argv, is_override, strict=True) if not taken]
    for word in words:
        if (near := _ROOTLESS.match(word)) and word.partition("=")[0] not in own:
            root = {"trainer": "lightning", "base_learning_rate": "model"}[near[1]]
            raise UsageError(f"'{shown(word)}' is no override of a YAML's key; write {root}.{shown(word)}")
    options, rest = make_parser(prog).parse_known_args(words)
    options.overrides = [
        word.removeprefix("--") for word, taken in zip(argv, is_override, strict=True) if taken
    ]
    options.trainer = _trainer_flags(rest)
    flags.check(options)
    # For messages: the name under which the run to resume was given.
    options.resume_flag = next((w.partition("=")[0] for w in words if w.startswith("--resume")), "-r")
    return options


def parse_gpus(gpus: Any) -> int | list[int] | None:
    """Read `--gpus` as Lightning 1.x does: "0," and "0,1" and lists are indices, "2" is a count, -1 is all.

    Returns None if it is not given, and 0 for no GPU.

    Raises:
        UsageError: it is none of these.
    """
    if gpus is None or gpus == "":
        return None
    found = _indices_or_count(gpus)
    if (isinstance(found, int) and found < -1) or (isinstance(found, list) and any(i < 0 for i in found)):
        raise UsageError(f"--gpus '{gpus}' is negative; write -1 for all GPUs")
    return found


def accelerator_kind(accelerator: Any) -> str:
    """The lower-case name of an accelerator; "auto" for None, and for a strategy of Lightning 1.x its name.

    Raises:
        UsageError: there is no such accelerator.
    """
    kind = str(accelerator or "auto").lower()
    if kind not in ACCELERATORS and kind not in OLD_STRATEGIES:
        raise UsageError(f"accelerator is '{accelerator}'; choose one of {', '.join(ACCELERATORS)}")
    return kind


def _indices_or_count(gpus: Any) -> int | list[int]:
    try:
        if isinstance(gpus, str):
            text = gpus.strip()
            if "," not in text and not text.startswith("["):
                return int(text)
            text = text.removeprefix("[").removesuffix("]")
            return [int(part) for part in text.split(",") if part.strip()]
        if isinstance(gpus, bool):
            return int(gpus)
        return gpus if isinstance(gpus, int) else [int(part) for part in gpus]
    except (TypeError, ValueError):
        raise UsageError(
            f'--gpus \'{gpus}\' is not understood; write "0," for GPU 0, "0,1" for two, "-1" for all'
        ) from None


def _trainer_flags(words: Sequence[str]) -> dict[str, Any]:
    known = {*TRAINER_KEYS}
    found: dict[str, Any] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        flag, has_value, value = word.partition("=")
        name = flag.lstrip("-")
        if not word.startswith("--") or name not in known:
            raise UsageError(_unknown(flag, known))
        if not has_value:
            follows = bool(queue) and (not queue[0].startswith("-") or is_number(queue[0]))
            value = queue.pop(0) if follows else "true"
        found[name] = yaml_value(value)
    return found


def _unknown(flag: str, known: set[str]) -> str:
    if refusal := flags.refusal(flag):
        return refusal
    if not flag.startswith("-"):
        return f"'{flag}' is neither a flag nor an override; write an override as model.params.key=value"
    names = [option for action in make_parser()._actions for option in action.option_strings]
    near = difflib.get_close_matches(flag, names + [f"--{name}" for name in known], n=1)
    return f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else " (see --help)")


def places(
    options: argparse.Namespace, yamls: Sequence[str | Path], saved: Sequence[str | Path] = ()
) -> Callable[[str], str]:
    """A function that says where a key of the configuration of a run was set: a flag, or a YAML and its line.

    Overrides have no place, because they are typed with their key.
    """

    set_by = flags.keys_of(options)

    def place(key: str) -> str:
        if key in set_by:
            return setting("typed", set_by[key])
        if getattr(options, key.removeprefix("lightning.trainer."), None) is not None and key in RUN_KEYS:
            return setting("typed", f"--{key}")
        for override in options.overrides:
            name = override.partition("=")[0]
            if key == name or key.startswith((f"{name}.", f"{name}[")):
                return ""
        name = key.rpartition(".")[2]
        if name in options.trainer and key == f"lightning.trainer.{name}":
            return setting("typed", f"--{name}")
        return place_in([*saved, *yamls], key)

    return place
