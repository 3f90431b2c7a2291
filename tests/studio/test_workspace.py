"""What may be named and uploaded, and what is said about a set of images."""

from __future__ import annotations

import os
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.embeddings import Concept, LearnedEmbeddings, write
from ldm.embeddings.method_files import MethodFile, read_method_file, write_method_file
from ldm.studio.service import Service
from ldm.studio.workspace import MOST_BYTES, Workspace, check_upload, check_yaml, findings
from ldm.util import UserError


@pytest.fixture
def work(tmp_path) -> Workspace:
    (tmp_path / "root").mkdir()
    return Workspace(tmp_path / "root", confined=True)


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (64, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "..",
        "../x",
        "/etc/passwd",
        "a/../../x",
        "~root",
        "a\0b",
        "link/passwd",
        "logs/../../../etc",
    ],
)
def test_paths_outside_the_root_are_refused(work, text):
    (work.root / "link").symlink_to("/etc")
    with pytest.raises(UserError):
        work.path(text)


def test_paths_inside_the_root(work):
    assert work.path("logs/a") == work.root / "logs" / "a" and work.path(work.root) == work.root
    assert work.shown(work.root / "logs" / "a") == "logs/a"
    assert Workspace(work.root).path("/etc/passwd") == Path("/etc/passwd")  # one's own machine


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "..\\x", "%2e%2e", "link", "gone", "a\0"])
def test_a_name_is_never_a_path(work, name):
    (work.logs / "a").mkdir(parents=True)
    (work.logs / "a" / "b").touch()
    (work.logs / "link").symlink_to("/etc")
    with pytest.raises(UserError):
        work.inside(work.logs, name)
    assert work.inside(work.logs, "a") == work.logs / "a"


def test_uploaded_images_are_copied_under_safe_names(work, tmp_path):
    names = ["01.png", "../../evil.png", "con.png", "<b>.png", "Ünï.png"]
    sources = [photo(tmp_path / "up" / str(n) / Path(name).name, n) for n, name in enumerate(names)]
    (tmp_path / "up" / "0" / "01.txt").write_text("a bear")
    folder, refused = work.take_images("my <cat>/..", [*sources, tmp_path / "up" / "0" / "01.txt"])
    assert refused == [] and folder.parent == work.uploads and "/" not in folder.name
    assert sorted(p.name for p in folder.iterdir()) == [
        "01.png",
        "01.txt",
        "b.png",
        "con_.png",
        "evil.png",
        "Ünï.png",
    ]
    assert work.take_images("my <cat>/..", sources)[0] == folder
    assert work.captions(folder)[folder / "01.png"] == "a bear"


