"""--push_to_hub and --save_as_full_pipeline, with a hub that is only played; and the command of diffusers' README."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import split
from typing import Any

import huggingface_hub
import pytest
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file

from ldm import embeddings
from ldm.training import hub
from ldm.training.command_line import parse
from ldm.training.hub import Learned, card
from ldm.training.run_folder import RunFolder
from ldm.util import UsageError, UserError
from tests.training.runs import only_run, start

ROOT = Path(__file__).resolve().parents[2]


class Hub:
    """Plays `huggingface_hub.HfApi`: keeps what is uploaded, and fails where it is told to."""

    def __init__(self) -> None:
        self.uploaded: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.role = "write"
        self.license = ""

    def __call__(self, token: str | None = None) -> Hub:
        self.token = token
        return self

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise self.fails[name]

    def whoami(self) -> dict[str, Any]:
        self._called("whoami")
        return {"name": "me", "auth": {"accessToken": {"role": self.role}}}

    def create_repo(self, name: str, exist_ok: bool = False) -> Any:
        self._called("create_repo")
        assert exist_ok
        return type("Url", (), {"repo_id": name if "/" in name else f"me/{name}"})

    def model_info(self, name: str) -> Any:
        self._called("model_info")
        data = huggingface_hub.ModelCardData(license=self.license) if self.license else None
        return type("Info", (), {"card_data": data})

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self._called("upload_folder")
        for path in Path(folder_path).rglob("*"):
            if path.is_file():
                self.uploaded[f"{repo_id}/{path.relative_to(folder_path).as_posix()}"] = path.read_bytes()


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Hub:
    played = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", played)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_saved")
    return played


def front_of(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


README = """
    --pretrained_model_name_or_path=models/ldm/creatures/model.safetensors --train_data_dir=data/concepts/bobo
    --learnable_property=object --placeholder_token=<cat-toy> --initializer_token=toy --resolution=32
    --train_batch_size=1 --gradient_accumulation_steps=4 --max_train_steps=2 --learning_rate=5.0e-04 --scale_lr
    --lr_scheduler=constant --lr_warmup_steps=0 --push_to_hub --save_as_full_pipeline
    --output_dir={out}/textual_inversion_cat
