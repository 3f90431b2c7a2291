"""The command lines of scripts/txt2img.py and scripts/stable_txt2img.py, on the model of a golden record."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from ldm.checkpoint import config_of
from ldm.embeddings import Concept, LearnedEmbeddings, write
from scripts import stable_txt2img, txt2img
from tests.golden_record import Golden

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--ddim_steps", "1", "--n_samples", "2", "--scale", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its config beside it, and two embedding files."""
    folder = tmp_path_factory.mktemp("model")
    Golden("clip_one_vector").write_model(folder)
    for name, value, width in (("cat", 0.5, 32), ("dog", 0.1, 32), ("wide", 0.1, 768)):
        concept = Concept(f"<{name}>", torch.full((1, width), value))
        write(LearnedEmbeddings((concept,)), folder / f"{name}.pt", "original")
    return folder


@pytest.fixture
def run(folder, tmp_path, capsys):
    """Run a script; returns its exit code, the lines it printed, and the files it wrote."""

    def run(*arguments: str, script=txt2img, options=QUICK):
        base = ["--ckpt_path", str(folder / "model.ckpt"), "--outdir", str(tmp_path / "out")]
        code = script.main([*base, *options, *map(str, arguments)])
        said = capsys.readouterr()
        files = sorted(str(p.relative_to(tmp_path / "out")) for p in tmp_path.glob("out/**/*") if p.is_file())
        return code, said, files

    return run


def test_pictures_are_numbered_and_the_grid_has_the_prompts_name(run, folder, tmp_path) -> None:
    arguments = ["--embedding_path", folder / "cat.pt", "--prompt", "a photo of <cat>, small"]
    code, said, files = run(*arguments, "--n_iter", 2)
    grid = "a-photo-of-<cat>,-small.png"
    assert code == 0
    assert files == [grid, *(f"samples/000{n}.png" for n in range(4))]
    printed = [line for line in said.out.splitlines() if line.startswith(str(tmp_path))]
    assert printed == [str(tmp_path / "out" / name) for name in [*files[1:], grid]]
    assert Image.open(tmp_path / "out/samples/0003.png").size == (32, 32)
    assert Image.open(tmp_path / "out" / grid).size == (70, 70)  # two rows of two, with a padding of 2
    _, _, files = run(*arguments)
    assert files[-1] == "samples/0005.png" and len(files) == 7


def test_the_default_prompt_is_what_was_learned(run, folder) -> None:
    assert run("--embedding_path", folder / "cat.pt")[2][0] == "a-photo-of-<cat>.png"
    assert run()[2][0] == "a-photo-of-<cat>.png"
    assert run()[2][1] == "a-photo-of-a-creature.png"


def test_several_embedding_files(run, folder) -> None:
    code, _, files = run(
        "--embedding_path", folder / "cat.pt", folder / "dog.pt", "--prompt", "<cat> and <dog>", "--skip_save"
    )
    assert code == 0 and files == ["<cat>-and-<dog>.png"]


