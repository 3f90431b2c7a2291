"""Files of weights: their tensors, mapped into memory, and the names and shapes in them without the numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm import pickles
from ldm.files import NO_TENSORS, atomic_write, file_kind, is_hub_id
from ldm.front_ends import setting
from ldm.outlines import outline_of
from ldm.util import UserError

# What a file is can be said without torch, which takes seconds to import; its tensors cannot be read without.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not belong to the model."""


class Header(NamedTuple):
    """What a file of weights says before its numbers: names with shapes, and notes such as `modelspec.*`."""

    shapes: Shapes
    notes: dict[str, str]


class _Inert:
    """Replaces a class that an old checkpoint names beside its weights; its instances are never used."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


# Lightning 1.x kept its callbacks in the checkpoint, keyed by class or holding instances of these.
_LIGHTNING_CLASSES = [
    (_Inert, f"{package}.{name}")
    for package in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric")
    for name in (
        "callbacks.model_checkpoint.ModelCheckpoint",
        "callbacks.early_stopping.EarlyStopping",
        "utilities.parsing.AttributeDict",
    )
]


def _numpy_classes() -> list[Any]:
    """Return the classes that a pickled numpy scalar needs, under the module names of numpy 1 and 2."""
    import numpy as np
    from numpy._core.multiarray import _reconstruct, scalar

    dtypes = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i2", "i4", "i8", "u1", "?")]
    named = [(scalar, "numpy.core.multiarray.scalar"), (_reconstruct, "numpy.core.multiarray._reconstruct")]
    return [scalar, _reconstruct, *named, np.dtype, np.ndarray, *dtypes, np.float64, np.float32, np.int64]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint on the CPU, mapped into memory where the file allows it.

    The content decides whether the file is safetensors or a PyTorch file; of a training checkpoint, the
    `state_dict` is returned. Raises UserError if the file is missing, damaged, or not a checkpoint.
    """
    kind = file_kind(path)
    if kind in NO_TENSORS:
        raise CheckpointError(f"checkpoint '{path}' {NO_TENSORS[kind]}")
    if kind == "safetensors":
        return _read_safetensors(path)
    tensors = _tensors(_unpickled(path), path)
    if not tensors:
        raise CheckpointError(f"checkpoint '{path}' holds no weights of a model; name another file")
    return tensors


def read_header(path: str | Path) -> Header:
    """Return the names and shapes in a file of weights, without reading the weights.

    Of a mapping of mappings, as a file of AUTOMATIC1111 holds, the names are joined by dots. Raises UserError if the
    file is missing, damaged or truncated.
    """
    kind = file_kind(path)
    if kind in NO_TENSORS:
        raise CheckpointError(f"checkpoint '{path}' {NO_TENSORS[kind]}")
    if kind != "safetensors":
        try:
            content = outline_of(Path(path), kind).pickle.content
        except pickles.PickleError as error:
            raise CheckpointError(f"checkpoint '{path}': {error}") from error
        step = content.get("global_step") if isinstance(content, Mapping) else None
        return Header(
            {_current(key): shape for key, shape in pickles.shapes_of(_state_of(content)).items()},
            {"global_step": str(step)} if isinstance(step, int) else {},
        )
    entries = _entries(path)
    notes = entries.pop("__metadata__", None) or {}
    shapes = {_current(key): tuple(entry["shape"]) for key, entry in entries.items()}
    return Header(shapes, {str(key): str(value) for key, value in notes.items()})


def _entries(path: str | Path) -> dict[str, Any]:
    """The header of a safetensors file, by names in the order of the file."""
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, size)))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            ordered = sorted(
                tensors.items(), key=lambda item: (item[1]["data_offsets"][0], len(item[1]["shape"]))
            )
        except (ValueError, TypeError, KeyError, AttributeError, LookupError) as error:
            if length > size - 8:
                raise CheckpointError(
                    f"checkpoint '{path}' is truncated or damaged; download it again"
                ) from error
            raise CheckpointError(f"checkpoint '{path}' is damaged; download it again") from error
    if 8 + length + end > size:
        raise CheckpointError(
            f"checkpoint '{path}' is truncated: {size:,} of {8 + length + end:,} bytes are there; download it again"
        )
    return dict(ordered) | {"__metadata__": header.get("__metadata__")}


