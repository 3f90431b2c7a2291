"""Resuming a run with other settings: what cannot change, and what differs; imports nothing heavy.

`ldm.training.callbacks.resumption` writes the changes into the state.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.files import file_hash
from ldm.front_ends import setting
from ldm.signatures import UNKNOWN
from ldm.training.run_folder import RunFolder
from ldm.util import ConfigError, Find, UsageError, UserError, default_of, get_obj_from_str, stand_in

logger = logging.getLogger(__name__)

# -- what cannot change --------------------------------------------------------------------------------------

_PERSONALIZATION = "model.params.personalization_config"
_WORDS = f"{_PERSONALIZATION}.params"
# Keys whose values are decided when a run begins, with their names in messages.
FIXED = {
    "model.target": "model",
    f"{_PERSONALIZATION}.target": "personalization",
    f"{_WORDS}.placeholder_strings": "placeholder",
    f"{_WORDS}.initializer_words": "initializer",
    f"{_WORDS}.num_vectors_per_token": "number of vectors",
    f"{_WORDS}.per_image_tokens": "per_image_tokens",
    f"{_WORDS}.progressive_words": "progressive_words",
    f"{_WORDS}.progressive_scale": "progressive_scale",
    f"{_WORDS}.seed": "seed of the initial vectors",
    "model.params.unfreeze_model": "unfreeze_model",
    "model.params.cond_stage_trainable": "cond_stage_trainable",
    "vae": "first stage",
    "revision": "revision of the base model",
    "variant": "variant of the base model",
}
# Parameters of a personalization that may change; all others decide what is learned.
_FREE = (
    "norm_control",
    "norm_ratio",
    "embedding_manager_ckpt",
    "residual_rate",
    "negative_rate",
    "context_weight",
    "prompts_per_step",
)
_BASE_MODELS = ("actual_resume", "model.params.ckpt_path")
_FILE = "embedding_manager_ckpt"


def check_fixed(saved: DictConfig, wanted: DictConfig, folder: RunFolder, *, at_once: bool = False) -> None:
    """Check that a resumed run keeps what was decided when it began; `saved` and `wanted` are its configurations.

    With `at_once`, what needs imports, or a model to be read, is left out.

    Raises:
        UsageError: the placeholder, the vectors, the personalization or the base model would change.
    """
    find: Find = stand_in if at_once else get_obj_from_str
    own = {str(key): None for config in (saved, wanted) for key in OmegaConf.select(config, _WORDS) or {}}
    others = {f"{_WORDS}.{key}": key for key in own if key not in _FREE}
    for key, name in (FIXED | {key: name for key, name in others.items() if key not in FIXED}).items():
        was, now = _value(saved, key, find), _value(wanted, key, find)
        if was != now and UNKNOWN not in (was, now):
            raise UsageError(
                f"a resumed run keeps its {name}, {_shown(was)}; {_shown(now)} is asked for: leave that out, or start "
                f"a new run without {setting('resume', '-r')}"
            )
    for key in _BASE_MODELS:
        was, now = OmegaConf.select(saved, key), OmegaConf.select(wanted, key)
        if was == now or (at_once and now and Path(str(now)).exists()):
            continue
        if not (was and now and _is_same_model(str(was), str(now), folder)):
            raise UsageError(
                f"a resumed run keeps its base model, {_shown(was)}; {_shown(now)} is asked for: leave that out, or "
                f"start a new run without {setting('resume', '-r')}"
            )
    was, now = _begun_from(saved), _begun_from(wanted)
    if now not in (None, was) and not folder.is_latest(Path(now)):
        raise UsageError(
            f"the vectors of '{now}' and {setting('resume', '-r')} exclude each other: a resumed run goes on with its "
            "own vectors; leave one of them out"
        )


def check_epochs(state: Mapping[str, Any], wanted: DictConfig) -> None:
    """Check that a state has no more epochs than are wanted, which Lightning refuses after everything is built.

    Raises:
        UsageError: it has.
    """
    limit = OmegaConf.select(wanted, "lightning.trainer.max_epochs")
    if limit is not None and 0 <= limit < (done := epochs_done(state)):
        raise UsageError(no_epochs_left(done, limit))


def forget_first_vectors(config: DictConfig, saved: DictConfig) -> None:
    """Remove the file that a run began from, in place: a resumed run has its vectors, and the file may be gone.

    A file that is named beside `-r`, and is not needed, is logged.
    """
    if _begun_from(config) not in (None, _begun_from(saved)):
        logger.info("--embedding_manager_ckpt is not needed: the vectors are in the state that -r reads")
    config.pop(_FILE, None)
    params = OmegaConf.select(config, _WORDS)
    if params is not None:
        params.pop(_FILE, None)


def _begun_from(config: DictConfig) -> str | None:
    path = config.get(_FILE) or OmegaConf.select(config, f"{_WORDS}.{_FILE}")
    return str(path) if path else None


def _value(config: DictConfig, key: str, find: Find) -> Any:
    """A value, or the default of its node's target; lists of one entry count as that entry."""
    value = plain(OmegaConf.select(config, key))
    if value is None:
        owner, _, name = key.rpartition(".params.")
        target = OmegaConf.select(config, f"{owner}.target") if owner else None
        value = _default(target, name, find)
    if isinstance(value, list):
        value = [entry for entry in value if entry is not None]
        value = value[0] if len(value) == 1 else value or None
    return value or None


