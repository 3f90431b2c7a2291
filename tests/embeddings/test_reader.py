from __future__ import annotations

import io
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.embeddings import EmbeddingError, merge, read, write
from ldm.embeddings.method_files import triggers_of
from ldm.outlines import Unread
from ldm.util import UserError
from tests.embeddings.samples import FOREIGN, learned, progressive, rebuilt, refused, saved, vectors

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.client_files


@pytest.mark.parametrize("name", FOREIGN)
def test_reads_what_other_tools_write(name, every_file):
    file, _, kind, trigger, encoder = FOREIGN[name]
    found = read(every_file[name])
    [concept] = found.concepts
    assert (found.format, concept.trigger, concept.encoder, concept.part) == (kind, trigger, encoder, "")
    assert found.source == file
    expected = vectors(width=concept.width)
    expected = expected.half().float() if "half" in name else expected
    assert concept.vectors.dtype == torch.float32 and not concept.vectors.requires_grad
    assert torch.equal(concept.vectors, expected)


def facts(found):
    shapes = [None if c.unused is None else tuple(c.unused.shape) for c in found.concepts]
    shapes += [tuple(c.vectors.shape) for c in found.concepts]
    named = [(c.trigger, c.encoder, c.part, c.initializer) for c in found.concepts]
    return found.format, found.source, found.metadata, found.progress, named, shapes


def test_without_numbers_all_else_is_the_same(every_file, tmp_path):
    every_file = {**every_file, "progressive": write(progressive(), tmp_path / "p.pt", "original")}
    for name, path in every_file.items():
        outline = read(path, numbers=False)
        assert facts(outline) == facts(read(path)), name
        assert all(isinstance(one.vectors, Unread) for one in outline.concepts)


