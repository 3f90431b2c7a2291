"""main.py: the names that YAMLs use, and its command line."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import main
from ldm.embeddings.method_files import MethodFile, write_method_file
from ldm.util import get_obj_from_str
from tests.at_once import answers_of


@pytest.mark.parametrize("name", ["DataModuleFromConfig", "ImageLogger", "SetupCallback", "CUDACallback"])
def test_yaml_targets_are_classes_of_the_library(name):
    found = get_obj_from_str(f"main.{name}")
    assert found is getattr(main, name)
    assert found.__module__.startswith("ldm.training."), "or __main__ and main would have different classes"


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in (
        "--actual_resume",
        "--placeholder_string",
        "--train_data_dir",
        "130",
        "143",
        "SIGUSR1",
        "override",
    ):
        assert word in text


@pytest.mark.refused_first
def test_wrong_command_line(capsys):
    assert main.main(["--nonsense"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: unknown flag --nonsense") and shown.err.count("\n") == 1


ROOT = Path(__file__).resolve().parents[1]
# In a process of its own, because here everything is imported already.
WITHOUT_TORCH = """
import io, sys
from contextlib import redirect_stderr, redirect_stdout
import main
from ldm.commands import generate

def heavy():
    return sorted({"torch", "pytorch_lightning", "lightning_fabric", "transformers"} & set(sys.modules))

for line in sys.stdin.read().splitlines():
    run = generate.main if line.startswith("generate ") else main.main
    shown = io.StringIO()
    with redirect_stderr(shown), redirect_stdout(io.StringIO()):
        try:
            code = run(line.removeprefix("generate ").split())
        except SystemExit as ended:
            code = ended.code
    print(code, heavy(), shown.getvalue().strip())
