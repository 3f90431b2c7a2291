from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from ldm import pickles
from ldm.pickles import PickleError, Storage, TensorRecord, interpret, shapes_of, tensor_records

GOLDEN = Path(__file__).parent / "golden"


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_a_command_is_refused(tmp_path: Path, legacy: bool) -> None:
    bait, file = tmp_path / "ran", tmp_path / "evil.pt"
    torch.save({"a": torch.ones(1), "b": Evil(bait)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(PickleError, match="evil.pt.*refused.*(posix|nt).system"):
        pickles.load(file)
    assert not bait.exists()


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    bait, file = tmp_path / "ran", tmp_path / "evil.pt"
    file.write_bytes(pickle.dumps(Evil(bait)))
    with pytest.raises(PickleError):
        pickles.load(file)
    assert not bait.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        # Always the same ones: others may begin like a text or another kind of file.
        pytest.param(random.Random(0).randbytes(3000), "damaged", id="random bytes"),
    ],
)
def test_files_that_are_not_pickles_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "x.ckpt"
    file.write_bytes(content)
    with pytest.raises(PickleError, match=words) as error:
        pickles.load(file)
    assert "x.ckpt" in str(error.value) and "\n" not in str(error.value)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    torch.save({"a": torch.randn(4000)}, file)
    file.write_bytes(file.read_bytes()[:9000])
    with pytest.raises(PickleError, match="damaged"):
        pickles.load(file)


def test_only_named_classes_are_allowed(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save(torch.nn.ParameterDict({"a": torch.ones(2)}), file)
    with pytest.raises(PickleError, match="ParameterDict"):
        pickles.load(file)
    assert torch.equal(pickles.load(file, classes=[torch.nn.ParameterDict])["a"], torch.ones(2))


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PickleError, match="does not exist"):
        pickles.load(tmp_path / "no.pt")
    with pytest.raises(PickleError, match="folder"):
        pickles.load(tmp_path)


@pytest.mark.parametrize(
    "end", [b".", b"X\x01\x00\x00\x00aQ.", b"cos\nsystem\n.", b"\x96\xff", b"(ios\nsystem\n."]
)
def test_messages_have_no_advice_of_torch(tmp_path: Path, end: bytes) -> None:
    """torch advises to load with weights_only=False, which would run the code."""
    file = tmp_path / "x.pt"
    torch.save({"a": torch.ones(2)}, file)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"\x80\x02" + end if name.endswith("data.pkl") else old.read(name))
    legacy = GOLDEN / "original_bert_legacy.pt"
    for path in (tmp_path / "y.pt", legacy):
        with pytest.raises(PickleError) as error:
            pickles.load(path)
        message = str(error.value)
        assert (
            len(message) < 300
            and "weights_only" not in message
            and message.endswith(("name another file", "download it again"))
        )
        assert "weights_only" not in message and "PyTorch 2.6" not in message and "http" not in message


def test_shapes_of_nested_content() -> None:
    one = TensorRecord(Storage("float32", 4, "0", 6), 0, (2, 3), (3, 1))
    content: dict = {"a": one, 320: ({"w": one}, [one]), "text": "x"}
    content["self"] = content
    assert shapes_of(content) == {"a": (2, 3), "320.0.w": (2, 3), "320.1.0": (2, 3)}
    assert len(tensor_records(content)) == 3


def test_an_ordinary_file_is_interpreted_as_it_is_loaded(tmp_path: Path) -> None:
    held = torch.nn.ParameterDict()
    held._parameters["x.y"] = torch.nn.Parameter(torch.ones(2))
    content = {
        "n": 5,
        "t": ("a", 1.5, None, True),
        "l": [1, {"b": 2**70}],
        "p": held,
        "s": {3},
        "e": OrderedDict(k=1),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as archive:
        found = interpret(archive.read("archive/data.pkl"))
    assert found.foreign == [] and list(found.storages) == ["0"]
    for key in "ntle":
        assert found.content[key] == content[key]
    assert found.content["s"] == [3] and found.content["p"]["x.y"].shape == (2,)


def nested(wrap: bytes, count: int) -> bytes:
    return b")" + wrap * count


DEEP = nested(b"\x85", 400_000)  # tuples of one value, in one another
WIDE = nested(b"q\x01h\x01h\x01\x87", 60)  # tuples of the same value three times: 3**60 values


@pytest.mark.parametrize(
    "program",
    [
        b"}" + DEEP + b"K\x01s.",
        b"}" + WIDE + b"K\x01s.",
        b"}" + nested(b"q\x01(h\x01t", 100_000) + b"K\x01s.",
        b"cbuiltins\nset\n]" + DEEP + b"a\x85R.",
        b"ccollections\nOrderedDict\n](" + DEEP + b"K\x01ta\x85R.",
    ],
    ids=["deep", "wide", "marked", "set", "pairs"],
)
@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_tuples_that_would_crash_the_loader_are_refused(tmp_path: Path, layout: str, program: bytes) -> None:
    """torch's loader ends the process with a segmentation fault, or never."""
    whole = io.BytesIO()
    torch.save({}, whole, _use_new_zipfile_serialization=layout == "zip")
    path = tmp_path / "model.ckpt"
    if layout == "zip":
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name, b"\x80\x02" + program if name.endswith("data.pkl") else old.read(name))
    else:
        path.write_bytes(whole.getvalue().replace(b"}q\x00.\x80\x02]q\x00.", program + b"\x80\x02]."))
    with pytest.raises(
        PickleError, match="model.ckpt' is refused: it nests tuples deeper than any checkpoint"
    ):
        pickles.load(path)
