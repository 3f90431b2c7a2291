from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from ldm import weights
from ldm.files import is_hub_id
from ldm.weights import CheckpointError, Folder, fetch, needed_files, read_header, read_shards, weight_files

BASE = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        ([f"{BASE}.bin", f"{BASE}.safetensors"], None, [f"{BASE}.safetensors"]),
        ([f"{BASE}.bin", f"{BASE}.fp16.safetensors"], None, [f"{BASE}.bin"]),
        ([f"{BASE}.fp16.safetensors", f"{BASE}.non_ema.safetensors"], None, [f"{BASE}.fp16.safetensors"]),
        ([f"{BASE}.safetensors", f"{BASE}.fp16.safetensors"], "fp16", [f"{BASE}.fp16.safetensors"]),
        ([f"{BASE}.safetensors"], "fp16", [f"{BASE}.safetensors"]),
        (["model.fp16.safetensors", "pytorch_model.fp16.bin"], "fp16", ["model.fp16.safetensors"]),
        (["pytorch_model.bin", "config.json", "flax_model.msgpack"], None, ["pytorch_model.bin"]),
        (["model.onnx", "openvino_model.bin", "pytorch_lora_weights.safetensors"], None, []),
        (
            [
                f"{BASE}-00001-of-00002.safetensors",
                f"{BASE}-00002-of-00002.safetensors",
                f"{BASE}.safetensors.index.json",
            ],
            None,
            [f"{BASE}-00001-of-00002.safetensors", f"{BASE}-00002-of-00002.safetensors"],
        ),
        (
            ["model.fp16-00001-of-00002.safetensors", "model-00002-of-00002.fp16.safetensors"],
            "fp16",
            ["model-00002-of-00002.fp16.safetensors", "model.fp16-00001-of-00002.safetensors"],
        ),
    ],
)
def test_one_set_of_weights_is_chosen(names, variant, chosen) -> None:
    assert weight_files(names, variant) == chosen


def test_shards_left_over_from_another_download_are_passed_over() -> None:
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert weights.weight_files(["model-00001-of-00002.safetensors", *names]) == names
    assert weights.weight_files(["model-00001-of-00009.safetensors", *names[:2]]) == names[:2]


def test_shards_are_read_together_and_a_missing_one_is_named(tmp_path: Path) -> None:
    part = tmp_path / "unet"
    part.mkdir()
    for number in (1, 2):
        save_file(
            {f"w{number}": torch.full((2,), number)}, part / f"{BASE}-0000{number}-of-00002.safetensors"
        )
    files = Folder(tmp_path).weights("unet")
    assert {name: value.tolist() for name, value in read_shards(files).items()} == {
        "w1": [1, 1],
        "w2": [2, 2],
    }
    (part / f"{BASE}-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="unet' has 1 of 2 files of its weights"):
        Folder(tmp_path).weights("unet")


@pytest.mark.one_reader
def test_a_header_is_read_without_the_numbers(tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(2, 3), "b": torch.zeros(())}
    save_file(state, tmp_path / "m.safetensors", {"modelspec.title": "cat"})
    for legacy in (True, False):
        torch.save(
            {"state_dict": state, "global_step": 7},
            tmp_path / f"{legacy}.ckpt",
            _use_new_zipfile_serialization=not legacy,
        )
        header = read_header(tmp_path / f"{legacy}.ckpt")
        assert header.shapes == {"a.weight": (2, 3), "b": ()} and header.notes == {"global_step": "7"}
    header = read_header(tmp_path / "m.safetensors")
    assert header.shapes == {"a.weight": (2, 3), "b": ()} and header.notes["modelspec.title"] == "cat"


@pytest.mark.one_reader
def test_older_text_encoders_get_the_names_of_today(tmp_path: Path) -> None:
    old = {"cond_stage_model.transformer.final_layer_norm.bias": torch.zeros(3), "model.x": torch.zeros(1)}
    save_file(old, tmp_path / "m.safetensors")
    torch.save(old, tmp_path / "m.ckpt")
    for file in tmp_path.iterdir():
        names = set(weights.read_state_dict(file))
        assert names == {"cond_stage_model.transformer.text_model.final_layer_norm.bias", "model.x"}


def mappings(path: Path) -> int:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    return maps.read_text().count(str(path))


def test_a_tensor_that_is_no_longer_used_gives_its_piece_of_the_file_back(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(weights, "_PIECE", 16)
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.arange(4.0) + 4}, path)
    state = weights.read_state_dict(path)
    assert state["b"].tolist() == [4, 5, 6, 7] and mappings(path) == 2
    del state["a"]
    assert mappings(path) == 1


