"""The configuration of a run from YAMLs, overrides and flags, checked before anything is built.

`check_command_line` finds what is wrong with it as far as that needs no torch, which takes seconds to import.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm import values
from ldm.console import too_many_loaders
from ldm.data.captions import SAMPLE_KEYS, absent_key, check_dataset
from ldm.files import NO_TENSORS, is_address, is_hub_id, why_unreadable
from ldm.front_ends import setting
from ldm.model_kinds import ONLY_VECTORS
from ldm.training import command_line, flags, hub, resuming, run_folder
from ldm.training.callbacks import KNOWN_CALLBACKS, complete_lightning, rename_callbacks
from ldm.training.command_line import (
    RUN_KEYS,
    RUN_TYPES,
    TRAINER_KEYS,
    TRAINER_OPTIONS,
    TRAINER_TYPES,
    accelerator_kind,
    parse_gpus,
)
from ldm.training.learning_rate import check_base_rate, rate_problems
from ldm.training.run_folder import RunFolder
from ldm.util import (
    ConfigError,
    Find,
    Problem,
    UsageError,
    UserError,
    absent_packages,
    accepts,
    config_problems,
    current_path,
    default_of,
    get_obj_from_str,
    misfits,
    raise_problems,
    refuse_foreign_target,
    stand_in,
)
from ldm.words import check_word, check_words, paired
from ldm.yaml_files import (
    DATASETS,
    check_interpolations,
    check_shape,
    find_paths,
    place_in,
    read_yaml,
    yaml_value,
)

logger = logging.getLogger(__name__)

_LIGHTNING_KEYS = ("trainer", "callbacks", "logger", "modelcheckpoint", "strategy")
_OWN_DATA = "ldm.training.data.DataModuleFromConfig"
_OWN_DATASETS = ("ldm.data.personalized.", "ldm.data.personalized_style.")
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
    config = _merged(options, base, saved)
    _fill(config, options)
    return config


def _fill(config: DictConfig, options: argparse.Namespace) -> None:
    typed = options.data_root is not None or any(word.startswith("data_root=") for word in options.overrides)
    fill_run_keys(config, replace_data_root=typed)


def of_run(
    options: argparse.Namespace, base: Sequence[str | Path], folder: RunFolder | None
) -> tuple[DictConfig, DictConfig | None, Callable[[str], str]]:
    """The configuration of a run, that of the run in `folder` which it resumes, and the places of its keys."""
    if folder is None:
        return load_run_config(options, base), None, command_line.places(options, base)
    saved = load_run_config(command_line.parse([]), folder.saved_configs())
    return (
        load_run_config(options, base, saved),
        saved,
        command_line.places(options, base, folder.saved_configs()),
    )


def check_command_line(options: argparse.Namespace) -> None:
    """Check what needs no torch: YAMLs against the sources of their classes, images with captions and masks, models
    and vectors by the headers of their files, and what a resumed run keeps.

    Raises:
        UserError: as the run itself would, but at once.
    """
    resume, _ = run_folder.place_to_resume(options)
    yamls = list(options.base)
    folder: RunFolder | None = None
    saved: DictConfig | None = None
    if resume:
        folder, _ = run_folder.existing_run_folder(resume, options.logdir, options.resume_flag)
        config, saved, place = of_run(options, options.base, folder)
        yamls = [*folder.saved_configs(), *yamls]
    else:
        config, place = _merged(options, yamls, None), command_line.places(options, yamls)
    _check_base(yamls, config, options.resume)
    described = OmegaConf.select(config, "model.target")
    # Without a model in the YAMLs, its own YAML is the first; for a model on the hub the run finds it.
    source = config.get("actual_resume")
    if not described and not resume and source and Path(str(source)).exists():
        from ldm.base_models import training_yaml

        yamls = [training_yaml(source, config.get("variant"), ask=False), *yamls]
        config, place = _merged(options, yamls, None), command_line.places(options, yamls)
        described = OmegaConf.select(config, "model.target")
    elif not described and not resume and not source:
        raise ConfigError(
            f"no YAML of {setting('base')} describes a model; put one that does before the others, such as "
            "configs/latent-diffusion/txt2img-finetune.yaml"
        )
    if described and not resume:
        _fill(config, options)
    with suppress(OmegaConfBaseException):  # the run says what is wrong with an interpolation
        trainer = OmegaConf.select(config, "lightning.trainer") or {}
        lengths = {f"lightning.trainer.{key}": trainer.get(key) for key in ("max_steps", "max_epochs")}
        problems = [misfits(key, value, int) for key, value in lengths.items() if value is not None]
        raise_problems([one for found in problems for one in found], place)
        parse_gpus(trainer.get("gpus"))
        kind = accelerator_kind(trainer.get("accelerator"))
        if kind == "mps" and sys.platform != "darwin":
            key = "lightning.trainer.accelerator"
            raise_problems([Problem(key, f"{key} is mps", ", and this is no Mac; use auto")], place)
        if described:
            check_base_rate(config)
        if not resume:  # what a run was begun from may be gone, and may not be another
            _check_files(config)
            if options.train:
                run_folder.check_logdir(options.logdir)
        # Lightning 1.x resumed by this key; the run takes the rest from what it resumes.
        checked = bool(described) and not trainer.get("resume_from_checkpoint")
        if checked:
            check_run_config(config, place, stand_in)
            if not resume:
                _check_start(config)
            if folder is not None and saved is not None:
                resuming.check_fixed(saved, config, folder, at_once=True)
        for dataset in _datasets(config):
            if current_path(str(dataset["target"])).startswith(_OWN_DATASETS):
                own = None if options.data_root else (dataset.get("params") or {}).get("data_root")
                if roots := own or config.get("data_root"):
                    trained = checked and dataset is OmegaConf.select(config, "data.params.train")
                    check_dataset(dataset.get("params") or {}, roots, checked, _learned(config) * trained)
    hub.check(options)


def _learned(config: DictConfig) -> list[str]:
    """The words that a run learns; none if more than the YAML says which they are."""
    params = OmegaConf.select(config, "model.params.personalization_config.params") or {}
    ours = _learns_words_of_ours(config) and _target(config, "data") == _OWN_DATA
    if not ours or params.get("embedding_manager_ckpt") or params.get("per_image_tokens"):
        return []
    return [word for word in paired(params.get("placeholder_strings"), None)[0] if isinstance(word, str)]


def complete_base(options: argparse.Namespace) -> list[str | Path]:
    """The YAMLs of --base; if they describe no model, after the one that learns words on the model that is named.

    Raises:
        UserError: no model is named, or it is none that can be read.
    """
    config = _merged(options, options.base, None)
    _check_base(options.base, config, options.resume)
    source = config.get("actual_resume")
    if OmegaConf.select(config, "model.target") or not source:
        return list(options.base)
    from ldm.base_models import training_yaml

    path = training_yaml(source, config.get("variant"), config.get("revision"))
    logger.info("the settings are those of %s, for '%s'", path, source)
    return [path, *options.base]


def _check_base(base: Sequence[str | Path], config: DictConfig, resume: str) -> None:
    if not base and not config.get("actual_resume"):
        raise UsageError(
            f"{'there is no run to resume; for a new one ' if resume else ''}give a YAML with --base, such as "
            "configs/latent-diffusion/txt2img-finetune.yaml, or a model with --pretrained_model_name_or_path "
            "(--actual_resume), whose YAML is then used"
        )
    refuse_foreign_target(OmegaConf.select(config, "model.target"), ", ".join(f"'{path}'" for path in base))


def _check_files(config: DictConfig) -> None:
    from ldm.base_models import check_family, check_first_stage, checked_header, fitting, recognise

    node, model, vae = (config.get(key) for key in ("model", "actual_resume", "vae"))
    for key, source in (("actual_resume", model), ("vae", vae)):
        if source == "":
            raise UserError(f"{key} is empty; name a file, a folder or a hub id, or leave it out")
        if source and (Path(source).is_file() or is_address(source)):
            if key == "actual_resume" and node:
                fitting(source, node)
            else:
                (check_first_stage if key == "vae" else checked_header)(Path(source))
        if key == "actual_resume" and node and source and Path(source).is_dir():
            check_family(recognise(source, config.get("variant")), node)
        if source and not Path(source).exists() and not is_hub_id(str(source)):
            raise UserError(f"checkpoint '{source}' {NO_TENSORS['missing']}")
    if (vectors := config.get("embedding_manager_ckpt")) and (why := why_unreadable(vectors)):
        raise UserError(f"'{vectors}': it {why}")


def _check_start(config: DictConfig) -> None:
    """Check the file of vectors that a run of a personalization of ours begins from."""
    params = OmegaConf.select(config, "model.params.personalization_config.params") or {}
    if (path := params.get("embedding_manager_ckpt")) and _learns_words_of_ours(config):
        from ldm.generate.request import check_start

        check_start(config, path, _texts(params.get("placeholder_strings")), _is_of_yaml(config))


def _merged(options: argparse.Namespace, base: Sequence[str | Path], saved: DictConfig | None) -> DictConfig:
    config = OmegaConf.create({}) if saved is None else saved.copy()
    for path in base:
        overlay = read_yaml(path)
        check_shape(overlay, lambda key, path=path: place_in([path], key))  # type: ignore[misc]
        if dict(overlay.items_ex(resolve=False)).get(
            "data_root"
        ):  # it replaces the data_root in datasets of earlier YAMLs
            for dataset in _datasets(config):
                _params(dataset).pop("data_root", None)
        config = merge(config, overlay)
    try:
        for override in options.overrides:
            key, _, value = override.partition("=")
            if "[" in key:  # one entry of a list; merge would treat it as a mapping
                OmegaConf.update(config, key, yaml_value(value))
                check_shape(config)
            else:
                overlay = _nested(key, yaml_value(value))
                check_shape(overlay)
                config = merge(config, overlay)
        for key, value in flags.settings(options, config).items():
            config = merge(config, _nested(key, value))
        for key, node in flags.replaced(options, config).items():
            OmegaConf.update(config, key, node, merge=False, force_add=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the override does not fit the YAML: {str(error).splitlines()[0]}") from error
    _take_run_flags(config, options)
    place = command_line.places(options, base)
    check_interpolations(config, place)
    find_paths(config, [])  # those of flags and overrides
    raise_problems(list(_run_key_problems(config)), place)
    return config


def _run_key_problems(config: DictConfig) -> Iterator[Problem]:
    for key, hint in RUN_TYPES.items():
        if key in config and not OmegaConf.is_missing(config, key):
            yield from misfits(key, config[key], hint)
    yield from rate_problems((config.get("model") or {}).get("base_learning_rate"))


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
        params["placeholder_strings"] = [word]
    if word := config.get("init_word"):
        params["initializer_words"] = [word, *_texts(params.get("initializer_words"))[1:]]
    placeholders = _texts(params.get("placeholder_strings"))
    if placeholders:
        # Only the top-level key replaces a dataset's own value.
        forced = bool(config.get("placeholder_string"))
        for dataset in datasets:
            inherits = forced or "placeholder_token" not in _params(dataset)
            if inherits and _accepts(dataset, "placeholder_token"):
                _params(dataset)["placeholder_token"] = placeholders[0]


def check_run_config(
    config: DictConfig,
    place: Callable[[str], str] = lambda key: "",
    find: Find = get_obj_from_str,
) -> None:
    """Check keys, targets, values and their ranges without building anything.

    `place` is that of `command_line.places`. With `stand_in` for `find`, nothing heavy is imported, and what the
    sources of classes do not say is not checked.

    Raises:
        ConfigError: one error that lists all problems.
    """
    problems: list[Problem] = []
    if not config.get("model"):
        problems.append(Problem("", f"there is no model; give a YAML with {setting('base')}"))
    elif not config.get("data"):
        problems.append(Problem("", f"there is no data node; add a YAML that has one with {setting('base')}"))
    lightning = config.get("lightning") or {}
    trainer = lightning.get("trainer") or {}
    for where, node, known in (
        ("", config, ("model", "data", "lightning", *RUN_KEYS)),
        ("model", config.get("model") or {}, _MODEL_KEYS),
        ("data", config.get("data") or {}, ("target", "params")),
        ("lightning", lightning, _LIGHTNING_KEYS),
        ("lightning.trainer", trainer, TRAINER_KEYS),
    ):
        for key in map(str, node):
            if key not in known:
                path = f"{where}.{key}" if where else key
                what = f"{where or 'the YAML'}: unknown key '{key}'"
                problems.append(Problem(path, what, _nearest(key, known) + _known(known)))
    rootless = [node for node in _datasets(config) if _needs_root(node)]
    if rootless:
        problems.append(
            Problem(
                "", f"there is no image folder; give it with {setting('images')}, or as data_root in the YAML"
            )
        )
    missing = sorted(OmegaConf.missing_keys(config))
    for name, node in (lightning.get("callbacks") or {}).items():
        if node is not None and not node.get("target") and name not in KNOWN_CALLBACKS:
            problems.append(
                Problem(
                    f"lightning.callbacks.{name}",
                    f"lightning.callbacks: '{name}' has no target",
                    f"{_nearest(str(name), tuple(KNOWN_CALLBACKS))}; known are {', '.join(KNOWN_CALLBACKS)}",
                )
            )
    if missing:
        problems.append(Problem(missing[0], f"there is no value for {', '.join(missing)}"))
    if not missing and not rootless:
        kind = find("pytorch_lightning.Trainer")
        for unit in ("steps", "epochs"):
            least, most = trainer.get(f"min_{unit}"), trainer.get(f"max_{unit}")
            if isinstance(least, int) and isinstance(most, int) and -1 != most < least:
                path = f"lightning.trainer.min_{unit}"
                why = f" is {least}, more than max_{unit}, which is {most}; lower it, or raise max_{unit}"
                problems.append(Problem(path, path, why))
        for key, value in trainer.items():
            # `gpus` has a reader of its own; null is the default.
            if value is not None and key in TRAINER_OPTIONS:
                hint = TRAINER_TYPES.get(key) or values.hint(kind, key)
                problems += misfits(f"lightning.trainer.{key}", value, hint)
        completed = complete_lightning(
            lightning,
            personalization=OmegaConf.select(config, "model.params.personalization_config") is not None,
        )
        # The defaults need no check.
        completed["callbacks"] = {
            k: v for k, v in completed["callbacks"].items() if k in (lightning.get("callbacks") or {})
        }
        # The model's node also holds the learning rate, which is not an argument of the constructor.
        nodes = {
            "model": _constructor(config.get("model") or {}),
            "data": config.get("data") or {},
            "lightning": completed,
        }
        for where, node in nodes.items():
            if where != "lightning" and node and not node.get("target"):
                problems.append(
                    Problem(where, where, " has no target; name a class: target: package.module.Name")
                )
            problems += config_problems(node, where, find)
        if not problems:
            problems += _joint_problems(config)
            problems += absent_packages(nodes) if find is stand_in else ()
    raise_problems(problems, place)
    words = OmegaConf.select(config, "model.params.personalization_config.params") or {}
    check_words(words, _most_vectors(config) if words else None)


def _most_vectors(config: DictConfig) -> int | None:
    """The most vectors that a prompt has room for between its first and its last token; None if that is not known."""
    encoder = _target(config, "model.params.cond_stage_config")
    if not (encoder.startswith("ldm.") and _learns_words_of_ours(config) and _is_of_yaml(config)):
        return None
    params = OmegaConf.select(config, "model.params.cond_stage_config.params") or {}
    length, sequence = (
        params.get(name) or default_of(stand_in(encoder), name) for name in ("max_length", "max_seq_len")
    )
    most = length or sequence
    return most - 2 if isinstance(most, int) else None


def _target(config: DictConfig, key: str) -> str:
    """The current path of the class that a node names; "" if it names none."""
    node = OmegaConf.select(config, key)
    target = node.get("target") if isinstance(node, Mapping) else None
    return current_path(str(target)) if target else ""


def _learns_words_of_ours(config: DictConfig) -> bool:
    """Whether the personalization is a class of this project; another may have words and files as it likes."""
    return _target(config, "model.params.personalization_config").startswith("ldm.")


def _is_of_yaml(config: DictConfig) -> bool:
    """Whether the sizes of the model are the YAML's; a folder of diffusers, or a hub id, replaces them by its own."""
    source = config.get("actual_resume")
    return source is None or Path(source).is_file()


