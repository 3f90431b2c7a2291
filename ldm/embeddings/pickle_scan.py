"""A look at a pickle before it is read: which names it asks for and how much memory it will claim.

Nothing here unpickles. torch's weights-only loader reads the file afterwards; this adds two things that loader
does not do in every release: a list of names as short as embedding files need, and the sizes of all storages
held against the bytes that are there, before any is allocated.
"""

from __future__ import annotations

import io
import pickletools
from dataclasses import dataclass, field
from typing import Any

from ldm.embeddings.concept import EmbeddingError

_WANTED = {
    "collections OrderedDict",
    "torch Size",
    "torch.nn.modules.container ParameterDict",
    "torch.nn.parameter Parameter",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "builtins set",
    "__builtin__ set",
}
_ITEM_BYTES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
    "UntypedStorage": 1,
}
_STORAGES = {
    f"{module} {name}": size
    for name, size in _ITEM_BYTES.items()
    for module in ("torch", "torch.cuda", "torch.storage")
}
_STRINGS = {
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "UNICODE",
    "BINSTRING",
    "SHORT_BINSTRING",
    "STRING",
}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "INT", "LONG"}
_CODE = {"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}
# What these operations push; anything else but texts, numbers and names is None.
_PUSHED = {"MARK": object(), "TUPLE": object(), "NONE": object()}


@dataclass
class _Global:
    """A class or function that the pickle names."""

    name: str


@dataclass
class Scan:
    """What one pickle names and claims: bytes by storage key, the last number in it, and where it ends."""

    storages: dict[str, int] = field(default_factory=dict)
    number: int | None = None
    end: int = 0


def scan(data: bytes, start: int = 0, limit: int = 2**21) -> Scan:
    """Read the operations of the pickle at `start` without carrying them out.

    Raises EmbeddingError for a name that no embedding needs, a storage declared in any but torch's own way, a
    damaged stream, and one longer than `limit`.
    """
    stream = io.BytesIO(data[start : start + limit])
    result = Scan()
    recent: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for operation, argument, _ in pickletools.genops(stream):
            _step(operation.name, argument, recent, memo, result)
            del recent[:-8]
    except EmbeddingError:
        raise
    except Exception as error:  # genops raises many kinds on damaged streams
        raise EmbeddingError(f"it is damaged or no PyTorch file ({str(error)[:80]})") from error
    result.end = start + stream.tell()
    return result


def _step(name: str, argument: Any, recent: list[Any], memo: dict[int, Any], result: Scan) -> None:
    if name == "PROTO" and argument > 5:
        raise EmbeddingError(f"it is a pickle of protocol {argument}, which does not exist; it is damaged")
    if name in ("PROTO", "FRAME"):
        return
    if name in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[argument] = _memorable(recent)
        return
    if name == "MEMOIZE":
        memo[len(memo)] = _memorable(recent)
        return
    if name in _CODE:
        raise EmbeddingError(
            f"it uses the pickle operation {name}, which tensors never need; it may be malicious"
        )
    value: Any = None
    if name in ("GET", "BINGET", "LONG_BINGET"):
        value = memo.get(argument)
    elif name == "GLOBAL":
        value = _allowed(argument)
    elif name == "STACK_GLOBAL":
        module, attribute = recent[-2:] if len(recent) > 1 else (None, None)
        value = _allowed(f"{module} {attribute}")
    elif name in _PUSHED:
        value = _PUSHED[name]
    elif name in _STRINGS:
        value = argument
    elif name in _NUMBERS:
        value = result.number = argument
    elif name == "BINPERSID":
        _claim(recent, result)
    recent.append(value)


def _allowed(name: str) -> _Global:
    if name not in _WANTED and name not in _STORAGES:
        dotted = name.replace(" ", ".")[:100]
        raise EmbeddingError(f"it asks for {dotted!a}, which no embedding needs; it may be malicious")
    return _Global(name)


def _memorable(recent: list[Any]) -> Any:
    return recent[-1] if recent and isinstance(recent[-1], (str, _Global)) else None


def _claim(recent: list[Any], result: Scan) -> None:
    """Note the storage that a persistent id declares: `( 'storage' class key location number [None] tuple`."""
    tuple_made = recent[-1:] == [_PUSHED["TUPLE"]]
    fields = recent[-8:-2] if recent[-2:-1] == [_PUSHED["NONE"]] else recent[-7:-1]
    match fields:
        case [mark, "storage", _Global(name=kind), str(key), str(), int(number)] if mark is _PUSHED["MARK"]:
            if tuple_made and kind in _STORAGES and number >= 0:
                size = number * _STORAGES[kind]
                result.storages[key] = max(size, result.storages.get(key, 0))
                return
    raise EmbeddingError("it declares a tensor in an unknown way; it is damaged or malicious")