@pytest.mark.parametrize(
    ("source", "is_id"),
    [
        ("runwayml/stable-diffusion-v1-5", True),
        ("a/b.c-d_e", True),
        ("models/model.ckpt", False),
        ("./model", False),
        ("/a/b", False),
        ("a/b/c", False),
        ("model", False),
    ],
)
def test_hub_ids(tmp_path, monkeypatch, source, is_id) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(source) is is_id


def test_a_path_below_a_folder_that_exists_is_no_hub_id(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert not is_hub_id("models/sd15")


REPOSITORY = [
    "README.md",
    "feature_extractor/preprocessor_config.json",
    "model_index.json",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    f"unet/{BASE}.bin",
    f"unet/{BASE}.fp16.safetensors",
    f"unet/{BASE}.safetensors",
    "v1-5-pruned.ckpt",
    "vae/config.json",
    f"vae/{BASE}.safetensors",
]


def test_only_the_files_needed_are_fetched() -> None:
    assert needed_files(REPOSITORY) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        f"unet/{BASE}.safetensors",
        "vae/config.json",
        f"vae/{BASE}.safetensors",
    ]
    assert f"unet/{BASE}.fp16.safetensors" in needed_files(REPOSITORY, "fp16")
    assert needed_files(["config.json", f"{BASE}.safetensors", "x.ckpt"]) == [
        "config.json",
        f"{BASE}.safetensors",
    ]
    assert needed_files(["v1-5-pruned.ckpt"]) == []