def test_torch_is_not_needed_to_know_the_words(every_file):
    program = (
        "import sys; from ldm.embeddings.method_files import triggers_of\n"
        "for path in sys.argv[1:]: print(triggers_of(path))\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program, *map(str, every_file.values())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(triggers_of(path)) for path in every_file.values()]


def test_the_same_word_twice_is_compared_without_torch(tmp_path):
    ours, other = learned("*"), learned("*", seed=7)
    names = [
        ("a.pt", "original"),
        ("b.safetensors", "safetensors"),
        ("c.png", "a1111-png"),
        ("d.pt", "a1111"),
    ]
    files = [write(ours, tmp_path / name, format) for name, format in names]
    assert merge([read(file, numbers=False) for file in files]).triggers == ["*"]
    different = write(other, tmp_path / "e.safetensors")
    for file in files:
        with pytest.raises(EmbeddingError, match=f"'{file.name}' and 'e.safetensors' both have the trigger"):
            merge([read(file, numbers=False), read(different, numbers=False)])


def unread(path):
    [concept] = read(path, numbers=False).concepts
    return concept.vectors


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("old", [False, True])
def test_the_numbers_are_those_that_torch_reads(tmp_path, kind, old) -> None:
    whole = vectors(6).to(kind)
    for name, value in {
        "whole": whole,
        "rows": whole[1:4],
        "columns": whole.t().contiguous().t(),
        "steps": whole[::2, ::3],
        "repeated": whole[:1].expand(1, -1),
        "one": whole[0],
    }.items():
        torch.save({"<a>": value}, tmp_path / name, _use_new_zipfile_serialization=not old)
        assert list(unread(tmp_path / name).values()) == value.float().flatten().tolist(), name
        assert unread(tmp_path / name).norm() == pytest.approx(float(value.float().norm()))
    save_file({"<a>": whole}, tmp_path / "a.safetensors")
    assert list(unread(tmp_path / "a.safetensors").values()) == whole.float().flatten().tolist()


def test_equal_numbers_are_equal_however_they_are_stored(tmp_path) -> None:
    whole = vectors(3)
    whole[0, 0] = 0.0
    negative = whole.clone()
    negative[0, 0] = -0.0
    stored = [whole, whole.t().contiguous().t(), negative, whole.double()]
    paths = [tmp_path / f"{number}.pt" for number in range(len(stored))]
    for path, value in zip(paths, stored, strict=True):
        torch.save({"<a>": value}, path)
    assert merge([read(path, numbers=False) for path in paths]).triggers == ["<a>"]
    mixed = [read(paths[0]), read(paths[1], numbers=False), read(paths[2])]
    assert merge(mixed).triggers == merge(mixed[::-1]).triggers == ["<a>"]
    pair = [torch.ones(1, 768), torch.ones(1, 1280)]
    for name, value in zip(("a.bin", "a_2.bin"), pair, strict=True):
        torch.save({"<a>": value}, tmp_path / name)
    for numbers in ((True, False), (False, True)):
        parts = [
            read(tmp_path / name, numbers=n) for name, n in zip(("a.bin", "a_2.bin"), numbers, strict=True)
        ]
        assert merge(parts).vectors_for(2048, "sdxl")["<a>"].shape == (1, 2048)


def test_a_shape_that_its_bytes_do_not_have_is_said_by_whoever_reads_them(tmp_path) -> None:
    save_file({"<a>": torch.ones(2, 768)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data.replace(b'"shape":[2,768]', b'"shape":[1,768]'))
    assert unread(tmp_path / "a.safetensors").values() is None
    with pytest.raises(EmbeddingError, match="header is damaged"):
        read(tmp_path / "a.safetensors")


def test_damaged_numbers_are_said_without_torch(tmp_path) -> None:
    infinite = vectors(1)
    infinite[0, 5] = float("nan")
    torch.save({"<a>": infinite}, tmp_path / "nan.pt")
    torch.save(torch.full((768,), 5.0), tmp_path / "aesthetic.pt")
    torch.save({"<a>": torch.ones(1, 768, dtype=torch.int64)}, tmp_path / "whole.pt")
    save_file({"<a>": torch.ones(1, 768, dtype=torch.int64)}, tmp_path / "whole.safetensors")
    for name, message in (
        ("nan.pt", "contains NaN or infinity"),
        ("aesthetic.pt", "an aesthetic gradient"),
        ("whole.pt", "has the type int64"),
        ("whole.safetensors", "has the type int64"),
    ):
        for numbers in (False, True):
            with pytest.raises(EmbeddingError, match=message):
                read(tmp_path / name, numbers=numbers)


def test_the_suffix_does_not_matter(tmp_path, every_file):
    for index, (name, path) in enumerate(every_file.items()):
        renamed = tmp_path / f"file{index}.jpeg"
        renamed.write_bytes(path.read_bytes())
        assert torch.equal(read(renamed).concepts[0].vectors, read(path).concepts[0].vectors), name


def test_models_are_refused(tmp_path):
    save_file({"model.diffusion_model.out.2.weight": torch.zeros(4, 4)}, tmp_path / "m.safetensors")
    with pytest.raises(EmbeddingError, match="model or LoRA"):
        read(tmp_path / "m.safetensors")
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "m.ckpt")
    with pytest.raises(EmbeddingError, match="model"):
        read(tmp_path / "m.ckpt")
    torch.save({"hash": "12ab", "optimizer_state_dict": {}}, tmp_path / "m.optim")
    with pytest.raises(EmbeddingError, match="optimizer state"):
        read(tmp_path / "m.optim")


def test_a_trigger_that_looks_like_a_path_is_kept(tmp_path):
    torch.save({"../../../etc/passwd": vectors()}, tmp_path / "cat.bin")
    assert read(tmp_path / "cat.bin").triggers == ["../../../etc/passwd"]


@pytest.mark.parametrize(
    ("trigger", "kept"),
    [
        ("", "embedding"),
        ("a\nb", "a b"),
        ("\x1b[31mred", "[31mred"),
        ("x" * 201, "x" * 200),
        ("a\u202eb", "ab"),
        ("embedding:cat", "embedding_cat"),
        ("می\u200cخواهم", "می\u200cخواهم"),
    ],
)
def test_a_strange_trigger_is_read_as_the_nearest_word_and_can_be_renamed(trigger, kept, tmp_path, caplog):
    torch.save({trigger: vectors()}, tmp_path / "cat.bin")
    found = read(tmp_path / "cat.bin")
    assert found.triggers == [kept]
    assert (f"write '{kept[:50]}" in caplog.text) == (trigger.split() != kept.split())
    assert found.renamed({trigger: "<cat>"}).triggers == found.renamed({kept: "<cat>"}).triggers == ["<cat>"]
    with pytest.raises(UserError, match="direction mark"):
        found.renamed({kept: "\u202ecat"})


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
        ({"<cat>": "not a tensor"}, "not a known embedding format"),
        ({"emb_params": 5}, "not a tensor"),
        ({"emp_params": "x"}, "not a tensor"),
        ({"clip_l": None}, "not a tensor"),
        ({"string_to_param": torch.zeros(3)}, "not a mapping"),
        ({"string_to_param": {"*": 3}}, "not a tensor"),
        ({"string_to_param": {}}, "no concept"),
        ({"string_to_param": {5: torch.zeros(3)}}, "map words"),
        ({}, "holds no tensors"),
        ([torch.zeros(3)], "is a list"),
        (5, "is a int"),
        ({f"w{i}": torch.zeros(3) for i in range(100)}, "model or LoRA"),
    ],
)
def test_contents_that_are_not_an_embedding_are_refused(content, match, tmp_path):
    torch.save(content, tmp_path / "cat.pt")
    refused(tmp_path / "cat.pt", match)


def test_truncated_files_are_refused(every_file, tmp_path):
    for name, path in every_file.items():
        data = path.read_bytes()
        for part in (0.1, 0.5, 0.9):
            cut = saved(tmp_path / "cut", data[: int(len(data) * part)])
            try:
                found = read(cut)
            except EmbeddingError:
                continue
            # A PNG truncated in its pixels still has its text chunk; any other file must be refused.
            assert "png" in name and found.concepts, (name, part)


def test_damaged_files_are_read_correctly_or_refused_in_one_line(every_file, tmp_path):
    """300 damaged files of all formats, the same in every run."""
    chance = random.Random(5)
    names = sorted(every_file)
    refusals = 0
    for turn in range(300):
        name = names[turn % len(names)]
        data = mutated(every_file[name].read_bytes(), chance)
        path = saved(tmp_path / every_file[name].name, data)
        try:
            words = read(path, numbers=False).triggers
        except UserError:
            words = None
        try:
            found = read(path)
        except UserError as error:
            assert "\n" not in str(error) and str(error).isprintable()
            refusals += 1
        else:
            assert all(torch.isfinite(concept.vectors).all() for concept in found.concepts)
            assert found.triggers == words
    assert refusals > 100


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Damage the pickle inside a zip (packed again with valid checksums), the first 600 bytes, or any byte."""
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
