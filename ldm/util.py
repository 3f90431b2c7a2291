"""Errors for users, checks, and objects built from the `target:` nodes of a YAML; imports nothing heavy."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ldm import signatures, values
from ldm.front_ends import spoken

if TYPE_CHECKING:
    from torch import nn


Item = TypeVar("Item")

MOST_CHARACTERS = 299 - len("warning: ")  # of a message to a user, which a console shows after such a word


class UserError(ValueError):
    """A mistake that the user can correct; the message is one line with the thing, its value and the remedy.

    Texts of the user may be of any length: the message is shortened as `brief` does. Settings in it are marked by
    `ldm.front_ends.setting`, and named as the user knows them.
    """

    exit_code = 1

    def __init__(self, message: object) -> None:
        text = str(message)
        if (
            "\nOriginal Traceback " in text
        ):  # torch raises the error of a loader process anew, with its traceback
            text = text.rstrip().splitlines()[-1].partition(": ")[2]
        super().__init__(brief(spoken(text)))

    def _render_traceback_(self) -> list[str]:
        """What IPython and notebooks show in place of a traceback."""
        return [f"error: {self}"]


class ConfigError(UserError):
    """A YAML names something that does not exist or does not fit."""


class UsageError(UserError):
    """A command line that is wrong."""

    exit_code = 2


def one_line(text: str) -> str:
    """Return a text with spaces for line breaks, and escapes for what a terminal acts upon or cannot be written."""
    text = re.sub(r"\s+", " ", text)
    return "".join(c if c.isprintable() or c in _KEPT else c.encode("unicode_escape").decode() for c in text)


# Joiners and the tags of flags, without which a name would look different.
_KEPT = frozenset(("\u200c", "\u200d", *map(chr, range(0xE0020, 0xE0080))))


def cut(text: str, limit: int) -> str:
    """Return a text of at most `limit` characters: "..." stands for the middle of a longer one."""
    if len(text) <= limit:
        return text
    kept = max(0, limit - 3)
    return f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"


def shown(value: object, limit: int = 60) -> str:
    """Return a value for a message: in one line, and cut; texts without quotes."""
    return cut(one_line(cut(value if isinstance(value, str) else repr(value), 10 * limit)), limit)


def brief(message: str) -> str:
    """Return a message in one line of fewer than 300 characters.

    Lists of known names are dropped first, then long words and quoted texts are cut, so that the remedy at the end
    stays.
    """
    message = one_line(cut(message, 10_000))
    if len(message) > MOST_CHARACTERS:
        message = _KNOWN_NAMES.sub("", message)
    for limit in (120, 80, 60, 40, 30):
        if len(message) > MOST_CHARACTERS:
            message = _LONG.sub(partial(_cut_match, limit=limit), message)
    return cut(message, MOST_CHARACTERS)


_KNOWN_NAMES = re.compile(r" \(known are [^()]*\)|; known are [^;]*(?=;)")
# A quoted text, or a long run of other characters.
_LONG = re.compile(r"""(?<!\w)'[^']+'(?!\w)|"[^"]+"|\S{31,}""")


def _cut_match(found: re.Match[str], limit: int) -> str:
    return cut(found[0], limit)


def counted(items: Sequence[Item], tell: Callable[[int, int], None], seconds: float = 10.0) -> Iterator[Item]:
    """Yield items, and between them call `tell(done, total)` whenever another `seconds` have passed."""
    told = time.monotonic()
    for done, item in enumerate(items):
        if done and time.monotonic() - told >= seconds:
            tell(done, len(items))
            told = time.monotonic()
        yield item