class Hub:
    """In place of the hub: a repository, what was downloaded of it, and the number of downloads."""

    def __init__(self, root: Path, names: list[str], online: bool = True) -> None:
        self.root, self.names, self.online, self.downloads = root, names, online, 0

    def snapshot_download(self, repository, revision=None, local_files_only=False, allow_patterns=()):
        folder = self.root / repository.replace("/", "--") / (revision or "main")
        if local_files_only:
            if not folder.is_dir():
                raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
            return str(folder)
        self.downloads += 1
        for name in allow_patterns:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            index = {part: ["x", "y"] for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
            (folder / name).write_text(json.dumps(index if name == "model_index.json" else {"a": 1}))
        return str(folder)

    def model_info(self, repository, revision=None):
        if not self.online:
            raise ConnectionError("Name or service not known\nand more lines")
        return type("Info", (), {"siblings": [type("File", (), {"rfilename": name}) for name in self.names]})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def make(names=REPOSITORY, online=True) -> Hub:
        made = Hub(tmp_path / "hub", names, online)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
        monkeypatch.chdir(tmp_path)
        return made

    return make


def test_a_model_of_the_hub_is_fetched_once(hub) -> None:
    made = hub()
    folder = fetch("someone/model")
    assert (folder / "unet" / "config.json").is_file() and not (folder / "v1-5-pruned.ckpt").exists()
    made.online = False
    assert fetch("someone/model") == folder
    assert made.downloads == 1


def test_a_first_stage_of_the_hub_is_fetched_once(hub) -> None:
    made = hub(names=["config.json", f"{BASE}.safetensors"])
    folder = fetch("someone/vae")
    made.online = False
    assert fetch("someone/vae") == folder and made.downloads == 1


def test_only_the_asked_parts_are_fetched(hub) -> None:
    made = hub()
    folder = fetch("someone/model", parts=["text_encoder"])
    assert Folder(folder).weights("text_encoder") and not Folder(folder).weights("unet")
    fetch("someone/model", parts=["text_encoder"])
    assert made.downloads == 1
    fetch("someone/model")  # the whole model is asked for later
    assert Folder(folder).weights("unet") and made.downloads == 2


def test_a_variant_that_is_not_there_is_an_error_before_anything_is_fetched(hub) -> None:
    made = hub()
    with pytest.raises(
        CheckpointError, match="no weights of the variant .fp8.; leave settings=.* out, or name another"
    ):
        fetch("someone/model", variant="fp8")
    assert made.downloads == 0
    folder = fetch("someone/model", variant="fp16")
    assert [path.name for path in Folder(folder, "fp16").weights("unet")] == [f"{BASE}.fp16.safetensors"]
    assert fetch("someone/model", variant="fp16") == folder and made.downloads == 1


def test_offline_it_is_said_what_is_missing(hub) -> None:
    made = hub(online=False)
    with pytest.raises(
        CheckpointError, match="no file or folder here nor readable.*no connection.*hf download"
    ) as error:
        fetch("someone/model")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    made.online = True
    shutil.rmtree(fetch("someone/model") / "vae")
    made.online = False
    with pytest.raises(CheckpointError, match="its vae is neither here nor readable"):
        fetch("someone/model")
    with pytest.raises(CheckpointError, match="its vae, variant fp16 is neither here nor readable"):
        fetch("someone/model", variant="fp16")


@pytest.mark.parametrize(
    ("lost", "missing"),
    [
        ("vae/config.json", "vae"),
        ("text_encoder/model.safetensors", "text_encoder"),
        ("tokenizer/vocab.json", "tokenizer"),
        ("scheduler/scheduler_config.json", "scheduler"),
    ],
)
def test_a_download_that_was_cut_off_is_completed(hub, lost, missing) -> None:
    made = hub()
    folder = fetch("someone/model")
    (folder / lost).unlink()
    made.online = False
    with pytest.raises(CheckpointError, match=f"its {missing} is neither here"):
        fetch("someone/model")
    made.online = True
    assert (fetch("someone/model") / lost).is_file()


def test_a_repository_in_another_layout_names_its_file(hub) -> None:
    hub(names=["README.md", "v1-5-pruned.ckpt"])
    with pytest.raises(
        CheckpointError, match="no model in the layout of diffusers; run 'hf download someone/x v1-5"
    ):
        fetch("someone/x")
    hub(names=["README.md"])
    with pytest.raises(CheckpointError, match="name another one"):
        fetch("someone/y")


# -- one reader of names -------------------------------------------------------------------------------------


class Callback:
    """A class of a training program, of which a checkpoint holds an instance."""


@pytest.mark.one_reader
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_a_checkpoint_of_a_training_on_several_devices_is_read(tmp_path: Path, key, legacy) -> None:
    """The weights may be below another key, their names begin with a wrapper's; both readers see the same."""
    state = {
        "module.model._orig_mod.x": torch.ones(2),
        "module.cond_stage_model.transformer.encoder.y": torch.ones(3),
    }
    path = tmp_path / "m.ckpt"
    torch.save({key: state, "epoch": 3}, path, _use_new_zipfile_serialization=not legacy)
    names = {"model.x": (2,), "cond_stage_model.transformer.text_model.encoder.y": (3,)}
    assert read_header(path).shapes == names
    assert {name: tuple(value.shape) for name, value in weights.read_state_dict(path).items()} == names


@pytest.mark.one_reader
def test_a_file_is_recognised_before_it_is_refused(tmp_path: Path) -> None:
    """Names and shapes are read beside classes of other programs, which are not run; the weights are not."""
    path = tmp_path / "m.ckpt"
    torch.save({"lora_unet_x.lora_down.weight": torch.zeros(4, 4), "callbacks": Callback()}, path)
    assert read_header(path).shapes == {"lora_unet_x.lora_down.weight": (4, 4)}
    with pytest.raises(
        weights.UserError, match="asks for 'tests.test_weights.Callback', which tensors never need"
    ):
        weights.read_state_dict(path)


@pytest.mark.one_reader
@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"epoch": 3}])
def test_a_checkpoint_without_weights_is_not_called_an_embedding(tmp_path: Path, content) -> None:
    torch.save(content, tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match="m.ckpt' holds no weights of a model; name another file"):
        weights.read_state_dict(tmp_path / "m.ckpt")