def _unpickled(path: str | Path) -> Any:
    from torch import nn

    # ParameterDict is what embedding files hold: with it they are recognised, and not called damaged.
    classes = [*_LIGHTNING_CLASSES, *_numpy_classes(), nn.ParameterDict]
    return pickles.load(path, classes=classes, mmap=True, what=f"checkpoint '{path}'")


# Where checkpoints hold the weights of a model, if not at the top.
_STATES = ("state_dict", "model", "module")


def _state_of(content: Any) -> Any:
    """The mapping with the weights in a checkpoint."""
    for name in _STATES:
        inside = content.get(name) if isinstance(content, Mapping) else None
        if isinstance(inside, Mapping):
            return inside
    return content


def _tensors(content: Any, path: str | Path) -> dict[str, Tensor]:
    from torch import Tensor

    state = _state_of(content)
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"checkpoint '{path}' holds {type(content).__name__}, not a state dict; name a model's file"
        )
    return {_current(str(key)): value for key, value in state.items() if isinstance(value, Tensor)}


# What training on several devices puts before each name, and torch.compile before any part of it.
_WRAPPERS = ("module.", "_forward_module.")
_COMPILED = "_orig_mod."


def _current(key: str) -> str:
    """The name of today: without wrappers, and with a level that older anime models leave out."""
    key = key.replace(_COMPILED, "")
    key = next((key.removeprefix(start) for start in _WRAPPERS if key.startswith(start)), key)
    start, _, rest = key.partition("cond_stage_model.transformer.")
    if start or not rest.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
        return key
    return f"cond_stage_model.transformer.text_model.{rest}"