"""
YAML = "configs/latent-diffusion/txt2img-finetune.yaml"
METHODS, WORDS = "configs/personalization", "model.params.personalization_config.params"
IMAGES = "data.params.train.params"
OPTIMIZER, XL = "model.params.optimizer_config", "configs/stable-diffusion/xl-finetune.yaml"
MODEL = "models/ldm/creatures/model.safetensors"
ANSWERED_AT_ONCE = {
    "--help": (0, ""),
    "--nonsense": (2, "unknown flag --nonsense"),
    "-t": (2, "give a YAML with --base"),
    f"--base {YAML} -t --gpus all": (2, "--gpus 'all' is not understood"),
    f"--base {YAML} -t --lr_scheduler step": (2, "invalid choice: 'step'"),
    f"--base {YAML} -t --push_to_hub": (2, "give --hub_model_id OWNER/NAME"),
    # Without --base the YAML follows from the model.
    f"--pretrained_model_name_or_path {MODEL} --train_data_dir nowhere": (
        1,
        "image folder not found: nowhere",
    ),
    f"--actual_resume {MODEL} -t model.params.timestep=5": (1, "unknown key 'timestep'"),
    f"--base {METHODS}/neti.yaml -t --actual_resume {MODEL} {WORDS}.hidden=5000": (1, "hidden is 5000"),
    "--pretrained_model_name_or_path {damaged}/a.png": (1, "is a text file"),
    "--pretrained_model_name_or_path {plain}/a.png": (1, "is an image"),
    "--pretrained_model_name_or_path no.ckpt": (1, "checkpoint 'no.ckpt' does not exist"),
    f"--base {YAML} -t --num_vectors many": (2, "not a positive whole number"),
    "--base no.yaml -t": (1, "no such YAML: 'no.yaml'"),
    "--base {broken} -t": (1, "broken.yaml', line 2"),
    f"--base {YAML} -t --data_root nowhere": (1, "image folder not found: nowhere"),
    f"--base {YAML} -t --data_root configs": (1, "no images in configs"),
    f"--base {YAML} -t --data_root {{damaged}}": (1, "cannot read image"),
    f"--base {YAML} -t --data_root {{plain}} {IMAGES}.use_captions=true": (
        1,
        "no image has a caption beside it",
    ),
    f"--base {YAML} -t --data_root {{captioned}} {IMAGES}.use_captions=true": (
        1,
        "b.txt is not a UTF-8 text file",
    ),
    f"--base {YAML} -t --data_root {{plain}} {IMAGES}.mask_weight=0.1": (1, "but no image has a mask"),
    f"--base {YAML} -t {IMAGES}.template_file=no.txt": (1, "template file not found: no.txt"),
    f"--base {YAML} -t --actual_resume no.ckpt": (1, "checkpoint 'no.ckpt' does not exist"),
    f"--base configs/stable-diffusion/v1-finetune.yaml -t --data_root {{plain}} --actual_resume {MODEL}": (
        1,
        f"'{MODEL}' is the embedded model (v), and the config describes Stable Diffusion 1; leave the config out, or "
        f"name models/ldm/creatures/config.yaml to generate, {YAML} to train",
    ),
    f"--base {YAML} -t --vae no.ckpt": (1, "checkpoint 'no.ckpt' does not exist"),
    f"--base {YAML} -t --embedding_manager_ckpt no.pt": (1, "'no.pt': it does not exist"),
    f"--base {YAML} -t --embedding_manager_ckpt {{broken}}": (1, "broken.yaml': it is a text file"),
    f"--base {YAML} -t --embedding_manager_ckpt https://a.b/c.pt": (
        1,
        "it is a web address; download the file",
    ),
    f"--base {YAML} -t --actual_resume https://huggingface.co/me/toy": (
        1,
        "'https://huggingface.co/me/toy' is a web address; name the hub id me/toy, or download the file",
    ),
    "--pretrained_model_name_or_path https://a.b/c.ckpt": (
        1,
        "is a web address; name a hub id as OWNER/NAME",
    ),
    f"generate --ckpt_path https://hf.co/me/toy/tree/main --config {YAML}": (1, "name the hub id me/toy"),
    f"--base {YAML} -t --max_steps 0": (2, "max_steps is 0"),
    f"--base {YAML} -t --max_steps 5 --min_steps 9": (
        2,
        "lightning.trainer.min_steps (--min_steps) is 9, more than max_steps, which is 5; lower it, or raise max_steps",
    ),
    f"--base {YAML} -t {IMAGES}.set=training": (1, "set is 'training'; it must be one of train, val"),
    f"--base {YAML} -t model.params.optimizer_config.target=AdamW": (1, "'AdamW' is not a dotted path"),
    f"--base {YAML} -t model.base_learning_rate=-1": (1, "base_learning_rate is -1"),
    # Of methods' classes, which are not imported for the check.
    f"--base {YAML} {METHODS}/prospect.yaml -t {WORDS}.stages=0": (
        1,
        "stages is 0; it must be a whole number from 1",
    ),
    f"--base {YAML} {METHODS}/neti.yaml -t {WORDS}.hidden=5000": (1, "hidden is 5000"),
    f"--base {YAML} {METHODS}/dreamartist.yaml -t {WORDS}.guidance=1": (
        1,
        "guidance is 1; it must be a number above 1",
    ),
    # Of several parameters together.
    f"--base {YAML} -t model.params.linear_start=0.5": (1, "linear_start is 0.5, more than linear_end"),
    f"--base {YAML} {METHODS}/prospect.yaml -t {WORDS}.stages=1001": (
        1,
        "stages is 1001, and the model has 1000 timesteps",
    ),
    f"--base {YAML} {METHODS}/grid.yaml -t {WORDS}.residual=false {WORDS}.residual_layers=false "
    f"{WORDS}.learn_input=false": (1, "learn_input is false"),
    f"--base {YAML} -t model.params.timestep_range=[0.8,0.2]": (1, "timestep_range is [0.8, 0.2]; give two"),
    f"--base {YAML} -t lightning.callbacks.image_logger.params.log_images_kwargs.ddim_steps=2000": (
        1,
        "ddim_steps is 2000, and the model has 1000 timesteps",
    ),
    f"--base {YAML} -t {WORDS}.placeholder_strings=[a,a]": (1, "placeholder 'a' is there twice"),
    f"--base {YAML} -t model.params.scheduler_config.params.lr_max=abc": (1, "lr_max is 'abc'"),
    # Of the run.
    f"--base {METHODS}/neti.yaml -t": (1, "describes a model; put one that does before the others"),
    f"--base {YAML} -t --actual_resume {{plain}}/a.png": (1, "is an image"),
    f"--base {YAML} -t --actual_resume=": (1, "actual_resume is empty"),
    f"--base {YAML} -t --vae {YAML}": (1, "is a YAML; name the file with the weights"),
    f"--base {YAML} -t --precision fp16": (2, "(--precision); it must be one of 16"),
    f"--base {YAML} -t --accelerator tpu": (2, "accelerator is 'tpu'; choose one of auto"),
    f"--base {YAML} -t --gpus=-2": (2, "--gpus '-2' is negative"),
    f"--base {YAML} -t trainer.max_steps=10": (2, "write lightning.trainer.max_steps=10"),
    f"--base {YAML} -t lightning.callbacks.warmstart={{{{}}}}": (1, "did you mean 'warm_start'?"),
    f"--base {YAML} -t lightning.callbacks.embedding_saver.params.formats=[foo]": (
        1,
        "it must be one of original",
    ),
    f"--base {YAML} {METHODS}/core.yaml -t {WORDS}.initializer_words=[]": (
        1,
        "initializer_words has none for '*'",
    ),
    f"--base {YAML} {METHODS}/core.yaml -t {WORDS}.prompts=[portrait]": (1, "'portrait', which has no {}"),
    f"--base {YAML} -t {WORDS}.placeholder_strings=[a,b] {WORDS}.num_vectors_per_token=[1,2,3]": (
        1,
        "num_vectors_per_token has 3 entries for 2 placeholder_strings",
    ),
    f"--base {YAML} -t {WORDS}.num_vectors_per_token.x=2": (1, "names 'x', which is no placeholder"),
    f"--base {YAML} -t {WORDS}.placeholder_strings=[] {WORDS}.initializer_words=[toy]": (
        1,
        "1 initializer_words for 0 placeholder_strings",
    ),
    f"--base {YAML} -t {IMAGES}.crops=2 {IMAGES}.center_crop=false": (1, "crops needs square crops"),
    # Of pixels.
    f"--base {YAML} -t --data_root {{cut}}": (1, "cannot read image"),
    f"--base {YAML} -t --data_root {{tiny}}": (1, "is 4x4 pixels"),
    f"--base {YAML} -t --data_root {{plain}} {IMAGES}.zooms=[1,8]": (1, "at zoom 8; use a larger image"),
    f"--base {YAML} -t --data_root {{black}} {IMAGES}.mask_weight=0.1": (1, "is black everywhere"),
    f"--base {YAML} -t --data_root {{wide}} {IMAGES}.mask_weight=0.1": (1, "but its image is 32x32"),
    # Of captions and samples.
    f"--base {YAML} -t --data_root {{plain}} {IMAGES}.template_file={{templates}}": (
        1,
        "none of the captions contains the placeholder '*' (one caption is 'a photo of 1')",
    ),
    f"--base {YAML} -t --data_root {{plain}} {IMAGES}.placeholder_token=@": (
        1,
        "none of the captions contains the placeholder '*'",
    ),
    f"--base {YAML} -t --data_root {{plain}} {IMAGES}.coarse_class_text.x=bear": (
        1,
        "coarse_class_text names 'x', which is none of the placeholders '*'",
    ),
    f"--base {YAML} -t model.params.first_stage_key=jpg": (
        1,
        "hold image, caption, sizes; name one of these",
    ),
    # Of classes of other packages.
    f"--base {YAML} -t {OPTIMIZER}.target=torch.optim.AdamW {OPTIMIZER}.params.betas=[2,0.9]": (
        1,
        "betas[0] is 2; it must be a number from 0 and below 1",
    ),
    f"--base {YAML} -t {OPTIMIZER}.target=torch.optim.SparseAdam": (1, "takes sparse gradients alone"),
    f"--base {YAML} -t {OPTIMIZER}.target=bytes_and_bits.AdamW": (
        1,
        "there is no module 'bytes_and_bits'; check its spelling, or install the package that has it",
    ),
    # Of limits.
    f"--base {YAML} -t {WORDS}.num_vectors_per_token=31": (1, "of '*' is 31; use a number from 1 to 30"),
    f"--base {YAML} -t data.params.num_workers=1024": (1, "the limit of open files has room for"),
    f"--base {YAML} -t --data_root {{aside}} {IMAGES}.mask_weight=0.1": (
        1,
        "shows anything of its mask; crop the image",
    ),
    # Of the vectors to begin from, and of models.
    f"--base {YAML} -t --vae {{vectors}}": (1, "is a textual inversion embedding and no first stage (VAE)"),
    f"--base {YAML} -t -l {{templates}}": (1, "templates' is a file; choose another folder with --logdir"),
    f"--base {YAML} -t --embedding_manager_ckpt {MODEL}": (1, "it is the embedded model, not an embedding"),
    f"--base {YAML} -t --embedding_manager_ckpt {{vectors}}": (
        1,
        "(width 768) is for Stable Diffusion 1.x",
    ),
    f"--base {XL} {METHODS}/neti.yaml -t --data_root {{plain}}": (
        1,
        "not possible for Stable Diffusion XL yet",
    ),
    f"--base {XL} {METHODS}/core.yaml -t --data_root {{plain}}": (
        1,
        "not possible for Stable Diffusion XL yet",
    ),
    f"--base {YAML} -t --actual_resume {{sd1}}": (
        1,
        "Stable Diffusion 1, and the config describes the embedded",
    ),
    f"-r {MODEL} -t": (1, "a frozen model is given as --actual_resume FILE"),
    "-r {state} -t": (
        1,
        "it is the state of a run outside its folder; put it back into logs/<run>/checkpoints",
    ),
    f"--base {YAML} -t --data_root {{clear}} {IMAGES}.mask_weight=0.1": (1, "is transparent everywhere"),
    f"--base {YAML} -t --embedding_manager_ckpt {{pair}}": (
        1,
        "this model's text encoder has width 128",
    ),
    # The words and the method of a file.
    f"--base {YAML} -t --embedding_manager_ckpt {{own}} --placeholder_string <b>": (
        1,
        "holds no '<b>', only '<a>', '<c>'",
    ),
    f"--base {YAML} -t --embedding_manager_ckpt {{method}}": (1, "holds words of the method 'neti'"),
    f"--base {YAML} {METHODS}/prospect.yaml -t --embedding_manager_ckpt {{method}}": (
        1,
        "is of the method 'neti', and ProSpect needs a file of 'prospect'",
    ),
    f"--base {YAML} {METHODS}/neti.yaml -t --embedding_manager_ckpt {{vectors}}": (
        1,
        "holds plain vectors, and NeTI needs",
    ),
    f"--base {YAML} -t --embedding_manager_ckpt {{photo}}": (1, "the image carries no embedding"),
    "-r {vectors} -t": (1, "it holds vectors; a new run begins from them"),
    # A run that is resumed keeps its words, its method and its model.
    f"-r {{run}} -t {WORDS}.num_vectors_per_token=2": (2, "keeps its number of vectors, 1; 2 is asked for"),
    "-r {run} -t --placeholder_string @": (2, "keeps its placeholder"),
    f"-r {{run}} --base {METHODS}/neti.yaml -t": (2, "keeps its personalization"),
    "-r {run} -t --actual_resume no.ckpt": (2, "keeps its base model"),
    "-r {run} -t --embedding_manager_ckpt no.pt": (2, "'no.pt' and -r exclude each other"),
    "-r nowhere -t": (1, "-r 'nowhere' does not exist"),
    "--resume_from_checkpoint nowhere -t": (1, "--resume_from_checkpoint 'nowhere' does not exist"),
    "generate --help": (0, ""),
}


@pytest.mark.refused_first
def test_mistakes_are_answered_before_torch_is_imported(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("model:\n\ttarget: x\n")
    image = (ROOT / "data" / "concepts" / "bobo" / "01.png").read_bytes()
    for name, content in (("plain", image), ("damaged", b"no image")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(content)
    captioned = tmp_path / "captioned"
    captioned.mkdir()
    for name, caption in (("a", b"a good one"), ("b", b"a\xff")):
        (captioned / f"{name}.png").write_bytes(image)
        (captioned / f"{name}.txt").write_bytes(caption)
    (tmp_path / "cut").mkdir()
    photo = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(photo, "JPEG")
    (tmp_path / "cut" / "a.jpg").write_bytes(photo.getvalue()[:-300])
    (tmp_path / "tiny").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "tiny" / "a.png")
    for name, mask in (("black", Image.new("L", (32, 32))), ("wide", Image.new("L", (64, 32), "white"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(image)
        mask.save(tmp_path / name / "a-masklabel.png")
    (tmp_path / "aside").mkdir()
    Image.new("RGB", (64, 32)).save(tmp_path / "aside" / "a.png")
    mask = Image.new("L", (64, 32))
    mask.paste(255, (0, 0, 8, 32))
    mask.save(tmp_path / "aside" / "a-masklabel.png")
    (tmp_path / "templates").write_text("a photo of 1\n")
    vectors = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": torch.zeros(1, 768)}}
    torch.save(vectors, tmp_path / "vectors")
    state = {"embedding_manager.string_to_param_dict.*": torch.zeros(1, 128)}
    torch.save({"state_dict": state, "loops": {}, "global_step": 1}, tmp_path / "state")
    torch.save({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, tmp_path / "pair")
    own = {"string_to_param": {"<a>": torch.zeros(1, 128), "<c>": torch.zeros(1, 128)}}
    torch.save(own, tmp_path / "own")
    method = MethodFile("neti", {"*": 1}, {"x": torch.ones(2)}, {}, {}, "clip", 128)
    write_method_file(method, tmp_path / "method")
    (tmp_path / "photo").write_bytes(image)
    (tmp_path / "clear").mkdir()
    Image.new("RGBA", (32, 32)).save(tmp_path / "clear" / "a.png")
    unet = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768, "in_channels": 4}
    for name, content in (
        ("model_index.json", json.dumps({"_class_name": "StableDiffusionPipeline"})),
        ("unet/config.json", json.dumps(unet)),
        ("unet/diffusion_pytorch_model.safetensors", "weights"),
        ("scheduler/scheduler_config.json", json.dumps({"prediction_type": "epsilon"})),
    ):
        (tmp_path / "sd1" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sd1" / name).write_text(content)
    run = tmp_path / "run"
    for name in ("configs", "checkpoints"):
        (run / name).mkdir(parents=True)
    (run / "configs" / "project.yaml").write_bytes((ROOT / YAML).read_bytes())
    (run / "checkpoints" / "last.ckpt").write_bytes(b"a state")
    folders = ("plain", "damaged", "captioned", "run", "cut", "tiny", "black", "wide")
    folders += ("templates", "vectors", "sd1", "aside", "state", "pair", "clear")
    folders += ("own", "method", "photo")
    places = {name: tmp_path / name for name in folders} | {"broken": broken}
    lines = [line.format(**places) for line in ANSWERED_AT_ONCE]
    answers = answers_of(WITHOUT_TORCH, lines)
    for line, answer, (code, message) in zip(lines, answers, ANSWERED_AT_ONCE.values(), strict=True):
        assert answer.startswith(f"{code} [] "), (line, answer)
        assert message in answer, (line, answer)
