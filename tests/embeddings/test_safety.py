"""Files that are damaged, absurd or hostile: each is one clear line, and nothing in them happens."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from ldm.embeddings import EmbeddingError, image_files, read
from ldm.embeddings.torch_files import scan
from ldm.util import UserError
from tests.embeddings.samples import a1111_dict, as_bytes, vectors


class RunsACommand:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def refused(path: Path, match: str) -> None:
    with pytest.raises(EmbeddingError, match=match) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and message.isprintable() and len(message) < 500


def saved(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "protocol 4"])
def test_a_pickle_that_would_run_a_command(how, tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "cat.pt"
    content = {"string_to_param": {"*": vectors()}, "name": RunsACommand(mark)}
    if how in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    else:
        path.write_bytes(pickle.dumps(RunsACommand(mark), protocol=2 if how == "pickle" else 4))
    refused(path, "asks for '(posix|nt).system'.*malicious")
    assert not mark.exists()
    # The same file does run it in a loader that trusts: the test would notice.
    if how == "pickle":
        pickle.loads(path.read_bytes())
        assert mark.exists()


def test_the_scan_and_torchs_loader_are_both_in_the_way(tmp_path, monkeypatch):
    """Each of the two layers refuses by itself."""
    mark = tmp_path / "ran"
    torch.save({"<cat>": RunsACommand(mark)}, tmp_path / "cat.pt")
    monkeypatch.setattr("ldm.embeddings.torch_files._allowed", lambda name: None)
    refused(tmp_path / "cat.pt", "refused")
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["builtins.bytearray", "torch._utils._rebuild_sparse_tensor", "torch.Tensor"]
)
def test_names_that_could_only_claim_memory_are_refused(name):
    module, attribute = name.rsplit(".", 1)
    program = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"K\x01\x85R."
    with pytest.raises(EmbeddingError, match=attribute):
        scan(program)
    with pytest.raises(EmbeddingError, match=attribute):  # the same through the stack
        scan(
            b"\x80\x04\x8c"
            + bytes([len(module)])
            + module.encode()
            + b"\x8c"
            + bytes([len(attribute)])
            + attribute.encode()
            + b"\x93K\x01\x85R."
        )


def rebuilt(data: bytes, edit: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            content = edit.get(name.split("/", 1)[1], old.read(name))
            new.writestr(name, content)
    return out.getvalue()


def test_a_zip_bomb(tmp_path):
    data = as_bytes({"<cat>": vectors()})
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/9", bytes(20 * 2**20))
    assert len(out.getvalue()) < 2**16
    refused(saved(tmp_path / "cat.pt", out.getvalue()), "zip bomb")


def test_a_zip_that_lies_about_its_sizes(tmp_path):
    """Says 100 bytes, unpacks to 10 MB."""
    program = as_bytes({"<cat>": vectors(1, 25)})
    data = bytearray(rebuilt(program, {"data/0": bytes(10**7)}, zipfile.ZIP_DEFLATED))
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        start = 0
        while (start := data.find(signature, start)) >= 0:
            if struct.unpack_from("<I", data, start + offset)[0] == 10**7:
                struct.pack_into("<I", data, start + offset, 100)
            start += 4
    refused(saved(tmp_path / "cat.pt", bytes(data)), "damaged")


def test_a_tensor_that_declares_more_than_the_file_has(tmp_path):
    data = as_bytes({"<cat>": torch.zeros(8)})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        program = archive.read("archive/data.pkl")
    program = program.replace(b"K\x08tq", b"J\x00\x00\x00\x7ftq").replace(
        b"K\x08\x85", b"J\x00\x00\x00\x7f\x85"
    )
    refused(saved(tmp_path / "a.pt", rebuilt(data, {"data.pkl": program})), "numbers are missing")

    data = as_bytes({"<cat>": torch.zeros(8)}, _use_new_zipfile_serialization=False)
    data = data.replace(b"K\x08Nt", b"J\x00\x00\x00\x7fNt").replace(b"K\x08\x85", b"J\x00\x00\x00\x7f\x85")
    refused(saved(tmp_path / "b.pt", data), "declares 8522825728 bytes of tensors")


def test_a_storage_declared_in_a_roundabout_way():
    """The id is fetched from the memo, so that the operations before it are only a decoy."""
    head = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    real, decoy = head + b"J\x00\x00\x00\x7ftq\x00", head + b"K\x01h\x00Q."
    with pytest.raises(EmbeddingError, match="unknown way"):
        scan(b"\x80\x02" + real + decoy)
    assert scan(b"\x80\x02" + real + b"Q.").storages == {"0": 0x7F000000 * 4}


def test_a_tensor_that_is_one_number_seen_a_billion_times(tmp_path):
    torch.save({"<cat>": torch.zeros(1).expand(10**6, 10**4)}, tmp_path / "cat.pt")
    refused(tmp_path / "cat.pt", "1000000 x 10000; at most")


def test_a_safetensors_header_that_claims_the_memory(tmp_path):
    refused(
        saved(tmp_path / "a", struct.pack("<Q", 2**40) + b'{"a": 1}'), "header is said to be 1099511627776"
    )
    header = b'{"emb_params":{"dtype":"F32","shape":[1000000,768],"data_offsets":[0,3072000000]}}'
    refused(saved(tmp_path / "b", struct.pack("<Q", len(header)) + header), "header is damaged")


def test_what_a_library_quotes_from_a_file_stays_in_one_line(tmp_path):
    header = b'{"emb_params":{"dtype":"F\\n\\u001b[2J","shape":[1],"data_offsets":[0,4]}}'
    refused(saved(tmp_path / "a", struct.pack("<Q", len(header)) + header + bytes(4)), "header is damaged")


def png(path: Path, text: str | None = None, canvas: np.ndarray | None = None) -> Path:
    info = PngInfo()
    if text is not None:
        info.add_text("sd-ti-embedding", text)
    image = Image.new("RGB", (16, 16), "red") if canvas is None else Image.fromarray(canvas)
    image.save(path, pnginfo=info)
    return path


def test_a_zlib_bomb_in_the_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.embeddings.image_files._MAX_JSON", 2**16)
    bomb = zlib.compress(b"[" + b"1," * (20 * 2**20), 9)
    path = png(
        tmp_path / "a.png", canvas=image_files.hide(bomb, np.full((256, 8, 3), 200, np.uint8), np.ones(1))
    )
    tracemalloc.start()
    refused(path, "larger than any")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20


def test_a_picture_of_a_billion_pixels(tmp_path):
    data = bytearray(png(tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 40_000, 40_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    refused(saved(tmp_path / "a.png", bytes(data)), "picture")
    refused(png(tmp_path / "b.png", canvas=np.zeros((5000, 5000, 3), np.uint8)), "5000 x 5000 pixels")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[" * 100_000, "no embedding"),
        ("[1, 2]", "no embedding"),
        ("{}", "is a dict|unknown kind"),
        ('{"string_to_param": {"*": {"TORCHTENSOR": [[NaN, 1]]}}, "name": "x"}', "NaN or infinity"),
        ('{"string_to_param": {"*": {"TORCHTENSOR": [[1e999, 1]]}}, "name": "x"}', "NaN or infinity"),
        ('{"string_to_param": {"*": {"TORCHTENSOR": [[1, 2], [1]]}}, "name": "x"}', "no list of numbers"),
        ('{"string_to_param": {"*": {"TORCHTENSOR": "abc"}}, "name": "x"}', "no list of numbers"),
        ('{"string_to_param": {"*": {"TORCHTENSOR": []}}, "name": "x"}', "shape"),
        ('{"string_to_param": {"*": 5}, "name": "x"}', "no tensor but int"),
        ('{"string_to_param": "*", "name": "x"}', "no mapping"),
        ('{"string_to_param": {}, "name": "x"}', "holds 0"),
        ('{"string_to_param": {"*": {"TORCHTENSOR": [1]}}, "name": "a\\u001b[31mb"}', "control characters"),
    ],
)
def test_texts_in_pictures(content, match, tmp_path):
    refused(png(tmp_path / "a.png", base64.b64encode(content.encode()).decode()), match)


def test_pictures_without_an_embedding(tmp_path):
    refused(png(tmp_path / "a.png"), "carries no embedding")
    refused(png(tmp_path / "b.png", "%%% not base64"), "no embedding, or a damaged one")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "c.webp")
    refused(tmp_path / "c.webp", "carries no embedding")


def test_a_trigger_that_is_a_path_stays_a_word(tmp_path):
    torch.save({"../../../etc/passwd": vectors()}, tmp_path / "cat.bin")
    assert read(tmp_path / "cat.bin").triggers == ["../../../etc/passwd"]


@pytest.mark.parametrize("trigger", ["", "  ", "a\nb", "\x1b[31mred", "x" * 201, "a\u202eb"])
def test_triggers_that_are_no_words(trigger, tmp_path):
    torch.save({trigger: vectors()}, tmp_path / "cat.bin")
    refused(tmp_path / "cat.bin", "trigger")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"<cat>": torch.full((1, 8), float("nan"))}, "NaN"),
        ({"<cat>": torch.full((8,), float("inf"))}, "infinity"),
        ({"<cat>": torch.full((1, 8), 1e300, dtype=torch.float64)}, "infinity"),
        ({"<cat>": torch.zeros(1, 8, dtype=torch.int64)}, "int64"),
        ({"<cat>": torch.zeros(2, 3, 4)}, "shape"),
        ({"<cat>": torch.tensor(1.0)}, "shape"),
        ({"<cat>": torch.zeros(0, 8)}, "shape"),
        ({"<cat>": torch.zeros(2000, 8)}, "at most 1024"),
        ({"<cat>": "no tensor"}, "unknown kind"),
        ({"emb_params": 5}, "no tensor"),
        ({"emp_params": "x"}, "no tensor"),
        ({"clip_l": None}, "no tensor"),
        ({"string_to_param": torch.zeros(3)}, "no mapping"),
        ({"string_to_param": {"*": 3}}, "no tensor"),
        ({"string_to_param": {}}, "no concept"),
        ({"string_to_param": {5: torch.zeros(3)}}, "map words"),
        ({}, "is a dict|unknown"),
        ([torch.zeros(3)], "is a list|unknown"),
        (5, "is a int|unknown"),
        ({f"w{i}": torch.zeros(3) for i in range(100)}, "model or LoRA"),
    ],
)
def test_contents_that_are_no_embedding(content, match, tmp_path):
    torch.save(content, tmp_path / "cat.pt")
    refused(tmp_path / "cat.pt", match)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>Not found</html>", "web page"),
        (b"\n <html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "Git LFS pointer"),
        (b'{"a": 1}', "JSON"),
        (b"MZ\x90\x00", "no embedding file"),
        (b"\x80", "damaged"),
        (b"\x80\x02K\x01.", "not one of torch.save"),
        (b"PK\x03\x04", "damaged"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (b"RIFF\x00\x00\x00\x00WEBP", "damaged"),
    ],
)
def test_files_that_are_something_else(data, match, tmp_path):
    refused(saved(tmp_path / "cat.pt", data), match)


def test_what_is_no_file(tmp_path):
    refused(tmp_path / "absent.pt", "no such file")
    refused(tmp_path, "folder")


def test_other_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "cat.zip", "w") as archive:
        archive.writestr("cat.pt", b"x")
    refused(tmp_path / "cat.zip", "unpack it first")


def test_a_file_as_large_as_a_model(tmp_path):
    with (tmp_path / "model.ckpt").open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(2**32)
    refused(tmp_path / "model.ckpt", "4096 MB.*model checkpoint")


def test_every_truncation_is_noticed(every_file, tmp_path):
    for name, path in every_file.items():
        data = path.read_bytes()
        for part in (0.1, 0.5, 0.9):
            cut = saved(tmp_path / "cut", data[: int(len(data) * part)])
            try:
                found = read(cut)
            except EmbeddingError:
                continue
            # A picture cut off in the pixels still has its text chunk; anything else must not load.
            assert "png" in name and found.concepts, (name, part)


def test_mutations_of_valid_files_end_in_clean_errors(every_file, tmp_path):
    """300 damaged files of all formats, always the same: each is read rightly or refused in one line."""
    chance = random.Random(5)
    names = sorted(every_file)
    refusals = 0
    for turn in range(300):
        name = names[turn % len(names)]
        data = mutated(every_file[name].read_bytes(), chance)
        path = saved(tmp_path / every_file[name].name, data)
        try:
            found = read(path)
        except UserError as error:
            assert "\n" not in str(error) and str(error).isprintable()
            refusals += 1
        else:
            assert all(torch.isfinite(concept.vectors).all() for concept in found.concepts)
    assert refusals > 100


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Damage that gets past the checksums: of a zip's records before they are packed again, of a head, of all."""
    if data.startswith(b"PK") and chance.random() < 0.8:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            program = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
        return rebuilt(data, {"data.pkl": damaged(program, chance)})
    if chance.random() < 0.7:
        return damaged(data[:600], chance) + data[600:]
    return damaged(data, chance)