def bomb(path: Path) -> Path:
    """A PNG of 30,000 x 30,000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


def test_bad_uploads_are_refused_one_by_one(work, tmp_path):
    (tmp_path / "evil.png").write_bytes(pickle.dumps({"a": os.system}))
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.png").write_bytes(photo(tmp_path / "whole.png").read_bytes()[:300])
    (tmp_path / "huge.png").write_bytes(b"")
    os.truncate(tmp_path / "huge.png", MOST_BYTES + 1)
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    bad = ["evil.png", "text.jpg", "cut.png", "huge.png", "phone.heic"]
    sources = [tmp_path / name for name in bad] + [bomb(tmp_path / "bomb.png"), photo(tmp_path / "good.png")]
    folder, refused = work.take_images("cat", sources)
    assert [p.name for p in folder.iterdir()] == ["good.png"] and len(refused) == 6
    assert all("\n" not in line and len(line) < 300 for line in refused)
    for part in ("'huge.png' has 64 MB", "too many pixels", "HEIC"):
        assert part in " ".join(refused)
    with pytest.raises(UserError, match="not an image"):
        work.take_images("cat", sources[:2])
    with pytest.raises(UserError, match="drop image files"):
        work.take_images("cat", [])


def test_the_content_decides_the_format(tmp_path):
    photo(tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert check_upload(tmp_path / "a.jpg") == ".png"


def test_captions_are_written_and_removed(work):
    folder = work.root / "data" / "cat"
    for name in ("a", "b", "c", "d"):
        photo(folder / f"{name}.png")
    (folder / "b.caption").write_text("of another tool")
    (folder / "c.TXT").write_text("in capitals")
    (folder / "d.txt").write_bytes(b"\xff\xfe\x00")
    work.write_caption(folder, "a.png", "a [name]\nhere")
    *texts, damaged = work.captions(folder).values()
    assert texts == ["a [name] here", "of another tool", "in capitals"]
    assert isinstance(damaged, UserError) and "UTF-8" in str(damaged)
    work.write_caption("data/cat", "a.png", " ")
    work.write_caption("data/cat", "b.png", "new")
    assert not (folder / "a.txt").exists() and (folder / "b.caption").read_text() == "new\n"
    for name in ("e.png", "../cat/a.png", "a.txt"):
        with pytest.raises(UserError, match="no image"):
            work.write_caption(folder, name, "x")


def test_findings(tmp_path):
    paths = [
        photo(tmp_path / "a.png", 0),
        photo(tmp_path / "b.png", 0),
        photo(tmp_path / "c.png", 3, (64, 20)),
    ]
    near = Image.open(paths[0]).point(lambda value: min(value + 1, 255))
    near.save(tmp_path / "d.png")
    (tmp_path / "e.png").write_text("x")
    found = list(findings([*paths, tmp_path / "d.png", tmp_path / "e.png"], 64))
    texts = " ".join(finding.text for finding in found)
    for part in (
        "b.png is the same file as a.png",
        "c.png is 64x20",
        "as long as wide",
        "look alike",
        "cannot read",
    ):
        assert part in texts
    assert [finding.bad for finding in found].count(True) == 1
    assert "1 image:" in next(findings(paths[:1], None)).text


def test_models_and_words(work):
    (work.models / "sd").mkdir(parents=True)
    (work.models / "sd" / "model.ckpt").write_bytes(b"0" * (2**20 + 1))
    (work.models / "sd" / "notes.ckpt").write_bytes(b"0")
    models = work.model_files()
    assert "creatures" in models[0] and "models/sd/model.ckpt" in models and len(models) == len(set(models))
    work.embeddings.mkdir()
    write(LearnedEmbeddings((Concept("<cat>", torch.ones(2, 768)),)), work.embeddings / "cat.pt", "original")
    (work.embeddings / "bad.pt").write_bytes(pickle.dumps({"a": os.system}))
    words, problems = work.words()
    assert [(w.trigger, w.vectors, w.width, w.source) for w in words] == [
        ("<cat>", 2, 768, "embeddings/cat.pt")
    ]
    assert len(problems) == 1 and "bad.pt" in problems[0]


@pytest.mark.parametrize(
    "config",
    [
        {"target": "os.system"},
        {"a": [{"target": "ldm.files.write_text", "params": {}}]},
        {"target": "ldm.models.autoencoder.instantiate_from_config"},
        {"target": "torch.hub.load"},
        {"target": 3},
        {"path": "/etc/passwd"},
        {"path": "../../x"},
        {"path": "~/x"},
    ],
)
def test_a_yaml_of_others_may_not_name_everything(work, config):
    with pytest.raises(UserError):
        check_yaml(config, work)


def test_a_yaml_of_this_repository_passes(work):
    import yaml

    for path in sorted(Path(__file__).parents[2].glob("configs/*/*finetune*.yaml")):
        check_yaml(yaml.safe_load(path.read_text()), work)


def test_a_word_of_a_method_is_kept_as_its_file(tmp_path):
    service = Service(Workspace(tmp_path))
    checkpoints = service.workspace.logs / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    content = MethodFile("grid", {"*": 1}, {"vectors": torch.zeros(4, 1, 32)}, {"stages": 4}, {}, "clip", 32)
    write_method_file(content, checkpoints / "embeddings.pt")
    path = service.keep("run", "last", "<toy>")
    assert path.name == "toy.safetensors" and read_method_file(path).words == {"<toy>": 1}
    assert "<toy>" in [word.trigger for word in service.workspace.words()[0]]
