"""The command lines of scripts/txt2img.py and scripts/stable_txt2img.py, on the model of a golden record."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from ldm.base_models import config_of
from ldm.commands import generate
from ldm.embeddings import Concept, LearnedEmbeddings, Metadata, write
from ldm.generate import Settings, request
from ldm.images import open_image
from tests.golden_record import Golden
from tests.modules.methods.conftest import words

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
    """Run a command; returns its exit code, its output, and the files it wrote."""

    def run(*arguments: str, command=generate.main, options=QUICK):
        base = ["--ckpt_path", str(folder / "model.ckpt"), "--outdir", str(tmp_path / "out")]
        code = command([*base, *options, *map(str, arguments)])
        output = capsys.readouterr()
        files = sorted(str(p.relative_to(tmp_path / "out")) for p in tmp_path.glob("out/**/*") if p.is_file())
        return code, output, files

    return run


def test_images_are_numbered_and_the_grid_is_named_after_the_prompt(run, folder, tmp_path) -> None:
    arguments = ["--embedding_path", folder / "cat.pt", "--prompt", "a photo of <cat>, small"]
    code, output, files = run(*arguments, "--n_iter", 2)
    grid = "a-photo-of-<cat>,-small.png"
    assert code == 0
    assert files == [grid, *(f"samples/000{n}.png" for n in range(4))]
    printed = [line for line in output.out.splitlines() if line.startswith(str(tmp_path))]
    assert printed == [str(tmp_path / "out" / name) for name in [*files[1:], grid]]
    assert open_image(tmp_path / "out/samples/0003.png").size == (32, 32)
    assert open_image(tmp_path / "out" / grid).size == (70, 70)  # two rows of two, with a padding of 2
    _, _, files = run(*arguments)
    assert files[-1] == "samples/0005.png" and len(files) == 7
    assert open_image(tmp_path / "out" / grid).size == (70, 36)  # the images of one round in a row


def test_the_default_prompt_names_the_first_learned_placeholder(run, folder) -> None:
    assert run("--embedding_path", folder / "cat.pt")[2][0] == "a-photo-of-<cat>.png"
    assert run()[2][0] == "a-photo-of-<cat>.png"
    assert run()[2][1] == "a-photo-of-a-creature.png"


def test_several_embedding_files(run, folder) -> None:
    code, _, files = run(
        "--embedding_path", folder / "cat.pt", folder / "dog.pt", "--prompt", "<cat> and <dog>", "--skip_save"
    )
    assert code == 0 and files == ["<cat>-and-<dog>.png"]


def test_each_prompt_of_a_file_gives_one_image(run, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n\na photo\n a sculpture \n")
    assert generate.read_lines(tmp_path / "prompts.txt") == ["a dog", "a photo", "a sculpture"]
    arguments = ["--from-file", tmp_path / "prompts.txt", "--n_rows", 3]
    assert run(*arguments)[2] == ["grid-0000.png", *(f"samples/000{n}.png" for n in range(3))]
    assert open_image(tmp_path / "out/grid-0000.png").size == (104, 36)
    assert run(*arguments, "--skip_save")[2][:2] == ["grid-0000.png", "grid-0001.png"]


def test_skipping_files_and_choosing_the_format(run, tmp_path) -> None:
    assert run("--skip_grid", "--format", "jpg")[2] == ["samples/0000.jpg", "samples/0001.jpg"]
    with Image.open(tmp_path / "out/samples/0000.jpg") as image:
        assert image.format == "JPEG"
    assert len(run("--skip_grid", "--skip_save")[2]) == 2


def test_the_same_command_generates_the_same_images(run, tmp_path) -> None:
    run("--prompt", "a dog", "--seed", 3)
    run("--prompt", "a dog", "--seed", 3, "--H", 32)
    run("--prompt", "a dog", "--seed", 4)
    first, _, again, _, other, _ = (
        path.read_bytes() for path in sorted((tmp_path / "out/samples").iterdir())
    )
    assert first == again != other


def test_fixed_code_uses_the_same_noise_in_every_round(run, tmp_path) -> None:
    run("--prompt", "a dog", "--n_iter", 2, "--fixed_code")
    images = [path.read_bytes() for path in sorted((tmp_path / "out/samples").iterdir())]
    assert images[:2] == images[2:] and images[0] != images[1]


@pytest.mark.parametrize("sampler", ["--plms", "--dpm_solver", "--ddim_eta=1"])
def test_samplers(run, sampler: str) -> None:
    assert run(sampler, "--skip_grid")[0] == 0


def test_every_option_reaches_generate(run, monkeypatch) -> None:
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
    edits = ["--concept_strength", 0.5, "--class_word", "cat"]
    more = [
        *edits,
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
        "init": None,
        "concept_strength": 0.5,
        "class_words": "cat",
    }
    assert {key: seen[key] for key in expected} == expected
    for flag in ("plms", "dpm_solver"):
        run("--prompt", "a dog", f"--{flag}")
        assert seen["sampler"] == flag


def test_grids_of_stable_diffusion_are_numbered(run, folder) -> None:
    arguments = ["--config", folder / "config.yaml", "--prompt", "a dog", "--C", 4, "--f", 8]
    for number in range(2):
        code, _, files = run(*arguments, command=generate.stable_main, options=[*QUICK, "--n_iter", "1"])
        assert code == 0 and f"a-dog-000{number}.png" in files
    assert "samples/00003.png" in files


def test_defaults_of_stable_diffusion(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(generate, "run", lambda options, profile: seen.append(options))
    assert generate.stable_main([]) == generate.stable_main(["--laion400m"]) == 0
    stable, laion = seen
    assert (stable.ddim_steps, stable.scale, stable.n_iter, stable.n_samples) == (50, 7.5, 2, 3)
    assert stable.precision == "autocast" and stable.config is None
    assert laion.ckpt_path == "models/ldm/text2img-large/model.ckpt" and "laion400m" in laion.outdir
    assert (ROOT / laion.config).is_file()


def test_a_variant_of_a_model_of_the_hub_is_what_is_fetched(run, folder, monkeypatch) -> None:
    def fetch(*asked) -> Path:
        assert asked == ("me/model", "fp16", "main")
        return folder / "model.ckpt"

    monkeypatch.setattr("ldm.weights.located", fetch)
    words = ["--ckpt_path", "me/model", "--variant", "fp16", "--revision", "main", "--prompt", "a dog"]
    assert run(*words)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--ddim_steps", "-5"], 2, "argument --ddim_steps: '-5' is not a whole number from 1"),
        (["--ddim_steps", "0"], 2, "'0' is not a whole number from 1"),
        (["--n_samples", "some"], 2, "'some' is not a whole number"),
        (["--H", "-32"], 2, "argument --H"),
        (["--ddim_eta", "2"], 2, "argument --ddim_eta: '2' is not a number from 0 to 1"),
        (["--ddim_eta", "much"], 2, "'much' is not a number"),
        (["--plms", "--dpm_solver"], 2, "not allowed with argument --plms"),
        (["--plms", "--ddim_eta", "0.5"], 2, "--ddim_eta 0.5 needs DDIM; remove --plms"),
        (["--precision", "half"], 2, "invalid choice: 'half'"),
        (["--colour"], 2, "unrecognized arguments: --colour"),
        (["--ckpt_path", "gone.ckpt"], 1, "'gone.ckpt' does not exist"),
        (["--embedding_path", "gone.pt"], 1, "'gone.pt' does not exist"),
        (["--variant", "fp16"], 2, "--variant and --revision are for a hub id; '.*model.ckpt' is here"),
        (["--config", "gone.yaml"], 1, "'gone.yaml' does not exist"),
        (["--from-file", "gone.txt"], 1, "'gone.txt' does not exist"),
        (["--prompt", "a photo of <cat>"], 1, "mentions '<cat>', but no loaded embedding"),
        (["--prompt", "a photo of *"], 1, r"mentions '\*'"),
        (["--negative_prompt", "<cat>"], 1, "mentions '<cat>'"),
        (["--H", "36"], 1, "height 36 is not a multiple of 8"),
        (["--ddim_steps", "1001"], 1, "more than the model's 1000"),
        (["--dial", "foo"], 2, "argument --dial: 'foo' is not a NAME=NUMBER, such as truncation=32"),
        (["--dial", "truncation=nan"], 2, "argument --dial: 'truncation=nan' is not a NAME=NUMBER"),
        (["--dial", "truncation=1e999"], 2, "'truncation=1e999' is not"),
        (["--dial", "=3"], 2, "'=3' is not"),
        (["--dial", "truncation=3"], 1, "no dial 'truncation' of plain vectors; there are none"),
    ],
)
def test_mistakes_are_one_line(run, arguments: list[str], code: int, message: str) -> None:
    returned, output, files = run(*arguments, options=[])
    assert returned == code and files == []
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert re.search(message, output.err)


@pytest.mark.one_reader
def test_files_of_another_kind_are_errors_of_one_line(run, folder, tmp_path) -> None:
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
        (["--ckpt_path", tmp_path / "cut.ckpt", *beside], "cut.ckpt': it is damaged"),
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
        (["--from-file", folder / "cat.pt"], "not a UTF-8 text file"),
        ([], "cannot write to the folder"),
    ):
        code, output, _ = run(*arguments)
        assert code == 1 and message in output.err and output.err.count("\n") == 1, output.err


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("cond_stage_model.transformer.token_emb.weight", "txt2img-1p4B-eval_with_tokens.yaml"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "v1-inference.yaml"),
    ],
)
def test_a_published_checkpoint_finds_its_config(tmp_path, key: str, config: str) -> None:
    first = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({key: torch.zeros(1), first: torch.zeros(1, 4, 1, 1)}, tmp_path / "model.safetensors")
    found = config_of(str(tmp_path / "model.safetensors"))
    assert found.name == config and found.is_file()


def test_a_prompt_may_use_a_learned_placeholder_of_the_config(run, folder, tmp_path) -> None:
    config = OmegaConf.load(folder / "config.yaml")
    config.model.params.personalization_config.params.embedding_manager_ckpt = str(
        Golden("clip_one_vector").embeddings
    )
    OmegaConf.save(config, tmp_path / "learned.yaml")
    assert run("--config", tmp_path / "learned.yaml", "--prompt", "a photo of *")[0] == 0


def test_a_personalization_of_the_users_own(run, folder, tmp_path) -> None:
    config = OmegaConf.load(folder / "config.yaml")
    config.model.params.personalization_config = {"target": "tests.commands.own_word.OwnWord"}
    OmegaConf.save(config, tmp_path / "own.yaml")
    arguments = ["--config", tmp_path / "own.yaml", "--prompt", "a photo of <own>", "--skip_grid"]
    for value in (1, -1):
        torch.save({"<own>": value * torch.linspace(-1, 1, 32)[None]}, tmp_path / "own.pt")
        assert run(*arguments, "--embedding_path", tmp_path / "own.pt")[0] == 0
    first, _, other, _ = (path.read_bytes() for path in sorted((tmp_path / "out/samples").iterdir()))
    assert first != other


# -- what was asked is done, or a line says that it is not --


@pytest.mark.done_or_said
def test_a_loaded_word_that_no_prompt_uses_is_named(run, folder, caplog) -> None:
    code, _, _ = run("--embedding_path", folder / "cat.pt", "--prompt", "a cat")
    assert code == 0
    assert "cat.pt' is loaded, but no prompt contains its word '<cat>'" in caplog.text
    caplog.clear()
    run("--embedding_path", folder / "cat.pt", "--prompt", "a photo", "--negative_prompt", "a <CAT>")
    assert "no prompt contains" not in caplog.text


@pytest.mark.done_or_said
def test_weights_change_the_image_and_plain_takes_them_as_text(run, folder, tmp_path) -> None:
    images = {}
    for name, prompt, *options in (
        ("none", "a photo of a dog"),
        ("one", "a photo of a (dog:1.0)"),
        ("weighted", "a photo of a (dog:1.5)"),
        ("comfyui", "a photo of a (dog:1.5)", "--prompt_syntax", "comfyui"),
        ("plain", "a photo of a (dog:1.5)", "--prompt_syntax", "plain"),
        ("chunks", "a photo BREAK of a dog"),
    ):
        code, _, _ = run("--prompt", prompt, *options, "--outdir", tmp_path / name, "--scale", "2")
        assert code == 0
        images[name] = open_image(tmp_path / name / "samples" / "0000.png").tobytes()
    assert images["one"] == images["none"]
    assert len(set(images.values())) == len(images) - 1


@pytest.mark.done_or_said
def test_embedding_in_a_prompt_finds_the_file(run, folder, tmp_path, monkeypatch) -> None:
    named = run(
        "--embedding_path", folder / "cat.pt", "--prompt", "a photo of <cat>", "--outdir", tmp_path / "a"
    )
    found = run("--prompt", "a photo of embedding:cat", "--embedding_dir", folder, "--outdir", tmp_path / "b")
    assert named[0] == found[0] == 0
    first, second = (tmp_path / name / "samples" / "0000.png" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    monkeypatch.chdir(folder)
    assert run("--prompt", "a photo of (embedding:cat.pt:1.2)")[0] == 0
    assert run("--prompt", "a photo of Embedding:cat.")[0] == 0
    code, output, _ = run("--prompt", "a photo of embedding: cat")
    assert code == 1 and "'embedding:' without a name; write embedding:NAME without a space" in output.err
    code, output, _ = run("--prompt", "a photo of embedding:mouse")
    assert code == 1 and "'embedding:mouse', but there is no such file here or in 'embeddings'" in output.err


@pytest.mark.done_or_said
def test_the_token_limit_is_an_error_for_a_word_and_a_warning_for_text(run, folder, caplog) -> None:
    code, _, _ = run("--prompt", "a " * 75 + "photo of a dog")
    assert code == 0 and 'truncates the prompt: "photo of a dog" has no effect' in caplog.text
    code, output, _ = run("--embedding_path", folder / "cat.pt", "--prompt", "a " * 75 + "<cat>")
    assert code == 1
    assert "the token limit of 77 truncates '<cat>'" in output.err and "(0 of 1 vectors remain)" in output.err


@pytest.mark.done_or_said
@pytest.mark.parametrize("prompt", ["a <lora:cat:0.8>", "[cat:dog:0.5]"])
def test_syntax_that_is_not_supported_is_refused(run, prompt) -> None:
    code, output, _ = run("--prompt", prompt)
    assert code == 1 and "not supported" in output.err


@pytest.mark.done_or_said
def test_an_output_that_is_not_finite_is_an_error(run, tmp_path, monkeypatch) -> None:
    def broken(self, z, **options):
        return torch.full((len(z), 3, 8, 8), float("nan"))

    monkeypatch.setattr("ldm.models.diffusion.ddpm.LatentDiffusion.decode_first_stage", broken)
    code, output, files = run("--prompt", "a photo")
    assert code == 1 and files == []
    assert "model.ckpt" in output.err and "is not finite" in output.err


def test_an_image_does_not_depend_on_a_longer_prompt_beside_it(run, tmp_path) -> None:
    (tmp_path / "one.txt").write_text("a photo of a dog\n")
    (tmp_path / "two.txt").write_text("a photo of a dog\na photo BREAK of a dog\n")
    images = []
    for name in ("one", "two"):
        assert run("--from-file", tmp_path / f"{name}.txt", "--outdir", tmp_path / name, "--scale", 2)[0] == 0
        images.append((tmp_path / name / "samples" / "0000.png").read_bytes())
    assert images[0] == images[1]


@pytest.mark.done_or_said
@pytest.mark.parametrize("name", ["cat", "my.cat-2", "बिल्ली", "می\u200cخواهم", "café", "a/b"])
@pytest.mark.parametrize("text", ["a {}", "({}:1.2)", "{}, red", "red {}."])
def test_an_embedding_is_named_by_its_file_in_any_language(tmp_path, name: str, text: str) -> None:
    path = write(LearnedEmbeddings((Concept("<x>", torch.ones(1, 8)),)), tmp_path / f"{name}.pt", "original")
    paths: list[str] = []
    found = request._find_embeddings(text.format(f"embedding:{name}"), str(tmp_path), paths)
    assert found == text.format("<x>") and paths == [str(path)]


@pytest.fixture
def to_edit(tmp_path):
    """An image of another shape, and a mask of its right half."""
    pixels = np.random.RandomState(0).randint(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    mask = Image.new("L", (60, 40))
    mask.paste(255, (30, 0, 60, 40))
    mask.save(tmp_path / "mask.png")
    return tmp_path


def test_an_edit_is_written_into_the_settings_and_can_be_repeated(run, to_edit) -> None:
    arguments = ["--init_img", to_edit / "a.png", "--mask", to_edit / "mask.png", "--strength", 0.5]
    options = ["--ddim_steps", "4", "--n_samples", "1", "--scale", "2", "--skip_grid"]
    for _ in range(2):
        assert run(*arguments, "--prompt", "a dog", options=options)[0] == 0
    first, again = (to_edit / "out/samples" / f"000{n}.png" for n in range(2))
    assert first.read_bytes() == again.read_bytes()
    settings = Settings.from_image(first)
    assert settings.steps == 4 and settings.labels["Denoising strength"] == "0.5"
    assert settings.labels["Init image"].startswith("a.png ") and settings.labels["Mask"].startswith(
        "mask.png "
    )
    original = np.asarray(open_image(to_edit / "a.png").crop((10, 0, 50, 40)).resize((32, 32), Image.BICUBIC))
    edited = np.asarray(open_image(first))
    assert np.array_equal(edited[:, :16], original[:, :16]) and not np.array_equal(edited, original)


def test_the_concept_strength_takes_the_class_word_of_the_file(run, folder, tmp_path) -> None:
    path = tmp_path / "word.pt"
    concept = Concept("<cat>", torch.full((1, 32), 0.5))
    write(LearnedEmbeddings((concept,), Metadata(initializer="dog")), path, "original")
    options = ["--ddim_steps", "2", "--n_samples", "1", "--scale", "2", "--skip_grid", "--prompt", "a <cat>"]
    for arguments in ((), ("--concept_strength", 1), ("--concept_strength", 0), ("--concept_strength", 2)):
        code, output, _ = run("--embedding_path", path, *arguments, options=options)
        assert code == 0, output.err
    assert run("--prompt", "a dog", options=options[:-2])[0] == 0
    images = [open_image(tmp_path / f"out/samples/000{n}.png").tobytes() for n in range(5)]
    assert images[0] == images[1] and len({images[n] for n in (0, 2, 3)}) == 3
    near = np.frombuffer(images[2], np.uint8).astype(int) - np.frombuffer(images[4], np.uint8)
    assert np.abs(near).max() <= 1, "nothing but the class word"
    settings = Settings.from_image(tmp_path / "out/samples/0003.png")
    assert settings.labels["Concept strength"] == "2" and settings.labels["Class words"] == "<cat>=dog"
    assert "Concept strength" not in Settings.from_image(tmp_path / "out/samples/0001.png").labels


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--mask", "mask.png"], 2, "--mask mask.png needs an image to begin from; add --init_img FILE"),
        (["--strength", "0.5"], 2, "--strength 0.5 needs an image"),
        (["--init_img", "a.png", "--strength", "1.5"], 2, "--strength: '1.5'"),
        (["--init_img", "none.png"], 1, "image not found: none.png"),
        (["--init_img", "a.png", "--mask", "small.png"], 1, "the mask is 8x8 pixels, but the image is 60x40"),
        (["--init_img", "a.png", "--mask", "black.png"], 1, "black.png is black everywhere"),
        (["--init_img", "a.png", "--mask", "edge.png"], 1, "the mask marks nothing in the central part"),
        (["--class_word", "cat"], 2, "--class_word cat is for --concept_strength"),
        (["--concept_strength", "nan"], 2, "--concept_strength: "),
        (["--concept_strength", "-1"], 2, "--concept_strength: "),
        (["--concept_strength", "2"], 1, "the class word of '<cat>' is not in its file; name it, as in"),
        (["--concept_strength", "2", "--class_word", "<x>=cat"], 1, "names no loaded word; loaded: <cat>"),
    ],
)
def test_mistakes_in_editing_are_one_line(
    run, folder, to_edit, monkeypatch, arguments, code, message
) -> None:
    Image.new("L", (8, 8), 255).save(to_edit / "small.png")
    Image.new("L", (60, 40)).save(to_edit / "black.png")
    edge = Image.new("L", (60, 40))
    edge.paste(255, (0, 0, 5, 40))
    edge.save(to_edit / "edge.png")
    monkeypatch.chdir(to_edit)
    done, output, files = run("--embedding_path", folder / "cat.pt", "--prompt", "a <cat>", *arguments)
    assert done == code and message in output.err and not files
    assert "Traceback" not in output.err and len(output.err.strip().splitlines()) == 1


@pytest.mark.done_or_said
def test_shipped_files_are_found_from_any_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    parser = generate.make_parser(generate.Profile(), "txt2img.py")
    options = parser.parse_args(["--config", "models/ldm/creatures/config.yaml", "--vae", "mine.ckpt"])
    assert Path(options.ckpt_path).is_file() and Path(options.config).is_file() and options.vae == "mine.ckpt"
    Path("models/ldm/creatures").mkdir(parents=True)
    Path("models/ldm/creatures/config.yaml").write_text("mine: 1")
    assert not Path(parser.parse_args(["--config", "models/ldm/creatures/config.yaml"]).config).is_absolute()


def test_a_dial_of_a_word_of_a_method(run, tmp_path, monkeypatch) -> None:
    made = words(Golden("clip_one_vector").model(), "neti", "<a>")
    made.save(tmp_path / "a.safetensors")
    arguments = ["--embedding_path", tmp_path / "a.safetensors", "--prompt", "a <a>", "--skip_grid"]
    for dials in ((), ("truncation=1", "bypass=0.5"), ("truncation=8",)):
        assert run(*arguments, *(word for dial in dials for word in ("--dial", dial)))[0] == 0
    images = [open_image(tmp_path / f"out/samples/000{n}.png").tobytes() for n in (0, 2, 4)]
    assert images[0] == images[2] != images[1]
    settings = Settings.from_image(tmp_path / "out/samples/0002.png")
    assert settings.labels["Dials"] == "truncation=1, bypass=0.5"
    monkeypatch.setattr(generate, "load_latent_diffusion", lambda *a, **k: pytest.fail("the model is read"))
    assert run(*arguments, "--dial", "bypass=3")[1].err == "error: the dial bypass is 3; use 0 to 1\n"
    wrong = run(*arguments, "--dial", "truncation=9")[1].err
    assert wrong == "error: the dial truncation is 9; use a whole number from 0 to 8\n"
    code, output, _ = run(*arguments, "--dial", "size=3")
    assert (
        code == 1 and output.err == "error: there is no dial 'size' of NeTI; known are: bypass, truncation\n"
    )


@pytest.mark.done_or_said
def test_vectors_for_another_text_encoder_are_refused_before_the_model_is_read(run, tmp_path, monkeypatch):
    write(LearnedEmbeddings((Concept("<wide>", torch.zeros(1, 768)),)), tmp_path / "wide.pt", "original")
    monkeypatch.setattr(generate, "load_latent_diffusion", lambda *a, **k: pytest.fail("the model is read"))
    code, output, _ = run("--embedding_path", tmp_path / "wide.pt", "--prompt", "a <wide>")
    assert code == 1 and "'<wide>' (width 768) is for Stable Diffusion 1.x" in output.err