# Bytes of a file that are mapped at once: what a model copies from is given back in pieces of this size.
_PIECE = 32 << 20


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    pieces: dict[int, list[str]] = {}
    for name, entry in _entries(path).items():
        if name != "__metadata__":
            pieces.setdefault(entry["data_offsets"][0] // _PIECE, []).append(name)
    tensors = {}
    try:
        for names in pieces.values():
            with safe_open(path, framework="pt") as file:
                tensors.update({_current(name): file.get_tensor(name) for name in names})
    except SafetensorError as error:
        raise CheckpointError(
            f"checkpoint '{path}' is damaged ({str(error)[:120]}); download it again"
        ) from error
    return tensors


def save_state_dict(state: Mapping[str, Tensor], path: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write tensors as safetensors, weights of the network in `dtype` if given.

    Scalars and the noise schedule's buffers stay in float32: half precision would change every sample.
    """
    from safetensors.torch import save

    kept = {}
    for key, value in state.items():
        is_weight = "." in key and value.is_floating_point() and value.ndim > 0
        kept[key] = (value.to(dtype) if dtype and is_weight else value).detach().cpu().contiguous().clone()
    return atomic_write(path, lambda file: file.write(save(kept, {"format": "pt"})))


# -- folders of diffusers, and the hub -----------------------------------------------------------------------

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
PARTS = ("unet", "vae", *TEXT_ENCODERS)
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_ALWAYS = ("unet", "vae", "text_encoder", "tokenizer")  # in a folder of whatever family
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.(?P<variant>[\w-]+?))?(?:-(?P<number>\d{5})-of-(?P<count>\d{5}))?(?:\.(?P<late>[\w-]+))?"
    r"\.(?P<format>safetensors|bin)"
)


def weight_files(names: Iterable[str], variant: str | None = None) -> list[str]:
    """Choose one set of weights among the file names of a part: of the variant, without one, or of any.

    Weights in the format safetensors come first. Returns one name, or those of all shards, or nothing.
    """
    sets: dict[tuple[str | None, str], list[str]] = {}
    for name in sorted(names):
        if match := _WEIGHTS.fullmatch(name):
            sets.setdefault((match["variant"] or match["late"], match["format"]), []).append(name)
    others = sorted(
        {found for found, _ in sets if found}, key=lambda found: (found == "non_ema", found != "fp16")
    )
    for wanted in (variant, None, *others):
        for suffix in ("safetensors", "bin"):
            if found := sets.get((wanted, suffix)):
                whole = [name for name in found if "-of-" not in name]
                return whole[:1] or _one_set(found)
    return []


def _one_set(shards: list[str]) -> list[str]:
    """Of the shards of one or more sets, those of a complete set, else of the one that most are there of."""
    sets: dict[str, list[str]] = {}
    for name in shards:
        sets.setdefault(name[name.index("-of-") :][4:9], []).append(name)
    return max(sets.items(), key=lambda item: (len(item[1]) == int(item[0]), len(item[1])))[1]


def check_variant(source: str, names: Iterable[str], variant: str | None) -> None:
    """Check that the denoiser among the files of a model has weights of a variant, if one is asked for.

    Raises:
        CheckpointError: it has others only.
    """
    chosen = weight_files([name.removeprefix("unet/") for name in names if name.startswith("unet/")], variant)
    if variant is None or not chosen:
        return
    found = _WEIGHTS.fullmatch(chosen[0])
    if found is None or variant not in (found["variant"], found["late"]):
        raise CheckpointError(
            f"'{source}' has no weights of the variant '{variant}'; leave {setting('variant')} out, or name another"
        )


class Folder:
    """A folder in the layout of diffusers: unet, vae, text encoders, tokenizers and the scheduler's configuration.

    Args:
        path: the folder.
        variant: which weights to read, such as fp16, where there are several.
    """

    def __init__(self, path: Path, variant: str | None = None) -> None:
        self.path, self.variant = path, variant

    @cached_property
    def names(self) -> list[str]:
        """The files in the folder and in the folders in it, by their paths from it."""
        found = [*self.path.glob("*"), *self.path.glob("*/*")]
        return sorted(file.relative_to(self.path).as_posix() for file in found if file.is_file())

    def index(self) -> dict[str, Any]:
        """The content of model_index.json; empty if there is none."""
        return self._json("model_index.json")

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of a part; empty if there is none."""
        return self._json(
            f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json".lstrip("/")
        )

    def weights(self, part: str) -> list[Path]:
        """The files with the weights of a part; none if there are none.

        Raises:
            CheckpointError: some of the shards are missing.
        """
        return self._weights(part, f"{part}/")

    def own_weights(self) -> list[Path]:
        """The files with the weights of a folder that is itself such a part."""
        return self._weights("", "")

    def _weights(self, part: str, prefix: str) -> list[Path]:
        inside = [name.removeprefix(prefix) for name in self.names if name.startswith(prefix)]
        chosen = weight_files([name for name in inside if "/" not in name], self.variant)
        sharded = re.search(r"-of-(\d{5})", chosen[0]) if chosen else None
        if sharded and len(chosen) != int(sharded[1]):
            raise CheckpointError(
                f"'{self.path / part}' has {len(chosen)} of {int(sharded[1])} files of its weights; download the others"
            )
        return [self.path / prefix / name for name in chosen]

    def missing(self, parts: Sequence[str] = PARTS) -> list[str]:
        """Those of the parts, and of what belongs to them, that model_index.json names and the folder lacks.

        Nothing is missing in a folder of a first stage or a text encoder alone.
        """
        index = self.index()
        if not index and self.own_weights() and self.config(""):
            return []
        every = (*parts, *_TOKENIZERS, "scheduler")
        wanted = [part for part in every if ((index.get(part) or [None])[0] if index else part in _ALWAYS)]
        return [part for part in wanted if not self._has(part)]

    def _has(self, part: str) -> bool:
        if part in _TOKENIZERS:
            return any((self.path / part / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        if part == "scheduler":
            return (self.path / part / "scheduler_config.json").is_file()
        try:
            return bool(self.weights(part)) and (self.path / part / "config.json").is_file()
        except CheckpointError:  # some of the shards
            return False

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        if not file.is_file():
            return {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise CheckpointError(f"'{file}' is damaged; download it again") from error
        return content if isinstance(content, dict) else {}


def read_shards(files: Iterable[Path]) -> dict[str, Tensor]:
    """Return the tensors of all these files, mapped into memory where they allow it."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_state_dict(file)
    return tensors


def needed_files(
    names: Collection[str], variant: str | None = None, parts: Sequence[str] = PARTS
) -> list[str]:
    """Those files of a repository in the layout of diffusers that are read here; empty if it has another layout.

    `parts` are those whose weights are needed.
    """
    wanted = [name for name in names if name.startswith(tuple(f"{part}/" for part in _TOKENIZERS))]
    weights: dict[str, list[str]] = {}
    for part in PARTS:
        inside = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        weights[part] = [f"{part}/{name}" for name in weight_files(inside, variant)]
    wanted += [name for part in parts for name in weights[part]]
    if not weights["unet"]:  # a first stage or a text encoder may be a repository of its own
        alone = weight_files([name for name in names if "/" not in name], variant)
        return ["config.json", *alone] if alone and "config.json" in names else []
    settings = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        *(f"{part}/config.json" for part in PARTS),
    ]
    return sorted([*wanted, *(name for name in settings if name in names)])


def located(
    source: str | Path,
    variant: str | None = None,
    revision: str | None = None,
    parts: Sequence[str] = PARTS,
) -> Path:
    """Return the file or folder that was named, or the folder that a hub id was fetched to (see `fetch`)."""
    path = Path(source)
    if path.exists() or not is_hub_id(str(source)):
        return path
    return fetch(str(source), variant, revision, parts)


def fetch(
    repository: str,
    variant: str | None = None,
    revision: str | None = None,
    parts: Sequence[str] = PARTS,
) -> Path:
    """Return the folder of a model of the hub, downloaded with a progress bar unless it is there already.

    `parts` are those whose weights are needed; the others are not downloaded.

    Raises:
        CheckpointError: there is no such model, it has another layout, or the hub cannot be reached.
    """
    import huggingface_hub as hub

    missing: list[str] = []
    try:
        cached = Path(hub.snapshot_download(repository, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # what the hub raises if nothing is there
        pass
    else:
        missing = Folder(cached, variant).missing(parts)
        try:
            check_variant(repository, Folder(cached).names, variant)
        except CheckpointError:
            missing.append(f"variant {variant}")
        if not missing:
            return cached
    try:
        siblings = hub.HfApi().model_info(repository, revision=revision).siblings or []
        names = [entry.rfilename for entry in siblings]
        check_variant(repository, names, variant)
        wanted = needed_files(names, variant, parts)
        if wanted:
            return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except CheckpointError:
        raise
    except Exception as error:  # of many kinds: no connection, no such repository, no access, a full disk
        lacks = f"its {', '.join(missing)} is neither here" if missing else "it is no file or folder here"
        raise CheckpointError(
            f"'{repository}': {lacks} nor readable from the Hugging Face hub ({hub_reason(error)}); check the name, go "
            f"online once, or run 'hf download {repository}' where there is a network and name the folder"
        ) from error
    files = [name for name in names if name.endswith((".safetensors", ".ckpt"))]
    remedy = f"run 'hf download {repository} {files[0]}' and name that file" if files else "name another one"
    raise CheckpointError(
        f"'{repository}' is on the hub, but is no model in the layout of diffusers; {remedy}"
    )


def hub_reason(error: Exception) -> str:
    """Why the hub gave nothing, in a few words."""
    names = {
        "RepositoryNotFoundError": "there is no such repository, or it is private",
        "GatedRepoError": "its licence must be accepted on its page, then run 'hf auth login'",
        "RevisionNotFoundError": "there is no such revision",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
        "ConnectError": "no connection",
        "ConnectionError": "no connection",
    }
    return (
        names.get(type(error).__name__) or (str(error).strip().splitlines() or [type(error).__name__])[0][:90]
    )
