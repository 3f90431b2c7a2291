"""Read YAML files, and single values with the rules of YAML."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)
from yaml.reader import ReaderError

from ldm.files import FOLDERS, in_checkout
from ldm.util import ConfigError, Problem, raise_problems, shown_value

LARGEST = 2**20  # bytes of a YAML; the largest shipped one has 6 KB


def read_yaml(path: str | Path) -> DictConfig:
    """Read one YAML file; paths in it that lead nowhere from here are found (see `find_paths`).

    Raises:
        ConfigError: it does not exist or is not a YAML; with the line and column, and what to write instead.
    """
    path = Path(in_checkout(str(path)))
    if not path.is_file():
        kind = "is a folder, not a YAML" if path.is_dir() else "does not exist"
        raise ConfigError(f"no such YAML: '{path}' {kind}; check the path")
    node = parse_yaml(_text_of(path), f"'{path}'")
    find_paths(node, [path.parent])
    return node


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read ({error.strerror}); check its permissions") from error
    if len(content) > LARGEST:
        raise ConfigError(f"'{path}' is no YAML: it has more than {LARGEST} bytes; check the path")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"'{path}' is in UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise ConfigError(
            f"'{path}', line {line}, column {column} is not a valid YAML: the byte 0x{content[error.start]:02x} is not "
            "UTF-8; save the file as UTF-8, or check that it is a YAML"
        ) from error


def parse_yaml(text: str, name: str) -> DictConfig:
    """The mapping that a text holds; `name` is what messages call it.

    Raises:
        ConfigError: it is not a YAML, or not a mapping.
    """
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if space := re.match(r" *[\u00a0\u2000-\u200b\u3000\ufeff]", line):
            raise _syntax_error(name, number, space.end() - 1, "this space is no plain space; type it anew")
    try:
        node = OmegaConf.load(io.StringIO(text))
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(name, *_explained(error, lines)) from error
    except ReaderError as error:
        before = text[: error.position]
        column = len(before) - before.rfind("\n") - 1
        why = f"the control character {_code(error.character)} is not allowed; remove it"
        raise _syntax_error(name, before.count("\n"), column, why) from error
    except RecursionError as error:
        raise ConfigError(f"{name} is not a valid YAML: it is nested too deeply") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        key = str(getattr(error, "full_key", None) or "")
        place = f", line {found} ({key})" if (found := line_of(text, key)) else ""
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, GrammarParseError):
            why = "this is no interpolation ${key}; write \\${ for these letters"
        raise ConfigError(f"{name}{place} is not a valid YAML: {why}") from error
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{name} must hold a mapping (model:, data:, lightning:), not a list")
    if not node:
        raise ConfigError(f"{name} is empty; write keys such as model:, data: or lightning:")
    if not re.search(r":\s|:$", text):
        raise ConfigError(f"{name} is not a valid YAML: it holds no key; write key: value")
    _check_backslashes(node, text, name)
    return node


def _code(character: Any) -> str:
    return f"0x{character if isinstance(character, int) else ord(character):02x}"


def _syntax_error(name: str, line: int, column: int, why: str) -> ConfigError:
    return ConfigError(f"{name}, line {line + 1}, column {column + 1} is not a valid YAML: {why}")


# A value that begins with a quote and does not end in its line.
_OPEN_QUOTE = re.compile(r"""(\s*(?:- +)?[\w.]+:\s+|\s*- +)(["'])(?:(?!\2).)*$""")
_NO_COLON = re.compile(r"\s*\w[^:#]*(#.*)?$")


def _explained(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, int, str]:
    """The line and column, from 0, of a mistake, and what to write instead."""
    problem, context = error.problem or "", error.context or ""
    mark, start = error.problem_mark or error.context_mark, error.context_mark or error.problem_mark
    if mark is None or start is None:
        return 0, 0, problem
    line = lines[mark.line] if mark.line < len(lines) else ""
    here = mark.line, mark.column
    rest = line[mark.column :]
    quotes = ((n, _OPEN_QUOTE.match(text)) for n, text in enumerate(lines[: mark.line]))
    if quote := next(((n, found.start(2)) for n, found in quotes if found), None):
        return (*quote, "this quote is not closed")
    if indent := re.match(r" *\t", line):
        return mark.line, indent.end() - 1, "a tab indents the line; use spaces"
    if rest.startswith("\t"):
        return (*here, "a tab separates key and value; use a space")
    if "scanning an alias" in context or "undefined alias" in problem:
        word = re.match(r"\*[^\s,\]}]*", lines[start.line][start.column :])
        name = word[0] if word else "*"
        return start.line, start.column, f'{name} needs quotes: "{name}"'
    if "cannot start any token" in problem:
        return (*here, f'a text that begins with {rest[:1]} needs quotes: "{rest[:1]}..."')
    if "quoted scalar" in context and "end of stream" not in problem:
        return (*here, r"a backslash in double quotes is an escape; use single quotes, 'C:\...', or C:/...")
    if "quoted scalar" in context:
        return start.line, start.column, "this quote is not closed"
    if any(part in context for part in ("anchor", "tag", "block scalar")) or " tag " in problem:
        first = lines[start.line][start.column : start.column + 1]
        return start.line, start.column, f"a text that begins with {first} needs quotes"
    if "flow" in context:
        row, column = start.line, start.column
        if row >= len(lines):  # the end of the text is named; the bracket is the last one
            opened = [(n, m.start()) for n, text in enumerate(lines) for m in re.finditer(r"[\[{]", text)]
            row, column = opened[-1] if opened else (row, column)
        return row, column, "this bracket is not closed, or a comma is missing"
    if "duplicate key" in problem:
        key = problem.removeprefix("found duplicate key").strip()
        return (*here, f"the key '{key}' is there twice; remove one")
    if "recursive" in problem or "expan" in problem:
        return (*here, "references that hold themselves, or very many others; write the values out")
    if "single document" in context:
        return (*here, "a second document begins after ---; keep one in a file")
    if "unhashable" in problem:
        return (*here, "a key must be a text; put it in quotes")
    if re.match(r"\s*(-\s+)?\{[^}]*\}\s*[^\s,#]", line) or re.search(r":\s+\{[^}]*\}\s*[^\s,#]", line):
        return mark.line, line.index("{"), 'a text that begins with { needs quotes: "{} ..."'
    if re.search(r"""(["'])[^"']*\1\s*[^\s,#:\]}]""", line):
        return (*here, "a quoted text ends before the end of the value; put the whole value in quotes")
    for number in dict.fromkeys((start.line, mark.line, mark.line - 1)):
        if 0 <= number < len(lines) and (found := re.match(r"\s*(-\s+)?[\w.]+:(?=[^\s/\\])", lines[number])):
            return number, found.end(), "write a space after the colon"
        if 0 <= number < len(lines) and (found := re.match(r"\s*[\w.]+\s*=", lines[number])):
            return number, found.end() - 1, "write key: value, with a colon"
    if "could not find expected ':'" in problem:
        return start.line, start.column, "a colon is missing; write key: value"
    if "mapping values" in problem and re.search(r":\s.*:(\s|$)", line.split(" #")[0]):
        return (*here, "a value that holds ': ' needs quotes")
    above = mark.line - 1
    while above > 0 and not lines[above].split("#")[0].strip():
        above -= 1
    if above >= 0 and _NO_COLON.match(lines[above]):
        return above, len(lines[above]) - len(lines[above].lstrip()), "a colon is missing; write key: value"
    if above >= 0 and "mapping values" in problem and re.match(r"\s*[\w.]+:\s+[^\s#]", lines[above]):
        return (*here, "the line above has a value, so that nothing may be indented below it")
    return (
        *here,
        "the indentation does not fit the lines above; keys of one mapping begin in the same column",
    )


# What "C:\new" becomes in double quotes: the escapes of YAML that are letters.
_ESCAPED_PATH = re.compile(r"[A-Za-z]:(?:[^\x00-\x1f]*)[\x00-\x09\x0b-\x1f\x7f\x85\xa0\u2028\u2029\n]\w")


def _check_backslashes(node: DictConfig, text: str, name: str) -> None:
    for key, value in leaves(node):
        if isinstance(value, str) and _ESCAPED_PATH.match(value) and "\\" in text:
            line = line_of(text, key)
            place = f", line {line}" if line else ""
            raise ConfigError(
                f"{name}{place}: {key} is a path whose backslashes are escapes in double quotes; use single quotes, "
                r"'C:\...', or C:/..."
            )


def leaves(node: DictConfig) -> Iterator[tuple[str, Any]]:
    """The dotted keys and unresolved values of a configuration that are no mappings or lists."""

    def visit(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for name, item in value.items():
                yield from visit(item, f"{key}.{name}" if key else str(name))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from visit(item, f"{key}[{index}]")
        else:
            yield key, value

    yield from visit(OmegaConf.to_container(node, resolve=False), "")


def check_interpolations(config: DictConfig, place: Callable[[str], str] = lambda key: "") -> None:
    """Raise ConfigError for a value ${...} that leads nowhere; `place` gives the place of a key in a file."""
    for key, value in leaves(config):
        if isinstance(value, str) and "${" in value:
            try:
                OmegaConf.select(config, key)
            except (OmegaConfBaseException, RecursionError) as error:
                raise ConfigError(f"{key} is '{value}'{place(key)}, {_unresolved(error)}") from error


def _unresolved(error: Exception) -> str:
    """Why an interpolation leads nowhere, and what to do."""
    text = str(error).splitlines()[0] if str(error) else ""
    quoted = re.search(r"'[^']*'", text)
    if isinstance(error, RecursionError):
        return "which leads to itself; write the value"
    if isinstance(error, UnsupportedInterpolationType):
        return "which is unknown; ${oc.env:NAME} is a variable of the environment"
    if "nvironment variable" in text and quoted:
        return f"but the variable {quoted[0]} is not set; set it, or write the value"
    if isinstance(error, InterpolationKeyError) and quoted:
        return f"but there is no key {quoted[0]}; write the value, or that key"
    return f"which cannot be read ({text}); write the value"


def line_of(text: str, key: str) -> int | None:
    """The line, from 1, of a dotted key such as model.betas[0] in the text of a YAML; None if it is not there."""
    try:
        node = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError):
        return None
    line = None
    for part in re.findall(r"\[(\d+)\]|([^.\[\]]+)", key):
        index, name = part
        if index and isinstance(node, yaml.SequenceNode) and int(index) < len(node.value):
            node = node.value[int(index)]
            line = node.start_mark.line + 1
        elif name and isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == name), None)
            if pair is None:
                return None
            line, node = pair[0].start_mark.line + 1, pair[1]
        else:
            return None
    return line


