"""The console command `textual-inversion`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import main as main_py
from ldm.commands import entry

ROOT = Path(__file__).resolve().parents[2]
# Runs the command in a process that has not imported anything of the library, and fails if it imported torch.
WITHOUT_TORCH = """
import sys
sys.path.insert(0, {root!r})
from ldm.commands.entry import main
code = main({argv!r})
heavy = [name for name in ("torch", "transformers", "pytorch_lightning") if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else code)
"""


def run_without_torch(argv: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    code = WITHOUT_TORCH.format(root=str(ROOT), argv=argv)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", entry.COMMANDS)
def test_every_command_has_a_help_text_under_its_name(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        entry.main([command, "--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: textual-inversion {command} ")
    assert "%(prog)s" not in output


def test_the_help_text_lists_the_commands(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        entry.main(["--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert all(f"\n  {name} " in output for name in ("train", "generate", "embeddings", "evaluate", "export"))


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], 2, "error: the following arguments are required: COMMAND (see --help)\n"),
        (["paint"], 2, "error: argument COMMAND: invalid choice: 'paint'"),
        (["generate", "--ckpt", "gone.ckpt"], 1, "error: 'gone.ckpt' does not exist; check the path\n"),
        (["generate", "--n_samples", "0"], 2, "error: argument --n_samples"),
        (["evaluate", "--concept", "x", "--word", "x", "--ckpt", "gone.ckpt"], 1, "error: 'gone.ckpt' does"),
        (["embeddings", "convert", "gone.pt", "--to", "a1111"], 1, "error: 'gone.pt' does not exist"),
        (["embeddings", "convert", "gone.pt", "--to", "pickle"], 2, "error: argument --to: invalid choice"),
        (["embeddings", "split", "gone.pt"], 1, "error: 'gone.pt' does not exist"),
        (["export", "--out", "x", "--embedding_path", "gone.pt", "--ckpt", "gone"], 1, "error: 'gone' does"),
    ],
)
def test_mistakes_are_one_line_before_torch_is_imported(tmp_path, argv, code: int, message: str) -> None:
    done = run_without_torch(argv, tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


FINETUNE = str(ROOT / "configs" / "latent-diffusion" / "txt2img-finetune.yaml")
NETI = str(ROOT / "configs" / "personalization" / "neti.yaml")
DATA = ["--data_root", str(ROOT / "data" / "concepts" / "bobo")]
NODE = "model.params.personalization_config"


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["model.params.timestep=5"], 1, "unknown key 'timestep' (did you mean 'timesteps'?)"),
        ([f"{NODE}.params.num_vectors_per_token=0"], 1, "is 0; it must be a whole number from 1 to 1,000"),
        (
            [f"{NODE}.target=ldm.modules.embeding_manager.EmbeddingManager"],
            1,
            "'ldm.modules.embeding_manager'",
        ),
        (["--base", FINETUNE, NETI, f"{NODE}.params.bypass=-1"], 1, "bypass is -1"),
        (
            ["--base", FINETUNE, NETI, f"{NODE}.params.bypas=1"],
            1,
            "unknown key 'bypas' (did you mean 'bypass'?)",
        ),
        (["--accumulate_grad_batches", "0"], 2, "lightning.trainer.accumulate_grad_batches is 0"),
        (["lightning.callbacks.warm_start.params.rat=1"], 1, "unknown key 'rat' (did you mean 'rate'?)"),
        (["data.params.train.params.size=33"], 1, "data.params.train.params.size is 33"),
    ],
)
def test_what_classes_accept_is_known_before_torch_is_imported(tmp_path, argv, code: int, message) -> None:
    done = run_without_torch(["train", "--base", FINETUNE, *DATA, "-t", *argv], tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["embeddings", "convert", "--help"]])
def test_help_needs_no_torch(tmp_path, argv: list[str]) -> None:
    assert run_without_torch(argv, tmp_path).returncode == 0


def test_training_is_the_command_of_main_py(capsys) -> None:
    assert main_py.main is entry.train
    assert entry.main(["train", "--nonsense"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown flag --nonsense")


def test_training_finds_the_names_of_main_py_in_any_folder(tmp_path) -> None:
    """A run is checked in a folder without main.py, from a YAML that names main.DataModuleFromConfig."""
    config = ROOT / "configs" / "latent-diffusion" / "txt2img-finetune.yaml"
    assert "main.DataModuleFromConfig" in config.read_text()
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import ldm
sys.path.remove({str(ROOT)!r})
from ldm.commands.entry import main
code = main(["train", "--base", {str(config)!r}, "--data_root", "nowhere"])
sys.exit("main was imported" if "main" in sys.modules else code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == "error: image folder not found: nowhere\n"


def test_ctrl_c_while_torch_is_imported_ends_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    config = ROOT / "configs" / "latent-diffusion" / "txt2img-finetune.yaml"
    ended = subprocess.run(
        [sys.executable, ROOT / "main.py", "--base", config, "-t"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (130, "")
