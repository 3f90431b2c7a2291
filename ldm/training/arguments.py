"""The command line of a training run: the original's flags, Lightning's, and other tools' spellings."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from collections.abc import Sequence
from typing import Any

from pytorch_lightning import Trainer

from ldm.options import Parser, boolean
from ldm.training.config import RUN_KEYS, is_number, yaml_value
from ldm.training.foreign_flags import ELSEWHERE, add_foreign_flags
from ldm.training.old_trainer_keys import OLD_TRAINER_KEYS
from ldm.util import UsageError

# A dotted key, or one of the keys that a run's YAML has at its top level, followed by "=".
OVERRIDE = re.compile(rf"(--)?((model|data|lightning)\.[\w.\[\]-]+|{'|'.join(RUN_KEYS)})=")


def trainer_options() -> list[str]:
    """The keyword names that Lightning's Trainer takes, in its order."""
    return list(inspect.signature(Trainer).parameters)


def make_parser() -> Parser:
    parser = Parser(
        prog="main.py",
        description="Learn the vectors of a new word from a few images, or train a model from a YAML.",
        epilog="Any key of the YAMLs is set by a dotted override, as model.base_learning_rate=1e-3; any option "
        "of Lightning's Trainer by a flag of its name, as --max_steps 500. "
        "Ends with 0, with 1 after an error, 2 after a wrong command line, 130 after Ctrl-C, 143 after SIGTERM; "
        "after the last two everything learned is saved and -r LOGDIR goes on. SIGUSR1 saves and goes on.",
        allow_abbrev=False,
    )
    switch: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True}
    run = parser.add_argument_group("the run")
    run.add_argument("-b", "--base", nargs="*", default=[], metavar="YAML", help="merged from left to right")
    run.add_argument(
        "-t", "--train", default=False, **switch, help="train; without it the run is only checked"
    )
    run.add_argument("--no-test", default=False, **switch, help="skip the test loop of a model that has one")
    run.add_argument("-s", "--seed", type=int, help="seed of everything random (23)")
    run.add_argument("-d", "--debug", default=False, **switch, help="show tracebacks and all log messages")
    run.add_argument(
        "--gpus", help='"0," is GPU 0, "0,1" both, "2" any two, "-1" all, "0" none (default: one)'
    )
    run.add_argument("--scale_lr", default=None, **switch, help="rate x batch x GPUs x accumulation (true)")

    folder = parser.add_argument_group("the run folder")
    folder.add_argument("-n", "--name", default="", help="end of the folder's name (default: the YAML's)")
    folder.add_argument("-f", "--postfix", default="", help="appended to the name")
    folder.add_argument("-l", "--logdir", default="logs", help="where run folders are made")
    folder.add_argument("-p", "--project", default="", help="a new name, or an existing run folder to resume")
    folder.add_argument("--datadir_in_name", default=True, **switch, help="start the name with the data's")
    folder.add_argument(
        "-r", "--resume", default="", metavar="LOGDIR", help="go on with a run folder or ckpt"
    )

    concept = parser.add_argument_group("the concept (each may also stand in the YAML)")
    concept.add_argument("--actual_resume", metavar="CKPT", help="checkpoint of the frozen model")
    concept.add_argument("--data_root", metavar="FOLDER", help="folder with the training images")
    concept.add_argument("--placeholder_string", metavar="TEXT", help="the new word, as * or <my-cat>")
    concept.add_argument("--init_word", metavar="TEXT", help="word or phrase that the vectors start from")
    concept.add_argument("--embedding_manager_ckpt", metavar="FILE", help="embedding file to start from")

    add_foreign_flags(parser.add_argument_group("other tools' names for the same"))
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line.

    The result holds every flag by its name and, further, `overrides` (a list of "dotted.key=value") and
    `trainer` (options for Lightning's Trainer). Raises UsageError, with the nearest name for a misspelt flag.
    """
    # An override must not be read as one more --base file or as the value of -t, so these go first. A flag
    # of its own, as --data_root=x, is none.
    flags = {f"--{key}" for key in RUN_KEYS}
    is_override = [bool(OVERRIDE.match(word)) and word.partition("=")[0] not in flags for word in argv]
    words = [word for word, taken in zip(argv, is_override, strict=True) if not taken]
    options, rest = make_parser().parse_known_args(words)
    options.overrides = [
        word.removeprefix("--") for word, taken in zip(argv, is_override, strict=True) if taken
    ]
    options.trainer = _trainer_flags(rest)
    if options.name and options.resume:
        raise UsageError("-n/--name and -r/--resume exclude each other: a resumed run keeps its folder")
    return options


def _trainer_flags(words: Sequence[str]) -> dict[str, Any]:
    known = {*trainer_options(), *OLD_TRAINER_KEYS}
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
    if flag in ELSEWHERE:
        return f"{flag} has no counterpart here: {ELSEWHERE[flag]}"
    if not flag.startswith("-"):
        return f"'{flag}' is neither a flag nor an override; overrides read model.params.key=value"
    flags = [option for action in make_parser()._actions for option in action.option_strings]
    near = difflib.get_close_matches(flag, flags + [f"--{name}" for name in known], n=1)
    return f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else " (see --help)")