def _joint_problems(config: DictConfig) -> Iterator[Problem]:
    """Problems that only several nodes together show, such as the data's and the model's; each is valid by itself."""
    from ldm.base_models import size_multiple

    node = config["data"]
    if _accepts(node, "train") and not OmegaConf.select(config, "data.params.train"):
        yield Problem(
            "data.params.train", "there is no data.params.train", "; name the training images' dataset"
        )
    key = "lightning.callbacks.image_logger.params.log_images_kwargs.ddim_steps"
    sampled, steps = (OmegaConf.select(config, name) for name in (key, "model.params.timesteps"))
    if isinstance(sampled, int) and isinstance(steps, int) and sampled > steps:
        yield Problem(key, f"{key} is {sampled}", f", and the model has {steps} timesteps; use fewer")
    encoder, words, optimizer = (
        _target(config, f"model.params.{name}_config")
        for name in ("cond_stage", "personalization", "optimizer")
    )
    ancestors = {one.__name__ for one in getattr(words and stand_in(words), "__mro__", ())}
    weight = OmegaConf.select(config, "model.params.personalization_config.params.context_weight")
    more = ancestors & {"ShapedWords", *(["ContextRegularised"] if weight != 0 else [])}
    if more and encoder.endswith(".FrozenSDXLEmbedder"):
        yield Problem(
            "model.params.personalization_config.target",
            "personalization_config",
            f": {words} {ONLY_VECTORS}",
        )
    if re.fullmatch(r"torch\.optim\.(sparse_adam\.)?SparseAdam", optimizer):
        key = "model.params.optimizer_config.target"
        yield Problem(
            key, f"{key} is {optimizer}", ", which takes sparse gradients alone; use torch.optim.AdamW"
        )
    if _target(config, "data") == _OWN_DATA:
        key = "data.params.num_workers"
        if why := too_many_loaders(OmegaConf.select(config, key)):
            yield Problem(key, key, f" {why}")
        for name in ("first_stage_key", "cond_stage_key"):
            chosen = OmegaConf.select(config, f"model.params.{name}")
            own = _target(config, "data.params.train").startswith(_OWN_DATASETS)
            if own and chosen is not None and chosen not in SAMPLE_KEYS:
                yield absent_key(name, chosen, SAMPLE_KEYS)
    multiple = size_multiple(config) if _is_of_yaml(config) else None
    for split in DATASETS:
        key = f"data.params.{split}.params.size"
        size = OmegaConf.select(config, key)
        if multiple and isinstance(size, int) and size % multiple:
            nearest = max(round(size / multiple), 1) * multiple
            yield Problem(
                key, f"{key} is {size}", f"; this model needs a multiple of {multiple}; try {nearest}"
            )


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
    nodes = (parts.get(name) for name in DATASETS)
    return [node for node in nodes if isinstance(node, DictConfig) and node.get("target")]


def _accepts(node: Mapping[str, Any], name: str) -> bool:
    """Whether the target of a node accepts a keyword; True for a wrong target, which check_config reports."""
    try:
        return accepts(stand_in(node["target"]) or get_obj_from_str(node["target"]), name)
    except ConfigError:
        return True


def _texts(value: Any) -> list[Any]:
    """The entries of a list, or a single text as one; of anything else, which is reported later, none."""
    return [value] if isinstance(value, str) else list(value) if isinstance(value, ListConfig) else []


def _needs_root(node: Mapping[str, Any]) -> bool:
    try:
        kind = stand_in(node["target"]) or get_obj_from_str(node["target"])
        parameter = inspect.signature(kind).parameters.get("data_root")
    except (ConfigError, TypeError, ValueError):
        return False
    given = (node.get("params") or {}).get("data_root")
    return parameter is not None and parameter.default is parameter.empty and not given


def _without_unaccepted(base: DictConfig, overlay: DictConfig) -> DictConfig:
    result = {}
    overlaid = dict(overlay.items_ex(resolve=False))
    for key, value in base.items_ex(resolve=False):
        over = overlaid.get(key)
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
