"""The configuration of a run from YAMLs, overrides and flags, checked before anything is built."""

from __future__ import annotations

import argparse
import difflib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.training.command_line import RUN_KEYS, alias_overrides
from ldm.training.trainer import KNOWN_CALLBACKS, complete_lightning, rename_callbacks
from ldm.util import ConfigError, UsageError, accepts, check_config, get_obj_from_str
from ldm.words import check_word
from ldm.yaml_files import read_yaml, yaml_value

_LIGHTNING_KEYS = ("trainer", "callbacks", "logger", "modelcheckpoint", "strategy")
_MODEL_KEYS = ("target", "params", "base_learning_rate")


def merge(base: DictConfig, overlay: DictConfig) -> DictConfig:
    """Merge an overlay into a configuration: mappings are merged, lists and values are replaced.

    Where the overlay has another `target`, those params of the base that the new target does not accept are dropped,
    so that one file can exchange a personalization. Old names of callbacks become the current ones.

    Raises:
        ConfigError: one of the two has a list where the other has a mapping.
    """
    overlay = rename_callbacks(overlay)
    try:
        return cast(DictConfig, OmegaConf.merge(_without_unaccepted(base, overlay), overlay))
    except TypeError as error:  # what OmegaConf raises for a list in place of a mapping
        raise ConfigError(f"there is a list where a mapping is needed, or the reverse ({error})") from error


def load_run_config(
    options: argparse.Namespace, base: Sequence[str | Path], saved: DictConfig | None = None
) -> DictConfig:
    """The configuration of a run from YAMLs (left to right), then overrides, then flags; not yet checked.

    `saved` is the configuration of a run that is resumed, under all of these.
    """
    config = OmegaConf.create({}) if saved is None else saved.copy()
    for path in base:
        overlay = read_yaml(path)
        if overlay.get("data_root"):  # it replaces the data_root in datasets of earlier YAMLs
            for dataset in _datasets(config):
                _params(dataset).pop("data_root", None)
        config = merge(config, overlay)
    try:
        for override in options.overrides:
            key, _, value = override.partition("=")
            if "[" in key:  # one entry of a list; merge would treat it as a mapping
                OmegaConf.update(config, key, yaml_value(value))
            else:
                config = merge(config, _nested(key, yaml_value(value)))
        for key, value in alias_overrides(options).items():
            # A flag about images must not create a validation set.
            if not key.startswith("data.params.validation") or OmegaConf.select(
                config, "data.params.validation"
            ):
                config = merge(config, _nested(key, value))
    except OmegaConfBaseException as error:
        raise ConfigError(f"the override does not fit the YAML: {str(error).splitlines()[0]}") from error
    _take_run_flags(config, options)
    fill_run_keys(config, replace_data_root=options.data_root is not None)
    return config


def seed_vectors(config: DictConfig) -> None:
    """Give the run's seed to the personalization too, if it accepts one and the YAML does not set it."""
    node = OmegaConf.select(config, "model.params.personalization_config")
    if node is None or "seed" in (node.get("params") or {}):
        return
    if _accepts(node, "seed"):
        OmegaConf.update(node, "params.seed", config["seed"])


def fill_run_keys(config: DictConfig, *, replace_data_root: bool = False) -> None:
    """Copy the run's top-level keys (data_root, placeholder_string, ...) into the nodes that use them, in place.

    A dataset keeps its own data_root, unless `replace_data_root`, and its own placeholder_token, unless the run has a
    placeholder_string.
    """
    datasets = _datasets(config)
    if root := config.get("data_root"):
        for dataset in datasets:
            if _accepts(dataset, "data_root") and (
                replace_data_root or not _params(dataset).get("data_root")
            ):
                _params(dataset)["data_root"] = root
    manager = OmegaConf.select(config, "model.params.personalization_config")
    if manager is None:
        given = [key for key in ("placeholder_string", "init_word") if config.get(key)]
        if given:
            raise UsageError(f"--{given[0]} needs a YAML whose model has a personalization_config")
        return
    params = _params(manager)
    if path := config.get("embedding_manager_ckpt"):
        params["embedding_manager_ckpt"] = path
    if word := config.get("placeholder_string"):
        params["placeholder_strings"] = [str(word)]
    if word := config.get("init_word"):
        others = list(params.get("initializer_words") or [])[1:]
        params["initializer_words"] = [str(word), *others]
    placeholders = params.get("placeholder_strings") or []
    if placeholders:
        # Only the top-level key replaces a dataset's own value.
        forced = bool(config.get("placeholder_string"))
        for dataset in datasets:
            inherits = forced or "placeholder_token" not in _params(dataset)
            if inherits and _accepts(dataset, "placeholder_token"):
                _params(dataset)["placeholder_token"] = placeholders[0]