def _default(target: str | None, name: str, find: Find) -> Any:
    try:
        owner = find(target) if target else None
    except ConfigError:
        return None
    if target and owner is None:
        return UNKNOWN
    return default_of(owner, name) if owner else None


def _is_same_model(was: str, now: str, folder: RunFolder) -> bool:
    """Whether two paths lead to the same weights; the metadata of the run's embeddings has the first one's hash."""
    old, new = Path(was), Path(now)
    if old.exists() and new.exists() and old.samefile(new):
        return True
    known = None
    if new.is_file():
        hashes = (digest for path in folder.word_files() if (digest := _base_model_hash(path)) is not None)
        known = next(hashes, None)
        if known is None and old.is_file():
            known = file_hash(old)
    if known is None:
        # A folder, or a model that was moved and has no hash: its name is all that is known.
        return new.exists() and not old.exists() and old.name == new.name
    return known == file_hash(new)


def _base_model_hash(path: Path) -> str | None:
    from ldm.embeddings.method_files import read_words  # torch, which only a model that was moved needs

    try:
        return read_words(path).metadata.base_model_hash
    except UserError:
        return None


# -- what differs --------------------------------------------------------------------------------------------

# Keys whose effect is a figure of its own, or that say nothing about the training.
_COVERED = (
    "model.base_learning_rate",
    "scale_lr",
    "data.params.batch_size",
    "lightning.trainer.accumulate_grad_batches",
    "lightning.trainer.max_steps",
    "lightning.trainer.max_epochs",
    "lightning.trainer.precision",
    "lightning.trainer.resume_from_checkpoint",
    "placeholder_string",
    "init_word",
    f"{_WORDS}.{_FILE}",
    _FILE,
)
FIGURES = ("learning rate", "batch", "accumulation", "max_steps", "max_epochs", "precision", "processes")
_MOST_SHOWN = 6


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ, as "learning rate 4.00e-03 (was 4.00e-02)"; both are of `settings_of_run`.

    A figure that one of the two lacks is left out.
    """
    found = [
        f"{name} {_shown(now[name])} (was {_shown(was[name])})"
        for name in FIGURES
        if name in was and name in now and was[name] != now[name]
    ]
    for key, before, after in _changes(was.get("config"), now.get("config")):
        if not key.startswith(_COVERED):
            found.append(f"{_short(key)} {_shown(after)} (was {_shown(before)})")
    if len(found) > _MOST_SHOWN:
        found[_MOST_SHOWN - 1 :] = [f"{len(found) - _MOST_SHOWN + 1} more"]
    return found


def _changes(was: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The keys whose values differ, with both values; of nodes with another target only the names of their classes."""
    nodes = [node if isinstance(node, Mapping) else {} for node in (was, now)]
    if nodes == [{}, {}]:
        if was != now:
            yield key, was, now
        return
    classes = [str(node["target"]).rpartition(".")[2] if node.get("target") else None for node in nodes]
    if classes[0] != classes[1]:
        yield key, classes[0], classes[1]
        return
    for name in dict.fromkeys([*nodes[0], *nodes[1]]):
        yield from _changes(nodes[0].get(name), nodes[1].get(name), f"{key}.{name}" if key else str(name))


def _short(key: str) -> str:
    """A dotted key without what every key has: "image_logger.batch_frequency"."""
    parts = [part for part in key.split(".") if part not in ("params", "lightning", "callbacks")]
    return ".".join(parts)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 0.1 else f"{value:g}"
    text = "none" if value is None else f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:50]}...{text[-1]}"


def plain(value: Any) -> Any:
    """A value of a configuration without OmegaConf's containers."""
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def epochs_done(state: Mapping[str, Any]) -> int:
    """How many epochs a state has done."""
    return int(state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def no_epochs_left(done: int, limit: int) -> str:
    """The message for a run that has no more epochs than are wanted."""
    more = setting("epochs", done + max(1, limit))
    return f"nothing is left to train: {done} of {limit} epochs are done; go on with {more}"
