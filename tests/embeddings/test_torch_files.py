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

from ldm.embeddings import read
from tests.embeddings.samples import as_bytes, rebuilt, refused, saved, vectors


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