"""


@pytest.mark.client_files
def test_the_command_of_diffusers_readme(played, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert start(*split(README.format(out=tmp_path))) == 0
    shown = capsys.readouterr()
    assert "txt2img-finetune.yaml, for 'models/ldm/creatures/model.safetensors'" in shown.out
    assert "learning '<cat-toy>' (1 vector) from 5 images" in shown.out
    assert "2 steps of batch 1; learning rate 2.00e-03 = 5.00e-04 x 1 (batch)" in shown.out
    assert "times the factor of" not in shown.out
    run = only_run(tmp_path / "textual_inversion_cat")
    assert f"pipeline:   {run / 'pipeline'}" in shown.out
    assert "uploaded to the Hugging Face hub: me/textual_inversion_cat" in shown.out
    repository = "me/textual_inversion_cat"
    files = ("README.md", "cat-toy.safetensors", "learned_embeds.safetensors")
    pipeline = run / "pipeline"
    of_pipeline = {path.relative_to(pipeline).as_posix() for path in pipeline.rglob("*") if path.is_file()}
    assert "model_index.json" in of_pipeline
    names = {*files, *(f"sample_{number}.png" for number in range(4)), *of_pipeline}
    assert set(played.uploaded) == {f"{repository}/{name}" for name in names}, "and no photo"
    assert {"<cat-toy>"} == set(load_file(run / "hub" / "learned_embeds.safetensors"))
    text = played.uploaded[f"{repository}/README.md"].decode()
    assert front_of(text) == {"tags": ["textual_inversion", "text-to-image", "diffusers"]}
    for part in (
        "`<cat-toy>`",
        "![sample_0.png](sample_0.png)",
        "`a photo of <cat-toy>`",
        f'pipe.load_textual_inversion("{repository}", weight_name="cat-toy.safetensors", token="<cat-toy>")',
        "`a photo of embedding:cat-toy`",
        "AUTOMATIC1111: put `cat-toy.safetensors` into `embeddings/`",
        "| initializer | `toy` |",
        "| steps | `2` |",
        "| learning rate | `0.002` |",
        "| base model | `model.safetensors` |",
    ):
        assert part in text, part


@pytest.mark.client_files
def test_a_failed_upload_loses_nothing_and_says_how_to_upload_later(played, tiny_yaml, capsys):
    played.fails["upload_folder"] = ConnectionError("no route\nto the hub")
    words = ["--push_to_hub", "--hub_model_id", "me/cat", "--hub_token", "hf_mine", "--max_steps", 1]
    assert start("--base", tiny_yaml, "-t", *words) == 1
    shown = capsys.readouterr()
    run = only_run()
    assert (
        f"not uploaded to 'me/cat' (no route); nothing is lost, upload later: hf upload me/cat {run}/hub ."
        in shown.err
    )
    assert f"embeddings: {run}/checkpoints/embeddings.pt" in shown.out
    assert "load_textual_inversion" in (run / "hub" / "README.md").read_text()
    assert embeddings.read(next((run / "hub").glob("toy*.safetensors"))).triggers == ["*"]
    assert played.token == "hf_mine"
    written = "".join(
        p.read_text(errors="replace") for p in run.rglob("*") if p.suffix in (".yaml", ".log", ".json")
    )
    assert "hf_mine" not in written, "a token is for nobody else"
    played.fails, played.license = {}, "mit"
    assert start("-r", run, "-t", *words) == 0
    assert "uploaded to the Hugging Face hub: me/cat" in capsys.readouterr().out
    assert front_of(played.uploaded["me/cat/README.md"].decode())["license"] == "mit", (
        "what its owner chose stays"
    )


def test_a_stopped_check_uploads_nothing(played, tiny_yaml):
    assert start("--base", tiny_yaml, "--push_to_hub", "--hub_model_id", "cat") == 0
    assert played.calls == ["whoami"] and not Path("logs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--push_to_hub", "give --hub_model_id OWNER/NAME"),
        ("--push_to_hub --hub_model_id a/b/c", "'a/b/c' is no name of a repository"),
        (
            "--push_to_hub --output_dir 'my words'",
            "'my words' is no name of a repository; give --hub_model_id",
        ),
    ],
)
def test_the_name_is_checked_before_training(played, words, message):
    with pytest.raises(UsageError, match=message):
        hub.check(parse(split(words)))
    assert not played.calls


def test_token_and_package_are_checked_before_training(played, monkeypatch):
    options = parse(split("--push_to_hub --hub_model_id me/cat"))
    hub.check(options)
    assert played.token == "hf_saved"
    played.role = "read"
    with pytest.raises(UserError, match="the token may only read"):
        hub.check(options)
    played.fails["whoami"] = OSError("401 Client Error\nInvalid user token")
    with pytest.raises(UserError, match=r"cannot be reached \(401 Client Error\); run 'hf auth login'"):
        hub.check(options)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match="needs a token"):
        hub.check(options)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="pip install huggingface_hub"):
        hub.check(options)


def test_what_is_no_word_cannot_be_uploaded(played, line):
    with pytest.raises(UsageError, match="--push_to_hub is for learned words"):
        hub.check_model(
            parse(split("--push_to_hub --hub_model_id cat")), OmegaConf.create(), RunFolder(Path(), ""), line
        )


def test_a_card_names_a_base_model_of_the_hub_and_no_license():
    settings = {"base model": "stable-diffusion-v1-5", "learning rate": 5e-4}
    learned = Learned({"*": "toy", "<a|b>": "a-b"}, "me/stable-diffusion-v1-5", True, settings)
    text = card("me/toy", learned, {"sample_0.png": "two | `*`"})
    assert front_of(text)["base_model"] == "me/stable-diffusion-v1-5" and "license" not in front_of(text)
    assert 'from_pretrained("me/stable-diffusion-v1-5")' in text
    assert 'weight_name="toy.safetensors", token="<toy>")' in text, "diffusers refuses * as a word"
    assert "`` two \\| `*` ``" in text and "| learning rate | `0.0005` |" in text
    other = card("me/toy", Learned({"*": "toy"}, "model.ckpt", False, settings), {})
    assert "load_textual_inversion" not in other and "--embedding_path toy.safetensors" in other
    assert front_of(other) == {"tags": ["textual_inversion", "text-to-image"]}


def test_a_pipeline_that_diffusers_cannot_hold_is_refused_before_training(tiny_yaml, capsys):
    pytest.importorskip("diffusers")
    assert start("--base", tiny_yaml, "-t", "--save_as_full_pipeline", "--max_steps", 1) == 1
    assert (
        "--save_as_full_pipeline: the tokenizer has 775 words and the text encoder 49408"
        in capsys.readouterr().err
    )
    assert not Path("logs").exists()
