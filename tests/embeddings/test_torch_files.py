"""Files of torch.save that are damaged or malicious: one clear error line, and nothing is run or allocated."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.embeddings import read
from ldm.pickles import PickleError, interpret
from tests.embeddings.samples import as_bytes, rebuilt, refused, saved, vectors

pytestmark = pytest.mark.client_files


class RunsACommand:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "protocol 4"])
def test_a_pickle_that_would_run_a_command_is_refused(how, tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "cat.pt"
    content = {"string_to_param": {"*": vectors()}, "name": RunsACommand(mark)}
    if how in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    else:
        path.write_bytes(pickle.dumps(RunsACommand(mark), protocol=2 if how == "pickle" else 4))
    refused(path, "asks for '(posix|nt).system'.*malicious")
    assert not mark.exists()
    # An unsafe loader does run the command, so this test can fail.
    if how == "pickle":
        pickle.loads(path.read_bytes())
        assert mark.exists()


def test_a_zip_bomb_is_refused(tmp_path):
    data = as_bytes({"<cat>": vectors()})
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/9", bytes(20 * 2**20))
    assert len(out.getvalue()) < 2**16
    refused(saved(tmp_path / "cat.pt", out.getvalue()), "zip bomb")


def test_a_zip_with_wrong_sizes_is_refused(tmp_path):
    """The entry declares 100 bytes and unpacks to 10 MB."""
    program = as_bytes({"<cat>": vectors(1, 25)})
    data = bytearray(rebuilt(program, {"data/0": bytes(10**7)}, zipfile.ZIP_DEFLATED))
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        start = 0
        while (start := data.find(signature, start)) >= 0:
            if struct.unpack_from("<I", data, start + offset)[0] == 10**7:
                struct.pack_into("<I", data, start + offset, 100)
            start += 4
    refused(saved(tmp_path / "cat.pt", bytes(data)), "damaged")


def test_a_tensor_larger_than_the_file_is_refused(tmp_path):
    data = as_bytes({"<cat>": torch.zeros(8)})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        program = archive.read("archive/data.pkl")
    program = program.replace(b"K\x08tq", b"J\x00\x00\x00\x7ftq").replace(
        b"K\x08\x85", b"J\x00\x00\x00\x7f\x85"
    )
    refused(
        saved(tmp_path / "a.pt", rebuilt(data, {"data.pkl": program})), "its tensors need 8,522,825,728 bytes"
    )

    data = as_bytes({"<cat>": torch.zeros(8)}, _use_new_zipfile_serialization=False)
    data = data.replace(b"K\x08Nt", b"J\x00\x00\x00\x7fNt").replace(b"K\x08\x85", b"J\x00\x00\x00\x7f\x85")
    refused(saved(tmp_path / "b.pt", data), "declares 8522825728 bytes of tensors")


def test_a_huge_expanded_tensor_is_refused(tmp_path):
    torch.save({"<cat>": torch.zeros(1).expand(10**6, 10**4)}, tmp_path / "cat.pt")
    refused(tmp_path / "cat.pt", "declares a tensor of 1000000 x 10000 numbers in a storage of 1;")


def test_a_slice_saved_with_its_whole_table_is_copied(tmp_path):
    table = vectors(1000, 64)
    torch.save({"<cat>": table[7:9]}, tmp_path / "big.bin")
    found = read(tmp_path / "big.bin")
    assert torch.equal(found.concepts[0].vectors, table[7:9])
    assert found.concepts[0].vectors.untyped_storage().nbytes() == 2 * 64 * 4


def test_other_zip_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "cat.zip", "w") as archive:
        archive.writestr("cat.pt", b"x")
    refused(tmp_path / "cat.zip", "unpack it first")


@pytest.mark.parametrize(
    "name", ["builtins.bytearray", "torch._utils._rebuild_sparse_tensor", "torch.Tensor"]
)
@pytest.mark.parametrize("operation", ["GLOBAL", "STACK_GLOBAL"])
def test_functions_that_only_allocate_memory_are_not_called(name, operation, tmp_path):
    module, attribute = (part.encode() for part in name.rsplit(".", 1))
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text for text in (module, attribute)) + b"\x93"
    named = b"c" + module + b"\n" + attribute + b"\n" if operation == "GLOBAL" else texts
    program = b"\x80\x04}\x8c\x05<cat>" + named + b"J\xff\xff\xff\x7f\x85Rs."
    path = saved(tmp_path / "cat.pt", rebuilt(as_bytes({}), {"data.pkl": program}))
    refused(
        path,
        f"asks for '{name}', which tensors never need|not a known embedding format: it holds '<cat>'|"
        "holds sparse tensors",
    )


def test_tensors_with_attributes_views_and_shared_numbers_are_read(tmp_path):
    marked = vectors(2, 64)
    marked.note = "kept by torch.save"
    table = vectors(10, 64, seed=1)
    content = {
        "a": marked,
        "b": table[3:5],
        "d": table[3:5],
        "e": torch.nn.Parameter(table[0]),
        "f": table.t()[7],
    }
    expected = {key: value.detach().reshape(-1, value.shape[-1]) for key, value in content.items()}
    for new in (True, False):
        torch.save(content, tmp_path / "words.pt", _use_new_zipfile_serialization=new)
        found = read(tmp_path / "words.pt")
        assert {c.trigger for c in found.concepts} == set(content)
        assert all(torch.equal(c.vectors, expected[c.trigger]) for c in found.concepts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_are_read(dtype, tmp_path):
    torch.save({"<cat>": vectors().to(dtype)}, tmp_path / "cat.pt")
    assert torch.equal(read(tmp_path / "cat.pt").concepts[0].vectors, vectors().to(dtype).float())


@pytest.mark.parametrize("shape", [(1, 1, 768), (1, 2, 768), (2, 1, 768), (1, 1, 1, 768), (768,)])
def test_axes_of_length_1_are_left_out(shape, tmp_path):
    """diffusers writes [1, 1, d] for a word of one vector in a file of several tokens."""
    values = vectors(2)[: max(shape[:-1], default=1)]
    torch.save({"<cat>": values.reshape(shape)}, tmp_path / "cat.bin")
    save_file({"<cat>": values.reshape(shape).clone()}, tmp_path / "cat.safetensors")
    for name in ("cat.bin", "cat.safetensors"):
        assert torch.equal(read(tmp_path / name).concepts[0].vectors, values)


def test_a_view_outside_of_its_storage_is_refused(tmp_path):
    data = as_bytes({"<cat>": torch.zeros(4, 8)})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        program = archive.read("archive/data.pkl")
    right = pickled(0) + pickled((4, 8)) + b"q\x08" + pickled((8, 1))
    assert program.count(right) == 1
    for wrong in (
        {"offset": 1},
        {"offset": -1},
        {"shape": (4, 9)},
        {"stride": (9, 1)},
        {"stride": (-8, 1)},
        {"stride": (8,)},
    ):
        view = {"offset": 0, "shape": (4, 8), "stride": (8, 1), **wrong}
        changed = pickled(view["offset"]) + pickled(view["shape"]) + b"q\x08" + pickled(view["stride"])
        bad = rebuilt(data, {"data.pkl": program.replace(right, changed)})
        refused(saved(tmp_path / "cat.pt", bad), r"declares a tensor of 4 x \d numbers in a storage of 32")


def pickled(value: object) -> bytes:
    """The operations of protocol 2 that push a number or a tuple of numbers."""
    return pickle.dumps(value, protocol=2)[2:-1].removesuffix(b"q\x00")


def test_nothing_that_a_pickle_names_is_imported(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    found = interpret(b"\x80\x02ctrap\nanything\n)R.")
    assert found.foreign == ["trap.anything"] and not (tmp_path / "ran").exists()
    for name in (b"__builtin__\neval", b"os\nsystem", b"torch.hub\nload", b"ldm.util\nget_obj_from_str"):
        assert interpret(b"\x80\x02c" + name + b"\n(X\x03\x00\x00\x00argtR.").foreign
    with pytest.raises(PickleError, match="pickle operation INST"):
        interpret(b"(ios\nsystem\n.")


@pytest.mark.parametrize(
    "claim",
    [
        b"K\x01",
        b"(X\x07\x00\x00\x00storageK\x01K\x02t",
        b"(X\x05\x00\x00\x00otherK\x01t",
        b"(X\x06\x00\x00\x00moduleK\x01t",
    ],
)
def test_storages_that_are_declared_in_another_way_are_refused(claim):
    with pytest.raises(PickleError, match="unknown way"):
        interpret(b"\x80\x02" + claim + b"Q.")


@pytest.mark.filterwarnings("ignore")  # torch advises about quantised and sparse tensors
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda tensor: tensor.numpy(), "arrays of numpy"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "numbers of fewer bits"),
        (lambda tensor: tensor.to_sparse(), "sparse tensors"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "quantised tensors"),
        (lambda tensor: tensor.to("meta"), "tensors without values"),
        (lambda tensor: tensor.to(torch.complex64), "complex numbers"),
    ],
)
def test_harmless_numbers_of_other_kinds_are_named(change, kind, tmp_path):
    path = tmp_path / "cat.bin"
    torch.save({"<cat>": change(vectors())}, path)
    refused(path, f"it holds {kind}; save dense torch tensors of float32")


def test_a_harmless_kind_hides_no_command(tmp_path):
    path, mark = tmp_path / "cat.bin", tmp_path / "ran"
    torch.save({"<cat>": vectors().numpy(), "x": RunsACommand(mark)}, path)
    refused(path, "asks for '(posix|nt).system'.*malicious")
    assert not mark.exists()


@pytest.mark.parametrize("content", [{}, None, []])
def test_a_file_without_tensors_says_so(content, tmp_path):
    torch.save(content, tmp_path / "cat.pt")
    refused(tmp_path / "cat.pt", "it holds no tensors; .* name another file")
    save_file({}, tmp_path / "cat.safetensors")
    refused(tmp_path / "cat.safetensors", "it holds no tensors")