def check_integer(value: Any, name: str, minimum: int = 1, error: type[UserError] = UserError) -> int:
    """Return the value called `name` if it is an int (not a bool) of at least `minimum`; raise `error` otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise error(f"{name} is {value!r}; it must be a whole number of at least {minimum}")
    return value


def check_value(label: str, value: Any, name: str, kind: Any) -> None:
    """Raise UserError unless a value has a type, and is in the range of `name` in `ldm.values`."""
    for _, misfit, requirement in values.misfits(name, value, kind):
        raise UserError(f"{label} is {shown_value(misfit)}; it must be {requirement}")


def check_together(**params: Any) -> None:
    """Raise UserError if one of some parameters contradicts the others; see `ldm.values.contradictions`."""
    for name, why in values.contradictions(params):
        raise UserError(f"{name} {why}")


def best_device() -> str:
    """The device to compute on: a CUDA GPU, an Apple GPU, or the CPU. Every default device in this library is this."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu" if why_no_mps() else "mps"


def why_no_mps() -> str | None:
    """Why there is no Apple GPU to compute on; None if there is one."""
    import torch

    if os.environ.get("DISABLE_MPS") == "1":  # Lightning's switch
        return "the variable DISABLE_MPS is 1"
    if not torch.backends.mps.is_built():
        return "this build of torch has no support for Apple GPUs (Metal)"
    if not torch.backends.mps.is_available():
        return "torch finds no Apple GPU here; it needs macOS 12.3"
    if platform.machine() not in ("arm64", "arm"):
        return "Lightning supports the GPUs of Apple's own processors alone"
    return None


def free_memory() -> None:
    """Give the memory that torch keeps on GPUs back."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif best_device() == "mps":
        torch.mps.empty_cache()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for this block; afterwards each submodule returns to its own mode.

    Only submodules that are in training mode are touched: of a frozen model, few are.
    """
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


# Targets in saved runs and models -> where they are now.
_MOVED = {
    "ldm.modules.losses.contperceptual.DummyLoss": "torch.nn.Identity",
    "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator": "ldm.modules.losses.LPIPSWithDiscriminator",
    "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": "ldm.modules.losses.VQLPIPSWithDiscriminator",
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": (
        "ldm.modules.losses.VQLPIPSWithDiscriminator"
    ),
    "ldm.models.muon.MuonWithAdamW": "ldm.models.optimizers.MuonWithAdamW",
    "ldm.models.sphere.SphereSGD": "ldm.models.optimizers.SphereSGD",
    "ldm.models.contrastive.ContrastiveCLIP": "ldm.models.two_towers.ContrastiveCLIP",
    "ldm.training.callbacks.tripwires.Tripwires": "ldm.training.callbacks.guard.TrainingGuard",
    "ldm.training.callbacks.health.Health": "ldm.training.callbacks.guard.VectorStats",
    "ldm.training.callbacks.deterministic_loss.DeterministicLoss": (
        "ldm.training.callbacks.fixed_loss.DeterministicLoss"
    ),
    "ldm.training.callbacks.summary_pictures.SummaryPictures": (
        "ldm.training.callbacks.summary_images.SummaryImages"
    ),
    "ldm.training.callbacks.compiled.CompiledDenoiser": "ldm.training.callbacks.performance.CompiledDenoiser",
    "ldm.training.callbacks.compiled.ChannelsLast": "ldm.training.callbacks.performance.ChannelsLast",
    "ldm.training.callbacks.cuda.CUDACallback": "ldm.training.callbacks.performance.CUDACallback",
    # main.py re-exports these; the installed command runs in folders from which no main.py can be imported.
    "main.DataModuleFromConfig": "ldm.training.data.DataModuleFromConfig",
    "main.WrappedDataset": "ldm.training.data.WrappedDataset",
    "main.ImageLogger": "ldm.training.callbacks.image_logger.ImageLogger",
    "main.SetupCallback": "ldm.training.callbacks.checkpoint.SetupCallback",
    "main.CUDACallback": "ldm.training.callbacks.performance.CUDACallback",
}


def get_obj_from_str(path: str) -> Any:
    """Import the object at a dotted path; paths of earlier versions are translated.

    Raises:
        ConfigError: the module does not exist, it needs a missing package, or it has no such name.
    """
    path = _dotted(path)
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(missing + "."):
            raise _absent(path, missing) from error
        raise ConfigError(
            f"target '{path}': module '{module_name}' needs the package '{missing}'; install it"
        ) from error
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise _absent(path, module_name, name) from error


