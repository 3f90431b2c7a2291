"""Read YAML files, and single values with the rules of YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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
    return node


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
