"""What messages call a setting: in Python, in a command line and on the page."""

from __future__ import annotations

import ast
import inspect
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytorch_lightning as pl

import ldm
from ldm import front_ends, generate
from ldm.commands import embeddings, evaluate, export
from ldm.commands.base import guarded
from ldm.commands.generate import Profile, make_parser
from ldm.front_ends import NAMES, setting, speaking_as
from ldm.generate.images import generate as generate_images
from ldm.generate.request import check_mentions
from ldm.studio import server
from ldm.training import command_line
from ldm.training.inversion import Inversion
from ldm.util import UserError

ROOT = Path(__file__).resolve().parents[1]
_FLAG = re.compile(r"(?<![\w-])(?:--[a-zA-Z]\w*|-r\b)")
# Files whose messages only a command line shows, or that build command lines.
_OF_COMMANDS = ("ldm/commands/", "ldm/training/callbacks/", "ldm/studio/server.py", "ldm/studio/workspace.py")
_OF_COMMANDS += (
    "ldm/training/command_line.py",
    "ldm/training/flags.py",
    "ldm/training/hub.py",
    "ldm/console.py",
)
_OF_COMMANDS += ("ldm/training/trainer.py", "ldm/training/inversion.py", "ldm/front_ends.py")
_OF_COMMANDS += ("ldm/training/learning_rate.py",)  # a line of the log


def said(front_end: str) -> str:
    with speaking_as(front_end), pytest.raises(UserError) as caught:
        check_mentions(["a <cat>"], [])
    return str(caught.value)


def test_each_front_end_names_a_setting_as_its_user_knows_it():
    assert "load its file with words=, or" in said("python")
    assert "load its file with --embedding_path, or" in said("command")
    assert "load its file with the field 'Words', or" in said("page")
    assert "with words=" in str(UserError(f"with {setting('words')}")), "Python without further ado"


def test_a_detail_is_put_where_the_front_end_has_it():
    for front_end, expected in (("python", '{"<a>": "cat"}'), ("command", "'<a>=cat'")):
        with speaking_as(front_end):
            assert expected in str(UserError(f"name it, as in {setting('class_word', '<a>')}"))


def test_an_error_that_holds_another_keeps_the_names():
    with speaking_as("command"):
        inner = UserError(f"bring one with {setting('vae')}")
        assert str(UserError(f"'m.ckpt': {inner}")) == "'m.ckpt': bring one with --vae"


def test_commands_name_flags_in_all_threads_and_the_processes_of_the_page_its_fields(monkeypatch, capsys):
    def command() -> None:
        lines: list[str] = []
        thread = threading.Thread(target=lambda: lines.append(str(UserError(setting("words")))))
        thread.start()
        thread.join()
        raise UserError(f"{lines[0]} {setting('init')}")

    assert guarded(command) == 1
    assert capsys.readouterr().err == "error: --embedding_path --init_word\n"
    monkeypatch.setenv(front_ends.VARIABLE, "page")
    assert guarded(command) == 1
    assert capsys.readouterr().err == "error: the field 'Words' 'Starts from'\n"
    assert str(UserError(setting("words"))) == "words=", "the command's end is the end of its names"


def test_every_name_exists():
    parsers = [make_parser(Profile(), ""), embeddings._make_parser(""), export._make_parser("")]
    helps = [parser.format_help() for parser in parsers] + [evaluate.make_parser("").format_help()]
    source = "".join(inspect.getsource(module) for module in (command_line, embeddings, server))
    source += "".join(helps) + " ".join(f"--{name}" for name in inspect.signature(pl.Trainer).parameters)
    arguments = set(Inversion.__dataclass_fields__) | {"recipe"}
    for call in (ldm.invert, generate.text_to_image, generate_images, generate.Session):
        arguments |= set(inspect.signature(call).parameters)
    from ldm.embeddings import merge

    arguments |= set(inspect.signature(merge).parameters)
    page = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "ldm/studio").glob("*.py"))
    for names in NAMES.values():
        for flag in _FLAG.findall(" ".join(names)):
            assert re.search(rf"{flag}\b", source), flag
        for argument in re.findall(r"(\w+)=", re.sub(r"\{.*\}", "", names.python)):
            assert argument in arguments, argument
        for label in re.findall(r"'([^']+)'", "" if "scripts/" in names.page else names.page):
            assert f'"{label}' in page, label


def texts(tree: ast.AST) -> Iterator[ast.Constant]:
    """The texts of a module that messages may consist of: no docstrings, log lines or errors of a command line."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.startswith("logger.") or name == "UsageError" or name == "setting":
                skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node


def test_no_message_of_the_library_names_a_flag():
    """A visitor of the page has none, nor has a caller in Python: `setting` names what they have."""
    found = []
    for path in sorted((ROOT / "ldm").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(_OF_COMMANDS):
            continue
        for text in texts(ast.parse(path.read_text(encoding="utf-8"))):
            # A word alone is part of a command line, and a whole command is one for everybody who has a shell.
            if not re.search(r"scripts/|main\.py|pip install", text.value) and re.search(
                rf"{_FLAG.pattern}.* |.* {_FLAG.pattern}", text.value
            ):
                found.append(f"{name}:{text.lineno}: {text.value}")
    assert "\n".join(found) == ""