def current_path(path: str) -> str:
    """The dotted path of a class now, by one of an earlier version."""
    return _MOVED.get(path, path)


def _dotted(path: str) -> str:
    path = current_path(str(path))
    if "." not in path or not all(path.split(".")):
        raise ConfigError(f"target '{path}' is not a dotted path; write it as package.module.Name")
    return path


def _absent(path: str, module: str, name: str | None = None) -> ConfigError:
    what = f"there is no module '{module}'" if name is None else f"module '{module}' has no '{name}'"
    install = "" if "." in module or name is not None else ", or install the package that has it"
    return ConfigError(f"target '{path}': {what}; check its spelling{install}")


def stand_in(path: str) -> Any:
    """What `get_obj_from_str` imports, as far as signatures go, read from its source; None if that is not enough.

    Raises:
        ConfigError: the module does not exist, or has no such name.
    """
    path = _dotted(path)
    try:
        return signatures.declared(path)
    except signatures.Absent as error:
        raise _absent(path, *error.args) from error


def absent_packages(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the problem of each target of another package that is not installed; nothing is imported.

    None, if a package of the user's own is among the targets: it may bring others within reach.
    """
    targets: dict[str, str] = {}

    def visit(node: Any, where: str) -> None:
        if isinstance(node, Mapping):
            if isinstance(node.get("target"), str):
                targets[where] = str(node["target"])
            for key, value in node.items():
                visit(value, f"{where}.{key}" if where else str(key))

    visit(config, "")
    others = {
        where: top
        for where, target in targets.items()
        if (top := _dotted(target).partition(".")[0]) not in signatures.PACKAGES
    }
    if all(signatures.is_absent(top) for top in others.values()):
        for where, top in others.items():
            yield Problem(f"{where}.target", where, f": {_absent(targets[where], top)}")


def instantiate_from_config(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build the object that a node `{target: dotted.path, params: {...}}` describes.

    `extra` keyword arguments are added to the params.

    Raises:
        ConfigError: the node has no target, the target does not exist, or the params do not fit its signature.
    """
    target = _target_of(config)
    factory = get_obj_from_str(target)
    params = _params_of(config)
    raise_problems(list(_call_problems(factory, params, params | extra, f"{target}: ", f"{target}: ")))
    try:
        return factory(**params, **extra)
    except TypeError as error:
        # A class that gives a parameter of its base class itself.
        if twice := re.search(r"multiple values for keyword argument '(\w+)'", str(error)):
            raise ConfigError(f"{target} sets '{twice[1]}' itself; remove it from the params") from error
        raise


class Problem(NamedTuple):
    """What is wrong with a key of a configuration; its place in a file goes between `what` and `rest`."""

    key: str
    what: str
    rest: str = ""


def check_config(
    config: Mapping[str, Any], where: str = "config", place: Callable[[str], str] = lambda key: ""
) -> None:
    """Check every `target` node in `config` without building anything.

    `place` gives the place of a key in a file, such as " (a.yaml, line 3)".

    Raises:
        ConfigError: one error that lists all problems: unknown targets, unknown and missing keys, values that do not
            fit their types or ranges.
    """
    raise_problems(list(config_problems(config, where)), place)


def refuse_foreign_target(target: object, name: str) -> None:
    """Raise ConfigError for the target of another code base's model; `name` is what messages call the YAML."""
    if str(target).startswith("sgm."):
        raise ConfigError(
            f"{name} is a YAML of Stability's generative-models, whose classes are not here; leave it out, and the "
            "YAML follows from the model"
        )


def raise_problems(problems: Sequence[Problem], place: Callable[[str], str] = lambda key: "") -> None:
    """Raise a ConfigError that lists problems, if there are any; a UsageError if one was set by a flag."""
    if problems:
        found = [place(one.key) for one in problems]
        lines = [f"{one.what}{where}{one.rest}" for one, where in zip(problems, found, strict=True)]
        by_flag = any(spoken(where).startswith(" (--") for where in found)
        raise (UsageError if by_flag else ConfigError)("; ".join(lines))


def misfits(key: str, value: Any, hint: Any) -> Iterator[Problem]:
    """Yield the problems of a value at a key that does not fit an annotation and the range of its name."""
    *above, name = key.split(".")
    for found, misfit, requirement in values.misfits(name, value, hint):
        where = ".".join([*above, found])
        yield Problem(where, f"{where} is {shown_value(misfit)}", f"; it must be {requirement}")


# Returns what is at a dotted path, or None if that is not known; raises ConfigError if nothing is there.
Find = Callable[[str], Any]


def config_problems(
    config: Mapping[str, Any], where: str, find: Find = get_obj_from_str
) -> Iterator[Problem]:
    """Yield the problems of every `target` node; their keys begin with `where`, the key of `config` itself.

    Nodes of which `find` returns None are not checked, but those in them are.
    """
    yield from _problems(config, where, "", find)


# Key of a node -> the argument that its owner adds when it builds the node, so that a YAML does not give it.
SUPPLIED_BY_OWNER = {"personalization_config": "embedder", "optimizer_config": "params"}
# Parameter that the owner of a node gives -> what a YAML sets instead.
_SET_ELSEWHERE = {("optimizer_config", "lr"): "model.base_learning_rate"}
# Parameters that are the arguments of another class or function, and those of them that its owner adds.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ddconfig": ("ldm.modules.diffusionmodules.model.Encoder", ("out_ch",)),
    "stop": ("ldm.training.callbacks.fixed_loss.Plateau", ()),
    "log_images_kwargs": ("ldm.models.diffusion.previews.preview_images", ("model", "batch")),
}
# Keys of a node; the learning rate is for whoever trains the model.
_NODE_KEYS = ("target", "params", "base_learning_rate")