def check_run_config(config: DictConfig, trainer_options: Sequence[str]) -> None:
    """Check keys, targets and missing values without building anything.

    `trainer_options` are the keys that are allowed in lightning.trainer.

    Raises:
        ConfigError: one error that lists all problems.
    """
    problems = []
    if not config.get("model"):
        problems.append("there is no model; give a YAML with --base")
    elif not config.get("data"):
        problems.append("there is no data node; add a YAML that has one with --base")
    lightning = config.get("lightning") or {}
    for where, node, known in (
        ("the YAML", config, ("model", "data", "lightning", *RUN_KEYS)),
        ("model", config.get("model") or {}, _MODEL_KEYS),
        ("data", config.get("data") or {}, ("target", "params")),
        ("lightning", lightning, _LIGHTNING_KEYS),
        ("lightning.trainer", lightning.get("trainer") or {}, trainer_options),
    ):
        unknown = [str(key) for key in node if key not in known]
        if unknown:
            names = ", ".join(f"'{key}'{_nearest(key, known)}" for key in unknown)
            problems.append(f"{where}: unknown key {names}" + _known(known))
    rootless = [node for node in _datasets(config) if _needs_root(node)]
    if rootless:
        problems.append("there is no image folder; give --data_root FOLDER, or data_root: FOLDER in the YAML")
    missing = sorted(OmegaConf.missing_keys(config))
    for name, node in (lightning.get("callbacks") or {}).items():
        if node and not node.get("target") and name not in KNOWN_CALLBACKS:
            problems.append(
                f"lightning.callbacks: '{name}' has no target; known are {', '.join(KNOWN_CALLBACKS)}"
            )
    if missing:
        problems.append(f"there is no value for {', '.join(missing)}")
    if not missing and not rootless:
        # The model's node also holds the learning rate, which is not an argument of the constructor.
        nodes = {
            "model": _constructor(config.get("model") or {}),
            "data": config.get("data") or {},
            "lightning": complete_lightning(
                lightning,
                personalization=OmegaConf.select(config, "model.params.personalization_config") is not None,
            ),
        }
        for where, node in nodes.items():
            try:
                check_config(node, where)
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    words = OmegaConf.select(config, "model.params.personalization_config.params.placeholder_strings")
    for word in words if isinstance(words, ListConfig) else []:
        check_word(word)


def _take_run_flags(config: DictConfig, options: argparse.Namespace) -> None:
    for key in RUN_KEYS:
        value = getattr(options, key, None)
        if value is not None:
            config[key] = check_word(value) if key == "placeholder_string" else value
    if options.learning_rate is not None and options.scale_lr is None:
        config["scale_lr"] = False
    trainer = dict(options.trainer)
    if options.gpus is not None:
        trainer["gpus"] = options.gpus
    for key, value in trainer.items():
        OmegaConf.update(config, f"lightning.trainer.{key}", value, force_add=True)


def _constructor(model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: model[key] for key in ("target", "params") if key in model}


def _known(names: Sequence[str]) -> str:
    return f"; known are {', '.join(names)}" if len(names) < 15 else ""


def _nearest(key: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, names, n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _nested(key: str, value: Any) -> DictConfig:
    node = OmegaConf.create({})
    OmegaConf.update(node, key, value)
    return node


def _params(node: DictConfig) -> DictConfig:
    if not node.get("params"):
        node["params"] = {}
    return node["params"]


def _datasets(config: DictConfig) -> list[DictConfig]:
    parts = OmegaConf.select(config, "data.params") or {}
    nodes = (parts.get(name) for name in ("train", "validation", "test", "predict"))
    return [node for node in nodes if isinstance(node, DictConfig) and node.get("target")]


def _accepts(node: Mapping[str, Any], name: str) -> bool:
    """Whether the target of a node accepts a keyword; True for a wrong target, which check_config reports."""
    try:
        return accepts(get_obj_from_str(node["target"]), name)
    except ConfigError:
        return True


def _needs_root(node: Mapping[str, Any]) -> bool:
    try:
        parameter = inspect.signature(get_obj_from_str(node["target"])).parameters.get("data_root")
    except (ConfigError, TypeError, ValueError):
        return False
    given = (node.get("params") or {}).get("data_root")
    return parameter is not None and parameter.default is parameter.empty and not given


def _without_unaccepted(base: DictConfig, overlay: DictConfig) -> DictConfig:
    result = {}
    for key, value in base.items_ex(resolve=False):
        over = overlay.get(key) if key in overlay and not OmegaConf.is_missing(overlay, key) else None
        if isinstance(value, DictConfig) and isinstance(over, DictConfig):
            value = _without_unaccepted(value, over)
            other = over.get("target")
            if other and other != value.get("target") and isinstance(value.get("params"), DictConfig):
                kept = {k: v for k, v in value["params"].items_ex(resolve=False) if _accepts(over, str(k))}
                value["params"] = kept
        elif isinstance(value, (DictConfig, ListConfig)):
            value = value.copy()
        result[key] = value
    return OmegaConf.create(result)