def damaged(data: bytes, chance: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(len(out))
        match chance.randrange(5):
            case 0:
                out[place] ^= 1 << chance.randrange(8)
            case 1:
                out[place] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del out[place : place + chance.randrange(1, 9)]
            case 3:
                out[place:place] = chance.randbytes(chance.randrange(1, 9))
            case 4:
                length = chance.randrange(1, 40)
                out[place:place] = out[place : place + length]
        out = out or bytearray(b"x")
    return bytes(out)


def test_odd_metadata_is_dropped(tmp_path):
    odd = {
        "textual_inversion": json.dumps(
            {
                "concepts": [{"trigger": 5, "encoder": ["x"], "part": 3, "token": "y"}],
                "steps": "many",
                "seed": 1e400,
                "tool": "a\x1b[0m",
            }
        )
    }
    save_file({"emb_params": vectors()}, tmp_path / "cat.safetensors", odd)
    found = read(tmp_path / "cat.safetensors")
    assert found.triggers == ["cat"] and found.concepts[0].encoder == "clip_l"
    assert found.metadata.known() == {"tool": "a [0m"}
    for text in ("[" * 100_000, "{", "5", "null", '{"concepts": {"a": 1}}'):
        save_file(
            {"emb_params": vectors()}, tmp_path / "cat.safetensors", {"textual_inversion": text, "name": text}
        )
        assert torch.equal(read(tmp_path / "cat.safetensors").concepts[0].vectors, vectors())
    long = json.dumps({"steps": 5, "filler": "x" * 2**18})
    save_file({"emb_params": vectors()}, tmp_path / "cat.safetensors", {"textual_inversion": long})
    assert read(tmp_path / "cat.safetensors").metadata.steps is None
    torch.save({**a1111_dict(), "step": float("nan"), "sd_checkpoint": [1]}, tmp_path / "cat.pt")
    assert read(tmp_path / "cat.pt").metadata.steps is None