def test_prompts_from_a_file_are_one_picture_each(run, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n\na photo\n a sculpture \n")
    assert txt2img.read_lines(tmp_path / "prompts.txt") == ["a dog", "a photo", "a sculpture"]
    arguments = ["--from-file", tmp_path / "prompts.txt", "--n_rows", 3]
    assert run(*arguments)[2] == ["grid-0000.png", *(f"samples/000{n}.png" for n in range(3))]
    assert Image.open(tmp_path / "out/grid-0000.png").size == (104, 36)
    assert run(*arguments, "--skip_save")[2][:2] == ["grid-0000.png", "grid-0001.png"]


def test_what_to_leave_out_and_the_format(run, tmp_path) -> None:
    assert run("--skip_grid", "--format", "jpg")[2] == ["samples/0000.jpg", "samples/0001.jpg"]
    assert Image.open(tmp_path / "out/samples/0000.jpg").format == "JPEG"
    assert len(run("--skip_grid", "--skip_save")[2]) == 2


def test_the_same_command_draws_the_same_pictures(run, tmp_path) -> None:
    run("--prompt", "a dog", "--seed", 3)
    run("--prompt", "a dog", "--seed", 3, "--H", 32)
    run("--prompt", "a dog", "--seed", 4)
    first, _, again, _, other, _ = (
        path.read_bytes() for path in sorted((tmp_path / "out/samples").iterdir())
    )
    assert first == again != other


def test_fixed_code_starts_every_round_alike(run, tmp_path) -> None:
    run("--prompt", "a dog", "--n_iter", 2, "--fixed_code")
    pictures = [path.read_bytes() for path in sorted((tmp_path / "out/samples").iterdir())]
    assert pictures[:2] == pictures[2:] and pictures[0] != pictures[1]


@pytest.mark.parametrize("sampler", ["--plms", "--dpm_solver", "--ddim_eta=1"])
def test_samplers(run, sampler: str) -> None:
    assert run(sampler, "--skip_grid")[0] == 0


def test_every_setting_reaches_the_sampler(run, monkeypatch) -> None:
    seen = {}

    def record(model, prompts, **settings):
        seen.update(settings, prompts=prompts)
        return [Image.new("RGB", (8, 8))]

    monkeypatch.setattr("ldm.generate.images.generate", record)
    arguments = [
        "--prompt",
        "a dog",
        "--negative_prompt",
        "a cat",
        "--scale",
        2,
        "--ddim_eta",
        0.5,
        "--seed",
        9,
    ]
    more = [
        "--H",
        24,
        "--W",
        40,
        "--ddim_steps",
        7,
        "--n_samples",
        2,
        "--n_iter",
        2,
        "--precision",
        "autocast",
    ]
    assert run(*arguments, *more, options=[])[0] == 0
    expected = {
        "prompts": ["a dog"] * 4,
        "negative_prompt": "a cat",
        "scale": 2.0,
        "eta": 0.5,
        "seed": 9,
        "height": 24,
        "width": 40,
        "steps": 7,
        "batch_size": 2,
        "precision": "autocast",
        "sampler": "ddim",
        "numbers": None,
    }
    assert {key: seen[key] for key in expected} == expected
    for flag in ("plms", "dpm_solver"):
        run("--prompt", "a dog", f"--{flag}")
        assert seen["sampler"] == flag


def test_stable_diffusions_names(run, folder) -> None:
    arguments = ["--config", folder / "config.yaml", "--prompt", "a dog", "--C", 4, "--f", 8]
    for number in range(2):
        code, _, files = run(*arguments, script=stable_txt2img, options=[*QUICK, "--n_iter", "1"])
        assert code == 0 and f"a-dog-000{number}.png" in files
    assert "samples/00003.png" in files


def test_stable_diffusions_defaults(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(stable_txt2img, "run", lambda options, profile: seen.append(options))
    assert stable_txt2img.main([]) == stable_txt2img.main(["--laion400m"]) == 0
    stable, laion = seen
    assert (stable.ddim_steps, stable.scale, stable.n_iter, stable.n_samples) == (50, 7.5, 2, 3)
    assert stable.precision == "autocast" and stable.config.endswith("v1-inference.yaml")
    assert laion.ckpt_path == "models/ldm/text2img-large/model.ckpt" and "laion400m" in laion.outdir
    assert (ROOT / stable.config).is_file() and (ROOT / laion.config).is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--ddim_steps", "-5"], 2, "argument --ddim_steps: '-5' is not a positive whole number"),
        (["--ddim_steps", "0"], 2, "'0' is no positive"),
        (["--n_samples", "some"], 2, "'some' is no positive"),
        (["--H", "-32"], 2, "argument --H"),
        (["--ddim_eta", "2"], 2, "argument --ddim_eta: '2' is not a number from 0 to 1"),
        (["--ddim_eta", "much"], 2, "'much' is not a number"),
        (["--plms", "--dpm_solver"], 2, "not allowed with argument --plms"),
        (["--plms", "--ddim_eta", "0.5"], 2, "--ddim_eta 0.5 needs DDIM; leave --plms out"),
        (["--precision", "half"], 2, "invalid choice: 'half'"),
        (["--colour"], 2, "unrecognized arguments: --colour"),
        (["--ckpt_path", "gone.ckpt"], 1, "'gone.ckpt' does not exist"),
        (["--embedding_path", "gone.pt"], 1, "'gone.pt' does not exist"),
        (["--config", "gone.yaml"], 1, "'gone.yaml' does not exist"),
        (["--from-file", "gone.txt"], 1, "'gone.txt' does not exist"),
        (["--prompt", "a photo of <cat>"], 1, "mentions '<cat>', but no loaded embedding"),
        (["--prompt", "a photo of *"], 1, r"mentions '\*'"),
        (["--negative_prompt", "<cat>"], 1, "mentions '<cat>'"),
        (["--H", "36"], 1, "height 36 is not a multiple of 8"),
        (["--ddim_steps", "1001"], 1, "more than the model's 1000"),
    ],
)
def test_mistakes_are_one_line(run, arguments: list[str], code: int, message: str) -> None:
    returned, said, files = run(*arguments, options=[])
    assert returned == code and files == []
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(said.err)