def place_in(paths: Sequence[str | Path], key: str) -> str:
    """Where the last of some YAMLs has a key, as " (a.yaml, line 3)"; "" if none has it."""
    for path in reversed(paths):
        with suppress(OSError, UnicodeDecodeError):
            if line := line_of(Path(in_checkout(str(path))).read_text("utf-8-sig"), key):
                return f" ({path}, line {line})"
    return ""


# Keys of a YAML that hold the path of a file or folder, or a hub id.
_PATH_KEYS = ("version", "tokenizer", "image_tower", "ckpt_path", "embedding_manager_ckpt")


def find_paths(node: Any, places: Sequence[Path]) -> None:
    """Replace the paths in a node by where they are (see `in_checkout`), in place; `places` are those of its YAMLs."""
    for key, value in _entries(node):
        if isinstance(value, str):
            if key in _PATH_KEYS or value.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
                found = in_checkout(value, places)
                if found != value:
                    node[key] = found
        else:
            find_paths(value, places)


def _entries(node: Any) -> list[tuple[Any, Any]]:
    """The entries of a mapping or list as they are written, without interpolation; of anything else, none."""
    if isinstance(node, DictConfig):
        return list(node.items_ex(resolve=False))
    if isinstance(node, ListConfig):
        return list(enumerate(node._iter_ex(resolve=False)))
    if isinstance(node, Mapping):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, list) else []