def _problems(node: Any, where: str, owner_key: str, find: Find) -> Iterator[Problem]:
    if isinstance(node, Mapping):
        target = node.get("target")
        if isinstance(target, str):
            for key in node:
                if key not in _NODE_KEYS:
                    suggestion = _suggestion(str(key), list(_NODE_KEYS[:2]))
                    yield Problem(f"{where}.{key}", f"{where}: unknown key '{key}'", suggestion)
            yield from _target_problems(target, node.get("params"), where, owner_key, find)
        elif "target" in node:
            key = f"{where}.target"
            yield Problem(key, f"{key} is {shown_value(target)}", "; it must be a text: package.module.Name")
        for key, value in node.items():
            yield from _problems(value, f"{where}.{key}", str(key), find)
    elif isinstance(node, (list, tuple)) or type(node).__name__ == "ListConfig":
        for index, value in enumerate(node):
            yield from _problems(value, f"{where}[{index}]", "", find)


def _target_problems(target: str, params: Any, where: str, owner_key: str, find: Find) -> Iterator[Problem]:
    if params is not None and not isinstance(params, Mapping):
        yield Problem(f"{where}.params", f"{where}.params is {shown(params)}", "; it must be a mapping")
        return
    try:
        factory = find(target)
    except ConfigError as error:
        yield Problem(f"{where}.target", where, f": {error}")
        return
    if factory is None:
        return
    given = _params_of({"params": params})
    for name, value in given.items():
        if not isinstance(value, Mapping):
            continue
        key = f"{where}.params.{name}"
        if name in PARTS:
            part, supplied = PARTS[name]
            every = dict.fromkeys(supplied) | dict(value)
            if (function := find(part)) is not None:
                yield from _call_problems(function, value, every, f"{key}.", f"{key}: ")
        elif "target" not in value and (
            name.endswith("_config") or name == "lossconfig" or "params" in value
        ):
            yield Problem(key, key, " has no target; name a class: target: package.module.Name")
    added = {SUPPLIED_BY_OWNER[owner_key]: None} if owner_key in SUPPLIED_BY_OWNER else {}
    found = list(_call_problems(factory, given, given | added, f"{where}.params.", f"{where}: {target}: "))
    for (owner, name), instead in _SET_ELSEWHERE.items():
        if owner == owner_key and name in given:
            key = f"{where}.params.{name}"
            found.append(Problem(key, key, f" is set by the run; give {instead} instead"))
    yield from found
    for name, why in values.contradictions(given, _own_defaults(factory)) if not found else ():
        key = f"{where}.params.{name}"
        yield Problem(key, key, f" {why}")


