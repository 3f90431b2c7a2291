"""Small files that ask for much memory or time are refused, in a process that has little of either."""

from __future__ import annotations

import base64
import io
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.embeddings import image_files
from tests.embeddings.samples import as_bytes, rebuilt

pytestmark = pytest.mark.client_files
ROOT = Path(__file__).resolve().parents[2]
ONE = torch.zeros(1)
TINY = '{"TORCHTENSOR": [0]}'


def packed(program: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A torch file with this pickle."""
    return rebuilt(as_bytes({"<cat>": torch.zeros(1, 8)}), {"data.pkl": program}, method)


def shared_lists() -> bytes:
    """Lists of lists, each with 200 references to the one before: 200**16 numbers if they were copied."""
    program = b"\x80\x02]q\x00K\x01a0"
    for level in range(1, 17):
        program += b"]q" + bytes([level]) + b"(" + (b"h" + bytes([level - 1])) * 200 + b"e0"
    return program + b"h\x10."


def legacy(content: bytes, keys: bytes = b"\x80\x02].") -> bytes:
    """A file in the layout before torch 1.6 with these pickles of content and storages."""
    whole = as_bytes({}, _use_new_zipfile_serialization=False)
    return whole[: -len(b"\x80\x02}q\x00.\x80\x02]q\x00.")] + content + keys


def copies(function: bytes, argument: bytes) -> bytes:
    """A pickle that calls a function 40,000 times with one container of 100,000 values."""
    return (
        b"\x80\x02("
        + argument
        + b"q\x00\x85q\x01"
        + (b"c" + function + b"q\x02")
        + b"h\x02h\x01R" * 40_000
        + b"t."
    )


MANY = b"(" + b"K\x01" * 100_000 + b"t"


def colliding_keys() -> bytes:
    """A dict of integers with one hash."""
    numbers = (k * (2**61 - 1) for k in range(1, 60_000))
    items = b"".join(b"\x8a\x0a" + number.to_bytes(10, "little") + b"N" for number in numbers)
    return b"\x80\x02}(" + items + b"u."


def tensors(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def image(canvas: np.ndarray | None = None, text: str | None = None, packed: bool = False) -> bytes:
    info, file = PngInfo(), io.BytesIO()
    if text is not None:
        info.add_text("sd-ti-embedding", text, zip=packed)
    picture = Image.new("RGB", (16, 16), "red") if canvas is None else Image.fromarray(canvas)
    picture.save(file, format="PNG", pnginfo=info, compress_level=3)
    return file.getvalue()


def hidden(content: str) -> bytes:
    canvas = np.full((256, 8, 3), 200, np.uint8)
    return image(image_files.hide_bytes(zlib.compress(content.encode(), 1), canvas, np.ones(1)))


def strips_of_one_colour() -> bytes:
    canvas = np.full((4000, 4000, 3), 17, np.uint8)
    canvas[:, [1950, 2049]] = 0
    return image(canvas)


def repeated(entry: str, count: int) -> str:
    return ",".join([entry] * count)


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a view with stride 0": (
        lambda: as_bytes({"string_to_param": {"*": ONE.expand(1024, 16384)}, "name": "x"}),
        "1024 x 16384 numbers in a storage of 1",
    ),
    "300 words": (
        lambda: as_bytes({"string_to_param": {f"w{i}": ONE.expand(1024, 16384) for i in range(300)}}),
        "in a storage of 1",
    ),
    "one tensor for 3,000 words": (
        lambda: as_bytes({"string_to_param": dict.fromkeys(map(str, range(3000)), torch.zeros(64, 4096))}),
        "its tensors need 3,145,728,000 bytes",
    ),
    "stride 0 in the older layout": (
        lambda: as_bytes({"<cat>": ONE.expand(1024, 16384)}, _use_new_zipfile_serialization=False),
        "in a storage of 1",
    ),
    "a pickle that unpacks": (lambda: packed(b"\x80\x02(" + b"}" * 900_000 + b"l."), "larger than any"),
    "many operations": (lambda: b"\x80\x02(" + b"}" * 2_000_000 + b"l.", "pickle is longer"),
    "a key of nested tuples": (
        lambda: b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.",
        "keys that are no texts or numbers",
    ),
    "nested lists": (
        lambda: packed(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".", zipfile.ZIP_STORED),
        "is a list",
    ),
    "shared lists": (lambda: packed(shared_lists()), "is a list"),
    "copies of a tuple": (
        lambda: packed(copies(b"torch\nSize\n", MANY), zipfile.ZIP_STORED),
        "copies more than",
    ),
    "copies of a set": (
        lambda: packed(copies(b"builtins\nset\n", MANY), zipfile.ZIP_STORED),
        "copies more than",
    ),
    "integers of one hash": (lambda: packed(colliding_keys(), zipfile.ZIP_STORED), "keys that are no texts"),
    "a long number of steps": (
        lambda: packed(
            b"\x80\x02}(X\x0f\x00\x00\x00string_to_param}X\x10\x00\x00\x00progressive_step\x8b\x00\x10\x00\x00"
            + b"\x7f" * 4096
            + b"X\x11\x00\x00\x00progressive_scaleK\x01u.",
            zipfile.ZIP_STORED,
        ),
        "it holds no concept",
    ),
    "a shape of long numbers": (
        lambda: packed(
            b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
            b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x08tQK\x00\x8b\x00\x10\x00\x00"
            + b"\x7f" * 4096
            + b"\x85K\x01\x85tRs.",
            zipfile.ZIP_STORED,
        ),
        "a tensor without a size",
    ),
    "shared lists as the keys of storages": (
        lambda: legacy(b"\x80\x02}.", shared_lists()),
        "list of storages is damaged",
    ),
    "a word of combining marks": (
        lambda: as_bytes({"\u0301\u0323" * 400_000: torch.zeros(2, 3, 4)}),
        "has the shape",
    ),
    "a large memo": (lambda: packed(b"\x80\x02}r\xff\xff\xff\x7f."), "holds no tensors"),
    "a large bytearray": (lambda: packed(b"\x80\x05\x96" + b"\xff" * 7 + b"\x00."), "damaged"),
    "a large count of vectors": (
        lambda: tensors(
            {"emb_params": {"dtype": "F32", "shape": [2**40, 768], "data_offsets": [0, 3072]}}, bytes(3072)
        ),
        "at most 1024 x 16384 is allowed",
    ),
    "tensors that overlap": (
        lambda: tensors(
            {f"{i}": {"dtype": "F32", "shape": [1, 768], "data_offsets": [0, 3072]} for i in range(60)},
            bytes(3072),
        ),
        "header is damaged",
    ),
    "a nested header": (lambda: tensors(b'{"a":' + b"[" * 500_000), "header is damaged"),
    "tensors in the pixels": (
        lambda: hidden('{"a":[' + repeated(TINY, 1_400_000) + "]}"),
        "text in the image is larger",
    ),
    "a large tensor in the pixels": (
        lambda: hidden(
            '{"string_to_param":{"*":{"TORCHTENSOR":[' + repeated("0", 15_000_000) + ']}},"name":"x"}'
        ),
        "text in the image is larger",
    ),
    "small tensors in the text": (
        lambda: image(text=base64.b64encode(f'{{"a":[{repeated(TINY, 300)}]}}'.encode()).decode()),
        "more than 256 tensors",
    ),
    "a packed text": (
        lambda: image(text=base64.b64encode(f"[{repeated('0', 300_000)}]".encode()).decode(), packed=True),
        "not an embedding",
    ),
    "pixels of one colour": (strips_of_one_colour, "4000 x 4000 pixels"),
}

# Runs in a process of its own: reads each file after its memory was limited.
READ_ALL = """
import json, resource, sys, time
from pathlib import Path
import torch  # before the memory is limited
from ldm.embeddings import EmbeddingError, read

[status] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize")]
limit = int(status.split()[1]) * 1024 + 200 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = {}
for path in map(Path, sys.argv[1:]):
    start = time.process_time()
    try:
        read(path, numbers=False)
    except EmbeddingError:
        pass
    try:
        outcome = repr(read(path).triggers)
    except EmbeddingError as error:
        outcome = f"refused: {error}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    found[path.name] = outcome, time.process_time() - start
print(json.dumps(found))
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the memory of a process is limited as Linux does it"
)
def test_bombs_are_refused_in_little_memory_and_time(tmp_path):
    paths = []
    for name, (make, _) in BOMBS.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(make())
        assert paths[-1].stat().st_size < 2_100_000, name
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, *map(str, paths)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, (_, words) in BOMBS.items():
        outcome, seconds = found[name]
        assert outcome.startswith("refused: ") and words in outcome and "\n" not in outcome, (name, outcome)
        assert len(outcome) < 310 and seconds < 3, (name, seconds)