def yaml_value(text: str) -> Any:
    """The value of a command-line word under YAML rules; 1e-3 is a number too, and invalid YAML stays text."""
    if is_number(text) and not re.fullmatch(r"[+-]?\d+", text):
        return float(text)
    if (
        re.fullmatch(r"[\d:]+", text) and ":" in text
    ):  # a duration, which YAML 1.1 reads as a number to the base 60
        return text
    try:
        if text.lstrip().startswith(("[", "{")):  # 1e-3 is a number in these too, as in a file
            return OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)["value"]  # type: ignore[call-overload,index]
        return yaml.safe_load(text)
    except (yaml.YAMLError, OmegaConfBaseException):
        return text


def is_number(text: str) -> bool:
    """Whether a text is a decimal number such as -3, 0.5 or 1e-3."""
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE) is not None


# Keys whose value is a mapping, beside those that end in _config, and those of the datasets.
_MAPPINGS = ("model", "data", "lightning", "params", "trainer", "callbacks", "modelcheckpoint", "logger")
DATASETS = ("train", "validation", "test", "predict")  # in data.params
_SPLITS = tuple(f"data.params.{name}" for name in DATASETS)


def check_shape(config: DictConfig, place: Callable[[str], str] = lambda key: "") -> None:
    """Raise ConfigError for a list or a single value where the YAML of a run has a mapping."""

    def visit(node: dict[Any, Any], where: str) -> Iterator[Problem]:
        for key, value in node.items():
            path = f"{where}.{key}" if where else str(key)
            if isinstance(value, dict):
                yield from visit(value, path)
                continue
            # The condition of an unconditional model is a text; a callback is switched off by null.
            wanted = str(key).endswith("_config") and key != "cond_stage_config"
            # The options of Lightning's Trainer are no mappings, whatever their names.
            named = key in _MAPPINGS and where != "lightning.trainer"
            if named or path in _SPLITS or wanted or where == "lightning.callbacks":
                later = value is None or (isinstance(value, str) and value.startswith(("???", "${")))
                if not later:
                    kind = "a list" if isinstance(value, list) else shown_value(value)
                    yield Problem(path, f"{path} is {kind}", " where a mapping is needed; write key: value")

    plain = OmegaConf.to_container(config, resolve=False)
    raise_problems(list(visit(cast(dict[Any, Any], plain), "")), place)
