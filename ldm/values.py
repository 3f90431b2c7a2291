"""What a parameter may be: its type by the annotation, its range by its name; imports nothing heavy.

YAMLs, dotted overrides and flags are checked by the one table `RANGES`.
"""

from __future__ import annotations

import collections.abc
import inspect
import math
import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high` that a parameter may be.

    `above` and `below` exclude the ends; `also` are further numbers. With `share`, a float is a share of at most 1, and
    whole numbers have the range.
    """

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False
    also: tuple[int, ...] = ()
    share: bool = False

    def holds(self, number: float) -> bool:
        if number in self.also:
            return True
        if self.share and isinstance(number, float):
            return (number > 0 if self.low else number >= 0) and number <= 1
        low, high = self.low, self.high
        if low is not None and (number <= low if self.above else number < low):
            return False
        return not (high is not None and (number >= high if self.below else number > high))

    def __str__(self) -> str:
        low, high = _number(self.low), _number(self.high)
        if self.low is None and self.high is None:
            text = ""
        elif self.high is None:
            text = f"above {low}" if self.above else f"of at least {low}"
        elif self.low is None:
            text = f"below {high}" if self.below else f"of at most {high}"
        elif self.above or self.below:
            text = f"{'above' if self.above else 'from'} {low} {'and below' if self.below else 'to'} {high}"
        else:
            text = f"from {low} to {high}"
        if self.share:
            text += ", or a share up to 1.0"
        return " ".join([text, *(f"or {number}" for number in self.also)]).strip()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _count(high: int | None = None, low: int = 1, *also: int) -> Range:
    return Range(low, high, also=also)


_SHARE, _POSITIVE, _AT_LEAST_0 = Range(0, 1), Range(0, above=True), Range(0)
_BATCHES = Range(0, share=True)
# The ranges of parameters of all classes and flags, and the texts that some may be. Of a list or mapping every entry
# has the range.
RANGES: dict[str, Range | tuple[str, ...]] = {
    # The run.
    "seed": Range(0, 2**32 - 1),
    "base_learning_rate": Range(0, 100, above=True),
    "max_steps": _count(None, 1, -1),
    "max_epochs": _count(None, 1, -1),
    "min_steps": _count(),
    "min_epochs": _count(),
    "accumulate_grad_batches": _count(10**6),
    "gradient_clip_val": _AT_LEAST_0,
    "gradient_clip_algorithm": ("norm", "value"),
    "limit_train_batches": Range(1, share=True),
    "limit_val_batches": _BATCHES,
    "limit_test_batches": _BATCHES,
    "limit_predict_batches": _BATCHES,
    "overfit_batches": _BATCHES,
    "val_check_interval": Range(1, share=True),
    "check_val_every_n_epoch": _count(),
    "num_sanity_val_steps": _count(None, 0, -1),
    "log_every_n_steps": _count(None, 0),
    "num_nodes": _count(4096),
    "devices": _count(1024, 1, -1),
    "fast_dev_run": Range(0),
    "profiler": ("simple", "advanced", "pytorch"),
    "reload_dataloaders_every_n_epochs": _count(None, 0),
    # Data.
    "batch_size": _count(10**6),
    "num_workers": _count(1024, 0),
    "size": _count(16384),
    "repeats": _count(10**6),
    "flip_p": _SHARE,
    "mixing_prob": _SHARE,
    "mask_weight": _SHARE,
    "crops": _count(64),
    "zooms": Range(1, 64),
    "interpolation": ("linear", "bilinear", "bicubic", "lanczos"),
    "count": _count(),
    "named": _SHARE,
    # Diffusion.
    "timesteps": Range(2, 10_000),
    "num_timesteps_cond": _count(10_000),
    "beta_schedule": ("linear", "cosine", "sqrt_linear", "sqrt"),
    "linear_start": Range(1e-7, 1, below=True),
    "linear_end": Range(1e-7, 1, below=True),
    "cosine_s": _SHARE,
    "given_betas": Range(0, 1, above=True, below=True),
    "conditioning_key": ("concat", "crossattn", "hybrid", "adm", "crossattn-adm"),
    "cond_stage_config": ("__is_first_stage__", "__is_unconditional__"),
    "parameterization": ("eps", "x0", "v"),
    "loss_type": ("l1", "l2"),
    "loss_weighting": ("none", "min_snr", "min_snr_plus_one"),
    "timestep_sampling": ("uniform", "stratified", "biased"),
    "timestep_range": _SHARE,
    "original_elbo_weight": _AT_LEAST_0,
    "embedding_reg_weight": Range(0, 10**6),
    "l_simple_weight": _AT_LEAST_0,
    "v_posterior": _SHARE,
    "min_snr_gamma": _POSITIVE,
    "ucg_rate": _SHARE,
    "ema_decay": _SHARE,
    "model_lr": _AT_LEAST_0,
    "scale_factor": _POSITIVE,
    # Networks.
    "image_size": _count(16384),
    "resolution": _count(16384),
    "channels": _count(2**16),
    "in_channels": _count(2**16),
    "out_channels": _count(2**16),
    "out_ch": _count(2**16),
    "ch": _count(2**16),
    "z_channels": _count(2**16),
    "model_channels": _count(2**16),
    "adm_in_channels": _count(2**16),
    "num_res_blocks": _count(64),
    "attention_resolutions": _count(2**16),
    "attn_resolutions": _count(2**16),
    "channel_mult": _count(256),
    "ch_mult": _count(256),
    "num_groups": _count(2**16),
    "num_heads": _count(1024, 1, -1),
    "num_head_channels": _count(2**16, 1, -1),
    "num_heads_upsample": _count(1024, 1, -1),
    "transformer_depth": _count(64, 0),
    "transformer_depth_middle": _count(64, 0),
    "context_dim": _count(2**16),
    "attn_type": ("vanilla", "none"),
    "dropout": Range(0, 1, below=True),
    "embed_dim": _count(2**16),
    "n_embed": _count(2**20),
    "n_layer": _count(256),
    "n_stages": _count(16, 0),
    "multiplier": _POSITIVE,
    "vocab_size": _count(2**24),
    "n_classes": _count(2**24),
    "max_seq_len": Range(3, 2**16),
    "max_length": Range(3, 2**16),
    "embedding_dropout": Range(0, 1, below=True),
    "lr_g_factor": _AT_LEAST_0,
    "latent_noise": _AT_LEAST_0,
    # Optimizers and schedules.
    "lr": _POSITIVE,
    "betas": Range(0, 1, below=True),
    "eps": Range(0, 1, above=True),
    "weight_decay": Range(0, 1000),
    "momentum": Range(0, 1, below=True),
    "damping": _POSITIVE,
    "matrix_factor": _POSITIVE,
    "kappa": Range(0, 10**6),
    "lr_start": Range(0, 10**6),
    "lr_max": Range(0, 10**6),
    "lr_min": Range(0, 10**6),
    "f_start": Range(0, 10**6),
    "f_max": Range(0, 10**6),
    "f_min": Range(0, 10**6),
    "warm_up_steps": _count(None, 0),
    "cycle_lengths": _count(),
    "max_decay_steps": _count(),
    "num_cycles": _count(10**6),
    "power": _POSITIVE,
    "verbosity_interval": _count(None, 0),
    # Personalizations.
    "num_vectors_per_token": _count(1000),
    "progressive_scale": _count(),
    "norm_control": ("fixed", "limited"),
    "norm_ratio": _POSITIVE,
    "stages": _count(10_000),
    "features": _count(4096),
    "hidden": _count(4096),
    "guidance": Range(1, 20, above=True),
    "nested_dropout": _SHARE,
    "bypass": _SHARE,
    "residual_rate": _POSITIVE,
    "context_weight": _AT_LEAST_0,
    "prompts_per_step": _count(1024),
    "negative_vectors": _count(1000),
    "negative_rate": _POSITIVE,
    # Callbacks.
    "every_n_train_steps": _count(),
    "every_n_steps": _count(),
    "every_n_epochs": _count(None, 0),
    "save_top_k": _count(None, 0, -1),
    "batch_frequency": _count(None, 0),
    "max_images": _count(1024, 0),
    "images_per_prompt": _count(1024),
    "N": _count(1024),
    "n_row": _count(1024),
    "keep": _count(),
    "formats": ("original", "safetensors", "diffusers", "a1111", "a1111-png", "onetrainer"),
    "memory_mib": _count(2**24, 0),
    "rollbacks": _count(None, 0),
    "samples": _count(10**6),
    "smooth": _count(),
    "least_steps": _count(None, 0),
    "rows": _count(10**4),
    "window": Range(2),
    "threshold": Range(0, 1, above=True, below=True),
    "steps": _count(10_000),
    # Sampling.
    "ddim_steps": _count(10_000),
    "ddim_eta": _SHARE,
    "eta": _SHARE,
    "scale": Range(-1000, 1000),
    "strength": Range(0, 2),  # of a residual
    "edit_strength": _SHARE,
    "concept_strength": Range(0, 10),
    "guidance_scale": Range(-1000, 1000),
    "image_seed": Range(0, 2**63 - 1),
    "height": _count(16384),
    "width": _count(16384),
    "n_samples": _count(1024),
    "n_iter": _count(10_000),
    "n_rows": _count(10_000),
    "rate": _POSITIVE,
    "captions": _count(10**6),
}


# Lists that must not be empty, beside those in place of a single number.
_FILLED = ("channel_mult", "ch_mult", "cycle_lengths", "given_betas", "zooms", "timestep_range")


def problems(factory: Any, params: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield each parameter of `factory(**params)` whose value does not fit: name, value, and what it must be.

    The name of an entry of a list or mapping is followed by its index: "betas[0]".
    """
    for name, value in params.items():
        parameter, _ = _parameter(factory, name)
        if parameter is not None and not _same(value, parameter.default):
            yield from misfits(name, value, hint(factory, name))


def hint(factory: Any, name: str) -> Any:
    """The annotation of a parameter of a function or class; Any if it has none."""
    parameter, namespace = _parameter(factory, name)
    return Any if parameter is None else _evaluated(parameter.annotation, namespace)


# Keys of a latent diffusion model that hold one number: the channels of its latents.
_CHANNELS = (
    ("unet_config", "params", "in_channels"),
    ("unet_config", "params", "out_channels"),
    ("first_stage_config", "params", "embed_dim"),
)
_STAGES = ("personalization_config", "params", "stages")
# Of these a personalization learns at least one.
_LEARNED = ("learn_input", "residual", "residual_layers")


def contradictions(
    given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield each parameter of a node that contradicts others of it, and why: "is 1, but channels is 2".

    `defaults` are those of the class; a parameter that is in neither is not checked.
    """
    params = {**(defaults or {}), **given}
    yield from _contradictions_of_a_model(given, params)
    yield from _contradictions_of_words(params)
    yield from _contradictions_of_images(params)


def _contradictions_of_a_model(
    given: Mapping[str, Any], params: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    start: Any = params.get("linear_start")
    end: Any = params.get("linear_end")
    if _is_number(start) and _is_number(end) and start > end:
        yield "linear_start", f"is {start}, more than linear_end, which is {end}; exchange them"
    key = given.get("conditioning_key")
    learns = given.get("personalization_config") is not None and "conditioning_key" in given
    if learns and key not in ("crossattn", "hybrid", "crossattn-adm"):
        yield "conditioning_key", f"is {key or 'null'}, but a learned word needs crossattn; set that"
    for path in _CHANNELS if key in ("crossattn", "crossattn-adm") and "channels" in given else ():
        value = at(given, path)
        if value is not None and value != given["channels"]:
            yield (
                ".".join(path),
                f"is {value}, but channels of the model is {given['channels']}; make them equal",
            )
    span: Any = given.get("timestep_range")
    if span is not None and not (len(span) == 2 and span[0] < span[1]):
        yield (
            "timestep_range",
            f"is {[*span]}; give two fractions of the schedule, the first less, such as [0.1, 0.9]",
        )
    groups, width, factors = (at(given, ("ddconfig", name)) for name in ("num_groups", "ch", "ch_mult"))
    if isinstance(groups, int) and groups > 0 and isinstance(width, int):
        widths = [width * factor for factor in factors or () if isinstance(factor, int)]
        if wrong := [one for one in widths if one % groups]:
            yield "ddconfig.num_groups", f"is {groups}, no divisor of {wrong[0]}, a level's channels; use one"
    steps, stages = params.get("timesteps"), at(given, _STAGES)
    if isinstance(steps, int) and isinstance(stages, int) and stages > steps:
        yield ".".join(_STAGES), f"is {stages}, and the model has {steps} timesteps; use fewer"


def _contradictions_of_words(params: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if {*_LEARNED} <= params.keys() and not any(params.get(name) for name in _LEARNED):
        yield "learn_input", "is false, and so are residual and residual_layers; set one of them to true"
    if "context_weight" in params:  # of CoRe
        from ldm.front_ends import setting
        from ldm.prompts import PER_IMAGE_TOKENS
        from ldm.words import paired

        for prompt in params.get("prompts") or ():
            if "{}" not in prompt:
                yield "prompts", f"holds '{prompt[:60]}', which has no {{}} for the word; add it"
        strings, initial = paired(params.get("placeholder_strings"), params.get("initializer_words"))
        # The word of a single training image has no initializer, and nothing else in a prompt to change.
        named = {*PER_IMAGE_TOKENS} | {word for word, text in zip(strings, initial, strict=False) if text}
        for word in [word for word in strings if word not in named][:1]:
            yield (
                "initializer_words",
                f"has none for '{word}', and CoRe compares each word with its initializer; add one, or give it with "
                f"{setting('init')}",
            )


def _contradictions_of_images(params: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    crops: Any = params.get("crops")
    zooms: Any = params.get("zooms")
    if not isinstance(crops, int) or not _is_sequence(zooms):
        return
    zoomed = [*zooms] != [1]
    for name, more in (("crops", crops > 1), ("zooms", zoomed)):
        if more and not params.get("center_crop", True):
            yield name, "needs square crops, but center_crop: false stretches images; remove one of them"
    if zoomed and params.get("size") is None:
        yield "zooms", "needs a size, to which all crops are resized; set size"


def at(node: Any, path: Sequence[str]) -> Any:
    """The value at a path of keys of mappings; None if there is none."""
    for part in path:
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def misfits(name: str, value: Any, hint: Any, ranged: str | None = None) -> Iterator[tuple[str, Any, str]]:
    """Yield (name, value, requirement) for a value that does not fit an annotation and the range of its name.

    `ranged` is a key of `RANGES` to use instead of the name; an empty one stands for no range.
    """
    yield from _misfits(name, value, hint, RANGES.get(name if ranged is None else ranged))


def plain(value: Any) -> Any:
    """Return numbers and arrays of numpy and torch, and containers of them, as Python's; other values unchanged."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    listed = getattr(value, "tolist", None)
    return listed() if callable(listed) else value


def named_number(text: str) -> tuple[str, float]:
    """Return the name and the number of a text NAME=NUMBER.

    Raises:
        UserError: it is another text, or the number is not finite.
    """
    from ldm.util import UserError, shown

    name, _, number = text.partition("=")
    if not name.strip() or not _reads_as_number(number):
        raise UserError(f"'{shown(text)}' is not a NAME=NUMBER, such as truncation=32")
    return name.strip(), float(number)


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and value == default)


def _parameter(factory: Any, name: str) -> tuple[inspect.Parameter | None, dict[str, Any]]:
    """The parameter of a function, or of a class's constructors from itself to its ancestors, and their names."""
    functions = [factory]
    if inspect.isclass(factory):
        functions = [
            vars(c)["__init__"] for c in factory.__mro__ if "__init__" in vars(c) and c is not object
        ]
    for function in functions:
        function = inspect.unwrap(function)
        try:
            parameter = inspect.signature(function).parameters.get(name)
        except (TypeError, ValueError):  # some builtins have no signature
            continue
        if parameter is not None:
            return parameter, getattr(function, "__globals__", {})
    return None, {}


def _evaluated(annotation: Any, namespace: dict[str, Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, dict(namespace))
    except Exception:  # a name that only a type checker imports
        return Any


def _misfits(
    name: str, value: Any, hint: Any, allowed: Range | tuple[str, ...] | None
) -> Iterator[tuple[str, Any, str]]:
    kinds = list(_kinds(hint))
    if not kinds or Any in kinds:
        return
    for kind in kinds:
        if _fits(value, kind):
            if _is_sequence(value):
                if not len(value) and (name in _FILLED or int in kinds):
                    yield name, value, _requirement(kinds, allowed) + " that is not empty"
                for index, item in enumerate(value):
                    yield from _misfits(f"{name}[{index}]", item, _item_hint(kind, index), allowed)
                lengths = _length(kind)
                if lengths is not None and len(value) != lengths:
                    yield name, value, f"a list of {lengths}"
            elif isinstance(value, Mapping):
                for key, item in value.items():
                    yield from _misfits(f"{name}.{key}", item, _value_hint(kind), allowed)
            elif isinstance(value, str) and isinstance(allowed, tuple) and value not in allowed:
                yield name, value, f"one of {', '.join(allowed)}"
            elif _is_number(value) and (
                not is_finite(value) or (isinstance(allowed, Range) and not allowed.holds(value))
            ):
                yield name, value, _requirement(kinds, allowed)
            return
    yield name, value, _requirement(kinds, allowed) + _hint(value, kinds)


def _kinds(hint: Any) -> Iterator[Any]:
    """The alternatives of an annotation that a YAML can hold; Any for one that is not known."""
    if hint is Any:
        yield Any
    elif hint is None or hint is types.NoneType:
        yield types.NoneType
    elif get_origin(hint) in (Union, types.UnionType):
        for part in get_args(hint):
            yield from _kinds(part)
    elif hint in (bool, int, float, str) or get_origin(hint) is Literal:
        yield hint
    elif hint is os.PathLike or get_origin(hint) is os.PathLike or _is_path(hint):
        yield str
    elif _origin(hint) is not None:
        yield hint


def _is_path(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, os.PathLike)


def _origin(hint: Any) -> Any:
    """Sequence or Mapping for an annotation of a list or mapping, else None."""
    origin = get_origin(hint) or hint
    if not inspect.isclass(origin):
        return None
    if issubclass(origin, collections.abc.Mapping):
        return Mapping
    # Not Iterable alone, of which a generator of parameters is one too.
    return Sequence if issubclass(origin, collections.abc.Sequence) else None


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or type(value).__name__ == "ListConfig"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(number: float) -> bool:
    """Whether a number is neither NaN nor infinite, nor a whole one beyond all floats."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if kind is types.NoneType:
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return _is_number(value)
    if kind is str:
        return isinstance(value, (str, os.PathLike))
    if _origin(kind) is Mapping:
        return isinstance(value, Mapping)
    return _is_sequence(value)


def _item_hint(kind: Any, index: int) -> Any:
    arguments = get_args(kind)
    if not arguments:
        return Any
    if _length(kind) is not None:
        return arguments[min(index, len(arguments) - 1)]
    return arguments[0]


def _length(kind: Any) -> int | None:
    arguments = get_args(kind)
    return len(arguments) if get_origin(kind) is tuple and Ellipsis not in arguments else None


def _value_hint(kind: Any) -> Any:
    arguments = get_args(kind)
    return arguments[1] if len(arguments) == 2 else Any


_NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _requirement(kinds: Sequence[Any], allowed: Range | tuple[str, ...] | None) -> str:
    texts: list[str] = []
    choices = dict.fromkeys(
        str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)
    )
    for kind in kinds:
        if kind in (int, float) and isinstance(allowed, Range):
            if allowed.share and {int, float} <= {*kinds}:
                kind = int
            texts.append(f"{_NOUNS[kind]} {allowed}".strip())
        elif kind is str and isinstance(allowed, tuple):
            texts.append(f"one of {', '.join(allowed)}")
        elif get_origin(kind) is Literal:
            texts.append(f"one of {', '.join(choices)}")
        elif kind is types.NoneType:
            texts.append("null")
        elif kind in _NOUNS:
            texts.append(_NOUNS[kind])
        else:
            texts.append("a mapping" if _origin(kind) is Mapping else "a list")
    found = list(dict.fromkeys(texts))
    return " or ".join(found)


def _hint(value: Any, kinds: Iterable[Any]) -> str:
    """What is to be written instead of a value whose type alone is wrong."""
    kinds = list(kinds)
    if isinstance(value, str):
        word = value.strip()
        if bool in kinds and word.lower() in ("true", "false", "yes", "no", "on", "off"):
            return "; write it without quotes"
        if (int in kinds or float in kinds) and _reads_as_number(word):
            return "; write it without quotes"
    elif str in kinds and isinstance(value, (bool, int, float)):
        return "; write it in quotes"
    return ""


def _reads_as_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