def test_files_that_are_something_else_are_one_line(run, folder, tmp_path) -> None:
    (tmp_path / "page.ckpt").write_text("<!DOCTYPE html>")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "list.yaml").write_text("- a")
    (tmp_path / "out").write_text("in the way")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    whole, config = (folder / "model.ckpt").read_bytes(), OmegaConf.load(folder / "config.yaml")
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.pt").write_bytes((folder / "cat.pt").read_bytes()[:-200])
    config.model.params.unet_config.params.model_channels = 64
    OmegaConf.save(config, tmp_path / "wider.yaml")
    config.model.params.unet_config.params.chanels = 64
    OmegaConf.save(config, tmp_path / "misspelt.yaml")
    config.model.target = "ldm.models.diffusion.ddpm.Diffusion"
    OmegaConf.save(config, tmp_path / "nowhere.yaml")
    beside = ["--config", folder / "config.yaml", "--outdir", tmp_path / "o"]
    for arguments, message in (
        (["--ckpt_path", tmp_path / "cut.ckpt", *beside], "cut.ckpt' is damaged"),
        (["--embedding_path", tmp_path / "cut.pt", *beside], "cut.pt"),
        (["--config", tmp_path / "wider.yaml", "--outdir", tmp_path / "o"], "does not fit the config"),
        (["--config", tmp_path / "misspelt.yaml", "--outdir", tmp_path / "o"], "unknown key 'chanels'"),
        (["--config", tmp_path / "nowhere.yaml", "--outdir", tmp_path / "o"], "has no 'Diffusion'"),
        (["--embedding_path", tmp_path / "page.ckpt", "--outdir", tmp_path / "o"], "page.ckpt"),
        (["--embedding_path", folder / "wide.pt", "--outdir", tmp_path / "o"], "768"),
        (["--ckpt_path", tmp_path / "page.ckpt", "--outdir", tmp_path / "o"], "page.ckpt"),
        (["--ckpt_path", tmp_path / "other.safetensors", "--outdir", tmp_path / "o"], "with --config"),
        (["--config", tmp_path / "list.yaml", "--outdir", tmp_path / "o"], "must hold a mapping"),
        (["--from-file", tmp_path / "empty.txt"], "holds no prompt"),
        (["--from-file", folder / "cat.pt"], "no UTF-8 text file"),
        ([], "cannot make the folder"),
    ):
        code, said, _ = run(*arguments)
        assert code == 1 and message in said.err and said.err.count("\n") == 1, said.err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: out of memory; try"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_running_out_of_memory_and_ctrl_c_end_without_traceback(
    monkeypatch, capsys, error, code, said
) -> None:
    def fail(options, profile):
        raise error

    monkeypatch.setattr(txt2img, "run", fail)
    assert txt2img.main([]) == code
    assert capsys.readouterr().err.startswith(said)


def test_a_mistake_of_ours_is_not_hidden(monkeypatch) -> None:
    def fail(options, profile):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(txt2img, "run", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        txt2img.main([])


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("cond_stage_model.transformer.token_emb.weight", "txt2img-1p4B-eval_with_tokens.yaml"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "v1-inference.yaml"),
    ],
)
def test_a_published_checkpoint_finds_its_config(tmp_path, key: str, config: str) -> None:
    save_file({key: torch.zeros(1)}, tmp_path / "model.safetensors")
    found = config_of(str(tmp_path / "model.safetensors"))
    assert found.name == config and found.is_file()


def test_a_learned_word_of_the_config_may_be_prompted(run, folder, tmp_path) -> None:
    config = OmegaConf.load(folder / "config.yaml")
    config.model.params.personalization_config.params.embedding_manager_ckpt = str(
        Golden("clip_one_vector").embeddings
    )
    OmegaConf.save(config, tmp_path / "learned.yaml")
    assert run("--config", tmp_path / "learned.yaml", "--prompt", "a photo of *")[0] == 0


@pytest.mark.parametrize("script", ["txt2img.py", "stable_txt2img.py"])
def test_a_mistake_is_told_at_once_and_from_any_folder(script: str, tmp_path) -> None:
    """Without the seconds that torch takes to import; the checkout need not be installed."""
    code = (
        "import runpy, sys; sys.argv = ['x', '--ckpt', 'gone.ckpt'];"
        f"sys.path[:] = [p for p in sys.path if 'site-packages' not in p];"
        f"runpy.run_path({str(ROOT / 'scripts' / script)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "error: 'gone.ckpt' does not exist; check the path\n")
