"""The only place that reads pickles, and never runs code from them.

`load` is torch's weights-only loader with a short list of further classes, for files of models and of runs. `interpret`
is for small files of strangers: it builds texts, numbers and containers; a tensor becomes a `TensorRecord`, so that its
size can be checked before there is memory for it; every other class or function becomes an inert `Foreign`.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.files import NO_TENSORS, file_kind
from ldm.util import UserError, shown


class PickleError(UserError):
    """A file that is not a pickle of tensors, is damaged, or would run code."""


def load(
    path: str | Path,
    *,
    classes: Sequence[type | tuple[type, str]] = (),
    mmap: bool = False,
    what: str = "",
) -> Any:
    """Read a `torch.save` file onto the CPU without running code from it.

    Args:
        path: of the file.
        classes: allowed in addition to torch's own list, as a class or as (class, "dotted.name in the file").
        mmap: map the tensors into memory instead of reading them, where the file's layout allows it.
        what: how messages name the file; default: its path.

    Raises:
        PickleError: the file does not exist, is damaged, is of another kind, or needs a class that is not allowed.
    """
    name = what or f"'{path}'"
    kind = file_kind(path)
    if kind in NO_TENSORS:
        raise PickleError(f"{name} {NO_TENSORS[kind]}")
    import torch  # not needed to interpret, which the command line does before torch is imported

    mmap = mmap and kind == "zip"  # torch cannot map the older layout
    if _nests_tuples(Path(path)):
        raise PickleError(
            f"{name} is refused: it nests tuples deeper than any checkpoint; it may be malicious"
        )
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap or None)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise PickleError(f"{name} is refused: {_reason(error)}") from error
    except Exception as error:  # a damaged stream can fail anywhere inside the unpickler
        raise PickleError(
            f"{name} is damaged or not a PyTorch file ({_detail(error)}); download it again"
        ) from error


def _reason(error: Exception) -> str:
    asked = re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) ([A-Za-z_][\w.]*)", str(error))
    if asked:
        return f"it asks for '{shown(asked[1].rstrip('.'))}', which tensors never need; name another file"
    return f"it is damaged or not a file of tensors ({_detail(error)}); name another file"


def _detail(error: Exception) -> str:
    """Return the cause in an error of torch, without the advice around it."""
    lines = [line.strip() for line in str(error).split("WeightsUnpickler error:")[-1].splitlines()]
    cause = next((line for line in lines if line and "weights_only" not in line), type(error).__name__)
    return shown(cause, 100)


# The types of storages, by their names in torch, with the bytes of a number.
_STORAGES = {
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "UntypedStorage": ("uint8", 1),
}
# The pickle of a checkpoint of 2,600 tensors has 0.7 MB and 90,000 operations.
MAX_PICKLE = 2**22
_MAX_OPERATIONS = 2**19
# Larger sizes are no tensor's, and larger integers can be chosen so that dicts become slow.
_LARGEST = 2**48


@dataclass(frozen=True)
class _Name:
    """A class or function that a pickle refers to, as "module.name"."""

    dotted: str


class Foreign:
    """What a class or function that is not known here would have made."""


@dataclass(frozen=True)
class Storage:
    """The numbers of one or more tensors, by their key in the file; `dtype` is a name in torch."""

    dtype: str
    itemsize: int
    key: str
    numbers: int

    @property
    def nbytes(self) -> int:
        return self.numbers * self.itemsize


class ParameterDict(dict[str, Any]):
    """The entries of a pickled `torch.nn.ParameterDict`."""

    def update_from(self, state: Mapping[Any, Any]) -> None:
        """Take the entries from a module's state.

        One saved by torch 1.11 or older has no list of its keys, and an entry that is a tensor but no Parameter is a
        plain attribute.
        """
        held, keys = state.get("_parameters"), state.get("_keys")
        self.update(held if isinstance(held, Mapping) else {})
        plain = keys if isinstance(keys, Mapping) else {}
        self.update({key: state[key] for key in plain if isinstance(state.get(key), TensorRecord)})


@dataclass(frozen=True)
class TensorRecord:
    """A tensor whose numbers are still in the file: `offset` and `stride` count numbers of the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.storage.itemsize

    @property
    def span(self) -> int:
        """How many numbers lie between the first and the last, both included."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return last + 1 if self.numel else 0

    def check(self) -> None:
        """Raise PickleError for a view that reaches outside of its storage or repeats its numbers."""
        numbers = [*self.shape, *self.stride, self.offset]
        fits = len(self.shape) == len(self.stride) <= 8 and all(0 <= number < _LARGEST for number in numbers)
        if not fits or self.offset + self.span > self.storage.numbers or self.numel > self.storage.numbers:
            shape = " x ".join(map(str, self.shape[:4]))
            raise PickleError(
                f"it declares a tensor of {shown(shape, 40)} numbers in a storage of {self.storage.numbers}; it "
                "is damaged, malicious, or a repeated view: save a contiguous copy"
            )


def _rebuilt_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Any:
    numbers = (offset, *shape, *stride)
    if not all(type(number) is int and abs(number) < _LARGEST for number in numbers):
        raise PickleError("it declares a tensor without a size; it is damaged or malicious")
    if not isinstance(storage, Storage):
        return Foreign()
    return TensorRecord(storage, offset, tuple(shape), tuple(stride))


def _rebuilt_with_attributes(function: Any, _kind: Any, arguments: Any, *_: Any) -> Any:
    return _call(function, arguments)


# What stands for the functions that make tensors and containers.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda pairs=(): _ordered(pairs),
    "torch.Size": tuple,
    "torch.nn.modules.container.ParameterDict": lambda *_: ParameterDict(),
    "torch.nn.parameter.Parameter": lambda data=None, *_: data,
    "torch.Tensor": lambda *_: Foreign(),  # only named, by tensors with attributes
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._utils._rebuild_tensor": _rebuilt_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuilt_tensor,
    "torch._tensor._rebuild_from_type_v2": _rebuilt_with_attributes,
    "builtins.set": list,
    "__builtin__.set": list,
    **{
        f"{module}.{name}": Foreign
        for name in _STORAGES
        for module in ("torch", "torch.cuda", "torch.storage")
    },
}


def _check_keys(keys: Sequence[Any]) -> None:
    for key in keys:
        # The hash of a deeply nested tuple would overflow the stack of the interpreter.
        if not isinstance(key, (str, bytes, int, _Name, type(None))) or (
            isinstance(key, int) and abs(key) >= _LARGEST
        ):
            raise PickleError("it has keys that are no texts or numbers; it is damaged or malicious")


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    if not isinstance(pairs, dict):
        _check_keys([key for key, _ in pairs])
    return dict(pairs)


def _call(function: Any, arguments: Any) -> Any:
    made_by = _FUNCTIONS.get(function.dotted) if isinstance(function, _Name) else None
    return Foreign() if made_by is None else made_by(*arguments)


@dataclass
class Pickle:
    """What one pickle holds.

    `foreign` are the dotted names of classes and functions that are not those of tensors and containers, `storages`
    the declared storages by key, and `end` the offset after the pickle.
    """

    content: Any = None
    foreign: list[str] = field(default_factory=list)
    storages: dict[str, Storage] = field(default_factory=dict)
    end: int = 0


class _Mark:
    pass


# Operations that only push the value that they carry.
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CONTAINERS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_TUPLE": tuple,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = {"PROTO", "FRAME"}


class _Machine:
    """Interprets the operations of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0
        self.result = Pickle()

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _NOTHING:
            return
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _CONTAINERS:
            stack.append(_CONTAINERS[name]())
        elif name == "MARK":
            stack.append(_Mark)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            _check_keys([argument])
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in _TUPLES:
            stack.append(self.tuple_of(self.popped(_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(self.tuple_of(self.marked()))
        elif name in ("LIST", "FROZENSET"):
            stack.append(self.marked())
        elif name == "DICT":
            stack.append(self.filled({}, self.marked()))
        elif name == "POP":
            stack.pop()
        elif name == "GLOBAL":
            stack.append(self.named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self.named(*self.popped(2)))
        elif name in ("SETITEM", "SETITEMS"):
            items = self.popped(2) if name == "SETITEM" else self.marked()
            self.filled(stack[-1], items)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = self.popped(1) if name == "APPEND" else self.marked()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = self.popped(2)
            stack.append(self.called(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], ParameterDict) and isinstance(state, dict):
                self.charge(state.get("_parameters"), state.get("_keys"))
                stack[-1].update_from(state)
        elif name == "BINPERSID":
            stack.append(self.persistent(stack.pop()))
        else:
            raise PickleError(
                f"it uses the pickle operation {name}, which tensors never need; it may be malicious"
            )

    def tuple_of(self, values: list[Any]) -> tuple[Any, ...]:
        return tuple(values)

    def called(self, function: Any, arguments: Any) -> Any:
        self.charge(arguments, *arguments)
        return _call(function, arguments)

    def charge(self, *copied: Any) -> None:
        """Count what a few operations copy, of containers that were built once."""
        self.copied += sum(len(value) for value in copied if isinstance(value, (list, tuple, dict)))
        if self.copied > _MAX_OPERATIONS:
            raise PickleError("it copies more than any embedding or model; it may be malicious")

    def popped(self, count: int) -> list[Any]:
        values = self.stack[-count:]
        if len(values) < count or _Mark in values:
            raise IndexError("too few values")
        del self.stack[-count:]
        return values

    def marked(self) -> list[Any]:
        """Remove the values after the last mark and return them."""
        place = len(self.stack) - 1
        while self.stack[place] is not _Mark:
            place -= 1
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def filled(self, target: Any, items: Sequence[Any]) -> Any:
        if isinstance(target, dict):
            _check_keys(items[::2])
            target.update(zip(items[::2], items[1::2], strict=True))
        return target

    def named(self, module: Any, attribute: Any) -> _Name:
        dotted = f"{shown(module, 60)}.{shown(attribute, 60)}"
        if dotted not in _FUNCTIONS and dotted not in self.result.foreign:
            self.result.foreign = [*self.result.foreign, dotted][:20]
        return _Name(dotted)

    def persistent(self, claim: Any) -> Any:
        """Return what a persistent id stands for: a storage, or a class that old torch saved with its source."""
        match claim:
            case ("storage", _Name(dotted=kind), str(key), _, int(numbers)) | (
                "storage",
                _Name(dotted=kind),
                str(key),
                _,
                int(numbers),
                None,
            ):
                name = kind.rpartition(".")[2]
                if 0 <= numbers < _LARGEST and kind in _FUNCTIONS and name in _STORAGES:
                    storage = Storage(*_STORAGES[name], key, numbers)
                    if self.result.storages.setdefault(key, storage) == storage:
                        return storage
                elif kind not in _FUNCTIONS:
                    return Foreign()
            case ("module", _Name() as name, *_):
                return name
        raise PickleError("it declares a tensor in an unknown way; it is damaged or malicious")


def interpret(data: bytes, start: int = 0) -> Pickle:
    """Interpret the pickle at offset `start`; nothing that it names is imported or called.

    Raises PickleError for a damaged stream, operations that tensors do not need, and a stream that is too long.
    """
    stream = io.BytesIO(data[start : start + MAX_PICKLE])
    machine = _Machine()
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
            if operation.name == "STOP":
                (machine.result.content,) = machine.stack
            elif operation.name == "PROTO" and int(argument or 0) > 5:
                raise PickleError(f"it is a pickle of protocol {argument}, which does not exist")
            elif count > _MAX_OPERATIONS:
                raise PickleError("its pickle is longer than that of any embedding or model")
            else:
                machine.step(operation.name, argument)
    except PickleError:
        raise
    except Exception as error:  # a damaged stream fails in many ways
        raise PickleError("it is damaged or not a PyTorch file; download it again") from error
    machine.result.end = start + stream.tell()
    return machine.result


class _DeepTuple(Exception):
    """A tuple whose hash would overflow the stack of the interpreter, or never end."""


class _Nesting(_Machine):
    """Follows a pickle only to find a `_DeepTuple`; it builds no other containers and refuses nothing else."""

    most_depth, most_values = 50, 2**20

    def __init__(self) -> None:
        super().__init__()
        # For each tuple its depth, the values in it at all depths, and itself, so that its id stays its own.
        self.known: dict[int, tuple[int, int, Any]] = {}

    def tuple_of(self, values: list[Any]) -> tuple[Any, ...]:
        inner = [self.known.get(id(value), (0, 1)) for value in values if isinstance(value, tuple)]
        depth = 1 + max((depth for depth, *_ in inner), default=0)
        size = len(values) + sum(size for _, size, *_ in inner)
        if depth > self.most_depth or size > self.most_values:
            raise _DeepTuple
        made = tuple(values)
        self.known[id(made)] = depth, size, made
        return made

    def called(self, function: Any, arguments: Any) -> Any:
        return Foreign()

    def filled(self, target: Any, items: Sequence[Any]) -> Any:
        return target

    def persistent(self, claim: Any) -> Any:
        return Foreign()


def _nests_tuples(path: Path) -> bool:
    """Whether torch's loader would crash on a file, because its tuples are nested too deeply to be hashed."""
    with contextlib.suppress(Exception), path.open("rb") as file:  # of what is damaged the loader says more
        if file_kind(path) == "zip":
            with zipfile.ZipFile(file) as archive:
                names = [name for name in archive.namelist() if name.endswith("data.pkl")]
                streams = [io.BytesIO(archive.read(name)) for name in names]
        else:
            streams = [io.BytesIO(file.read(16 * MAX_PICKLE))] * 5  # five pickles one after another
        for stream in streams:
            machine = _Nesting()
            try:
                for operation, argument, _ in pickletools.genops(stream):
                    if operation.name != "STOP":
                        machine.step(operation.name, argument)
            except _DeepTuple:
                return True
    return False


# Deeper structures than this hold no vectors.
MAX_DEPTH = 16


def tensor_records(content: Any) -> list[TensorRecord]:
    """Return the tensors in nested containers; one that is there several times is returned as often."""
    found: list[TensorRecord] = []
    seen: set[int] = set()
    level = [content]
    for _ in range(MAX_DEPTH + 2):
        containers = [value for value in level if isinstance(value, (dict, list, tuple))]
        found += [value for value in level if isinstance(value, TensorRecord)]
        level = []
        for value in containers:
            if id(value) not in seen:
                seen.add(id(value))
                level += value.values() if isinstance(value, dict) else value
    return found


def _joined(name: str, key: Any) -> str:
    part = key[:200] if isinstance(key, str) else str(key) if isinstance(key, int) else "?"
    return f"{name}.{part}"[:200] if name else part


def shapes_of(content: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in nested containers, by their keys joined with dots."""
    found: dict[str, tuple[int, ...]] = {}
    seen: set[int] = set()
    level: list[tuple[str, Any]] = [("", content)]
    for _ in range(MAX_DEPTH):
        below: list[tuple[str, Any]] = []
        for name, value in level:
            if isinstance(value, TensorRecord):
                found.setdefault(name, value.shape)
            elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
                seen.add(id(value))
                items = value.items() if isinstance(value, dict) else enumerate(value)
                below += [(_joined(name, key), item) for key, item in items]
        level = below
    return found
