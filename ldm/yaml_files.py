"""Read YAML files, and single values with the rules of YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.util import ConfigError


def read_yaml(path: str | Path) -> DictConfig:
    """Read one YAML file; a ConfigError names the file and the line of a syntax error."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no such YAML: '{path}'; check --base")
    try:
        node = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"'{path}'{line} is not a valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(node, DictConfig):
        raise ConfigError(f"'{path}' must hold a mapping (model:, data:, lightning:), not a list")
    return _found(node, path.parent)


# The repository's root, or in an installation what takes its place, and its folders that YAMLs name.
_PACKAGE = Path(__file__).resolve().parent
CHECKOUT = shipped if (shipped := _PACKAGE / "shipped").is_dir() else _PACKAGE.parent
_FOLDERS = ("models", "configs", "data")


def in_checkout(path: str) -> str:
    """The path, or where it is in the checkout: if it begins with models/, configs/ or data/ and is not here.

    So the shipped YAMLs work from every folder, not only from the root of the checkout.
    """
    there = CHECKOUT / path
    known = path.split("/")[0] in _FOLDERS and "/" in path
    return str(there) if known and not Path(path).exists() and there.exists() else path


def _found(node: DictConfig, folder: Path) -> DictConfig:
    """The same configuration with every such path as an absolute one.

    What lies in `folder`, that of the YAML, comes first: the folder of a model can be copied elsewhere.
    """

    def visit(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: visit(item) for key, item in value.items()}
        if isinstance(value, list):
            return [visit(item) for item in value]
        if not isinstance(value, str) or (found := in_checkout(value)) == value:
            return value
        parts = Path(value).parts
        beside = (folder.resolve().joinpath(*parts[start:]) for start in range(1, len(parts)))
        return next((str(place) for place in beside if place.exists()), found)

    plain = OmegaConf.to_container(node, resolve=False)
    moved = visit(plain)
    return node if moved == plain else cast(DictConfig, OmegaConf.create(moved))


def yaml_value(text: str) -> Any:
    """The value of a command-line word under YAML rules; 1e-3 is a number too, and invalid YAML stays text."""
    if is_number(text) and not re.fullmatch(r"[+-]?\d+", text):
        return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def is_number(text: str) -> bool:
    """Whether a text is a decimal number such as -3, 0.5 or 1e-3."""
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE) is not None