def _target_of(config: Mapping[str, Any]) -> str:
    if not isinstance(config, Mapping) or not config.get("target"):
        raise ConfigError(f"a config node needs a 'target', got {config!r}"[:200])
    return config["target"]


def _params_of(config: Mapping[str, Any]) -> dict[str, Any]:
    params = config.get("params")
    return {str(key): params[key] for key in params} if params else {}


def _call_problems(
    factory: Any, params: Mapping[str, Any], all_params: Mapping[str, Any], where: str, named: str
) -> Iterator[Problem]:
    """Why `factory(**all_params)` would fail; only the values of `params` are checked."""
    accepted = _accepted(factory)
    if accepted is None:
        return
    names = [p.name for p in accepted if p.kind in _BY_KEYWORD]
    if not any(p.kind is p.VAR_KEYWORD for p in accepted):
        for key in all_params:
            if key not in names:
                yield Problem(f"{where}{key}", f"{named}unknown key '{key}'", _suggestion(key, names))
    missing = [
        p.name
        for p in accepted
        if p.default is p.empty and p.kind in _BY_KEYWORD and p.name not in all_params
    ]
    if missing:
        keys = ", ".join(f"'{name}'" for name in missing)
        yield Problem(where.removesuffix(".").removesuffix(".params"), f"{named}missing key {keys}")
    for name, value, requirement in values.problems(factory, params):
        key = f"{where}{name}"
        yield Problem(key, f"{key} is {shown_value(value)}", f"; it must be {requirement}")


def shown_value(value: Any) -> str:
    """A value for a message, as a YAML has it: texts in quotes."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"'{shown(value)}'" if isinstance(value, str) else shown(value)


def _suggestion(key: str, names: list[str]) -> str:
    close = difflib.get_close_matches(key, names, n=1)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (known are {', '.join(names) or 'none'})" if len(names) <= 12 else ""


_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _accepted(factory: Any) -> list[inspect.Parameter] | None:
    """The parameters of a callable, or None if it has no signature.

    A constructor with **keywords passes them to the next class of the MRO, so the parameters of that are included.
    """
    try:
        own = list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature
        return None
    if not inspect.isclass(factory):
        return own
    for kind in (c for c in factory.__mro__[1:] if "__init__" in vars(c) and c is not object):
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
        own = [p for p in own if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in own}
        own += [p for p in inspect.signature(kind).parameters.values() if p.name not in names]
    return [p for p in own if p.kind is not p.VAR_KEYWORD]


def _own_defaults(factory: Any) -> dict[str, Any]:
    """The defaults of a callable by name, without those of further base classes: a class may give them itself."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return {}
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def accepts(factory: Any, name: str) -> bool:
    """Return whether a callable accepts a keyword; also one whose signature is not known."""
    accepted = _accepted(factory)
    if accepted is None:
        return True
    return any(p.kind is p.VAR_KEYWORD or (p.name == name and p.kind in _BY_KEYWORD) for p in accepted)


def default_of(factory: Any, name: str) -> Any:
    """The default of a keyword of a callable; None if it has none, or no such keyword."""
    found = [p.default for p in _accepted(factory) or () if p.name == name]
    return found[0] if found and found[0] is not inspect.Parameter.empty else None


_read_pretrained: ContextVar[bool] = ContextVar("read_pretrained", default=True)


@contextmanager
def skip_pretrained() -> Iterator[None]:
    """Within this block constructors do not read pretrained weights, because a checkpoint will supply them."""
    token = _read_pretrained.set(False)
    try:
        yield
    finally:
        _read_pretrained.reset(token)


def pretrained_wanted() -> bool:
    """Whether a constructor should read pretrained weights (see `skip_pretrained`)."""
    return _read_pretrained.get()
