"""The console command `textual-inversion` with its subcommands, and the training command, which is main.py."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from ldm.commands.base import guarded
from ldm.console import Parser
from ldm.words import check_text

# Subcommand: the function "module:name" that runs it, and its line in the help text. Each is called as
# `function(argv, prog)` and returns the exit code.
COMMANDS = {
    "train": ("ldm.commands.entry:train", "learn the vectors of a new word from a few images (main.py)"),
    "generate": ("ldm.commands.generate:main", "generate images from prompts (scripts/txt2img.py)"),
    "embeddings": (
        "ldm.commands.embeddings:main",
        "inspect, convert, merge and split embedding files (scripts/embeddings.py)",
    ),
    "evaluate": ("ldm.commands.evaluate:main", "measure learned concepts (scripts/evaluate_model.py)"),
    "studio": ("ldm.studio.server:main", "open the page to train and generate in (scripts/studio.py)"),
    "export": ("ldm.commands.export:main", "write a diffusers pipeline (scripts/export_diffusers.py)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `textual-inversion SUBCOMMAND ...`; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _dispatch(argv))


def _dispatch(argv: list[str]) -> int:
    parser = Parser(
        prog="textual-inversion",
        description="Textual inversion on frozen latent diffusion models.",
        epilog="\n".join(
            ["commands:", *(f"  {name:<12}{help}" for name, (_, help) in COMMANDS.items())]
            + ["", "%(prog)s COMMAND --help lists the options of a command."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    # Only the first word is parsed here: the rest belongs to the command, which has a parser of its own.
    name = parser.parse_args(argv[:1]).command
    module, _, function = COMMANDS[name][0].partition(":")
    run = getattr(importlib.import_module(module), function)
    return int(run(argv[1:], f"{parser.prog} {name}"))


def train(argv: Sequence[str] | None = None, prog: str = "main.py") -> int:
    """Run the command line of main.py; returns the exit code, after one line on stderr if the run failed."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv or "-d" in argv
    return guarded(
        lambda: _train(argv, prog, debug),
        debug,
        less_memory="configs/recipes/low-memory.yaml as one more --base",
    )


def _train(argv: Sequence[str], prog: str, debug: bool) -> int:
    from ldm import console
    from ldm.training import command_line

    for argument in argv:  # the run's YAML could not hold it
        check_text(argument, "the argument")
    with console.importing():
        options = command_line.parse(argv, prog)
        # Classes that a YAML names as a target may lie in the folder where the command is typed.
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        from ldm.training import config

        config.check_command_line(options)
        # Torch and Lightning, which take seconds, are imported when nothing is wrong with the command line.
        from ldm.training.run import run

    console.set_up_logging(debug)
    if not debug:
        console.quieten_lightning()
    return run(argv, prog)
