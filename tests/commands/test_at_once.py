"""Mistakes in the commands beside main.py that are answered before torch, which takes seconds to import."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from ldm.embeddings import Concept, LearnedEmbeddings, write
from ldm.embeddings.method_files import MethodFile, write_method_file
from tests.at_once import answers_of

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models/ldm/creatures"
BOBO = ROOT / "data/concepts/bobo"

RUN = """
import io, sys
from contextlib import redirect_stderr, redirect_stdout
from ldm.commands import embeddings, evaluate, export, generate
from ldm.commands.base import guarded
from ldm.studio import server

COMMANDS = {
    "txt2img": generate.main, "stable": generate.stable_main, "embeddings": embeddings.main,
    "merge": embeddings.merge_main, "evaluate": evaluate.main, "export": export.main,
    "studio": lambda words: guarded(lambda: server.main(words)),
}
heavy = {"torch", "pytorch_lightning", "lightning_fabric", "transformers", "diffusers", "gradio"}
for line in sys.stdin.read().splitlines():
    command, *words = line.split(" | ")
    shown = io.StringIO()
    with redirect_stderr(shown), redirect_stdout(io.StringIO()):
        try:
            code = COMMANDS[command](words)
        except SystemExit as ended:
            code = ended.code
    print(code, sorted(heavy & set(sys.modules)), shown.getvalue().strip().replace(chr(10), " / "))
"""

# The words of a command, with names of files of `places` in braces -> what the line says.
MISTAKES = {
    # -- models
    "txt2img | --ckpt | {page}": "is a web page",
    "txt2img | --ckpt | {cut}": "is truncated",
    "txt2img | --ckpt | {lora}": "is a LoRA",
    "txt2img | --ckpt | {word}": "is a textual inversion embedding",
    "txt2img | --ckpt | {unet}": "has no first stage (VAE); bring one with --vae",
    "txt2img | --vae | {lora}": "is a LoRA and no first stage",
    "txt2img | --vae | {page}": "is a web page",
    "txt2img | --config | configs/stable-diffusion/v1-inference.yaml": "the config describes Stable Diffusion 1",
    "txt2img | --config | {misspelt}": "unknown key 'chanels'",
    "txt2img | --config | {empty}": "describes no model",
    "txt2img | --config | {nowhere}": "has no 'Diffusion'",
    "txt2img | --original_size | 64 | 64": "--original_size is for Stable Diffusion XL",
    "txt2img | --H | 30": "height 30 is not a multiple of 8",
    "txt2img | --ddim_steps | 2000": "2000 sampling steps are more than the model's 1000 timesteps",
    "stable | --plms": "does not exist",
    "studio | --port | 70000": "is not between 1 and 65535",
    "studio | --root | {nothing}": "is not a folder; name one",
    "studio | --auth | x": "--auth needs NAME:PASSWORD",
    # -- words
    "txt2img | --embedding_path | {page}": "is a web page",
    "txt2img | --embedding_path | {model}": "not an embedding; name it as the model",
    "txt2img | --embedding_path | {state}": "the state of a training run",
    "txt2img | --embedding_path | {lora}": "it is a LoRA, not an embedding",
    "txt2img | --embedding_path | {wide}": "(width 768) is for Stable Diffusion 1.x",
    "txt2img | --embedding_path | {photo}": "the image carries no embedding",
    "txt2img | --embedding_path | {nan}": "contains NaN or infinity",
    "txt2img | --embedding_path | {word} | {nan}": "contains NaN or infinity",
    "txt2img | --embedding_path | {aesthetic}": "an aesthetic gradient",
    "txt2img | --embedding_path | {neti} | {star}": "two of the files hold '*'",
    "txt2img | --config | {start}": "holds no '<b>', only '<cat>'",
    "txt2img | --config | {package}": "): target 'nopackage.Thing': there is no module 'nopackage'",
    "txt2img | --embedding_path | {strange}": "is of the method 'strange'; known are",
    "txt2img | --embedding_path | {word} | {other}": "both have the trigger '<cat>'",
    "txt2img | --embedding_path | {word} | --prompt | a <dog>": "no loaded embedding has that name (loaded: '<cat>')",
    "txt2img | --prompt | a photo of *": "no loaded embedding has that name (loaded: none)",
    "txt2img | --prompt | embedding:cat": "there is no such file here",
    "txt2img | --prompt | [a:b:0.5]": "prompt editing and alternation",
    "txt2img | --prompt | <lora:x:1>": "LoRAs and hypernetworks are not supported",
    "txt2img | --prompt | (a:1.3.1)": "is not a number",
    "txt2img | --prompt | (a:30)": "beyond -10 to 10",
    "txt2img | --dial | truncation=3": "there is no dial 'truncation' of plain vectors",
    "txt2img | --embedding_path | {neti} | --dial | strength=1": "no dial 'strength' of NeTI; known are: bypass",
    "txt2img | --embedding_path | {neti} | --dial | truncation=99": "use a whole number from 0 to 32",
    "txt2img | --embedding_path | {word} | --concept_strength | 2": "the class word of '<cat>' is not in its file",
    "txt2img | --embedding_path | {word} | --concept_strength | 2 | --class_word | <b>=cat": "names no loaded word",
    # -- images and folders
    "txt2img | --init_img | {nothing}": "image not found",
    "txt2img | --init_img | {page}": "web page",
    "txt2img | --init_img | {photo} | --mask | {small}": "the mask is 8x8 pixels, but the image is 64x64",
    "txt2img | --init_img | {photo} | --mask | {black}": "black everywhere",
    "txt2img | --outdir | {page}": "is a file); choose another",
    # -- embedding files
    "embeddings | inspect | {nothing}": "it does not exist; check the path",
    "embeddings | inspect | {page} | {model}": "name it as the model",
    "embeddings | inspect | {word} | --ckpt_path | {lora}": "has no text encoder",
    "embeddings | convert | {page} | --to | a1111": "is a web page",
    "embeddings | convert | {neti} | --to | a1111": "words of the method 'neti', which are more than vectors",
    "embeddings | convert | {word} | --to | safetensors | -o | {word}": "exists already",
    "embeddings | convert | {both} | --to | a1111 | --trigger | <a>": "has 2 words; a new name fits one",
    "embeddings | convert | {bert} | --to | safetensors": "the file does not say which",
    "embeddings | merge | {word} | {other} | -o | {nothing}": "both have the trigger '<cat>'",
    "embeddings | merge | {word} | {wide} | -o | {nothing}": "different text encoders",
    "embeddings | merge | {word} | --rename | <b>=<c> | -o | {nothing}": "there is no trigger '<b>'",
    "embeddings | split | {page}": "is a web page",
    "embeddings | transfer | {neti} | --from | {model} | --to | {model} | -o | {nothing}": "train the word anew",
    "embeddings | transfer | {word} | --from | {page} | --to | {model} | -o | {nothing}": "is a web page",
    "embeddings | transfer | {word} | --from | {model} | --to | {lora} | -o | {nothing}": "has no text encoder",
    "merge | --manager_ckpts | {word} | {other} | --output_path | {nothing}": "both have the trigger '<cat>'",
    # -- evaluation and export
    "evaluate | --concept | {nothing} | --word | a cat": "does not exist; name a folder of images",
    "evaluate | --concept | {bobo} | --embedding_path | {nothing}": "does not exist; check the path",
    "evaluate | --concept | {bobo} | --embedding_path | {wide}": "(width 768) is for Stable Diffusion 1.x",
    "evaluate | --concept | {bobo} | --embedding_path | {word} | --prompt | a cat": "does not mention the concept",
    "evaluate | --concept | {bobo} | --embedding_path | {word} | --dial | x=1": "no dial 'x' of plain vectors",
    "evaluate | --concept | {bobo} | --word | a cat | --ckpt | {page}": "is a web page",
    "evaluate | --concept | {bobo} | --word | a cat | --features | {nothing}": "there is no such folder",
    "evaluate | --concept | {bobo} | --word | a cat | --judge | {nothing}": "name a folder with a judge, or none",
    "evaluate | --concept | {bobo} | --word | a cat | --outdir | {page}": "is a file); choose another",
    "export | --out | {folder}": "exists already; name another folder with --out",
    "export | --out | {nothing} | --ckpt | {page}": "is a web page",
    "export | --out | {nothing} | --embedding_path | {neti}": "diffusers has none for them",
    "export | --out | {nothing} | --embedding_path | {wide}": "(width 768) is for Stable Diffusion 1.x",
    "export | --out | {nothing} | --embedding_path | {word} | --rename | <b>=<c>": "name each learned word once",
    "export | --out | {nothing} | --embedding_path | {both} | --rename | <a>=<b>": "two words the same name",
}


def word(trigger: str, width: int = 128, number: float = 1.0, **more: object) -> Concept:
    return Concept(trigger, torch.full((1, width), number), **more)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """The files and folders of `MISTAKES` by their names."""
    folder = tmp_path_factory.mktemp("mistakes")
    found = {
        "folder": folder,
        "nothing": folder / "nothing.pt",
        "bobo": BOBO,
        "model": MODEL / "model.safetensors",
    }

    def place(name: str) -> Path:
        found[name.partition(".")[0]] = folder / name
        return folder / name

    place("page.html").write_text("<!DOCTYPE html><html><body>Not found</body></html>")
    place("cut.safetensors").write_bytes((MODEL / "model.safetensors").read_bytes()[:1_000_000])
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 4)}, place("lora.safetensors"))
    save_file(
        {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 24, 3, 3)}
        | {"model.diffusion_model.output_blocks.0.0.attn2.to_k.weight": torch.zeros(8, 128)}
        | {
            "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, 128)
        },
        place("unet.safetensors"),
    )
    config = MODEL / "config.yaml"
    found["beside"] = config
    for name, key, value in (
        ("misspelt.yaml", "model.params.unet_config.params.chanels", 64),
        ("nowhere.yaml", "model.target", "ldm.models.diffusion.ddpm.Diffusion"),
        ("package.yaml", "model.params.optimizer_config", {"target": "nopackage.Thing"}),
        ("start.yaml", "model.params.personalization_config", {}),
    ):
        changed = OmegaConf.load(config)
        if not value:
            value = {"target": "ldm.modules.embedding_manager.EmbeddingManager"}
            start = str(folder / "word.safetensors")
            value["params"] = {"placeholder_strings": ["<b>", "<c>"], "embedding_manager_ckpt": start}
        OmegaConf.update(changed, key, value, force_add=True)
        OmegaConf.save(changed, place(name))
    place("empty.yaml").write_text("data: {}")
    torch.save({"state_dict": {"embedding_manager.x": torch.zeros(2)}}, place("state.ckpt"))
    write(LearnedEmbeddings((word("<cat>"),)), place("word.safetensors"))
    write(LearnedEmbeddings((word("<cat>", number=2.0),)), place("other.pt"), "original")
    write(LearnedEmbeddings((word("*"),)), place("star.safetensors"))
    save_file({"<cat>": torch.full((1, 128), float("nan"))}, place("nan.safetensors"))
    torch.save(torch.full((768,), 5.0), place("aesthetic.pt"))
    write(LearnedEmbeddings((word("<a>"), word("<b>"))), place("both.pt"), "original")
    write(LearnedEmbeddings((word("<cat>", width=768),)), place("wide.pt"), "a1111")
    save_file({"emb_params": torch.ones(1, 1280)}, place("bert.safetensors"))
    for name, method in (("neti.safetensors", "neti"), ("strange.safetensors", "strange")):
        dials = {"truncation": 32, "bypass": 0.2}
        held = MethodFile(method, {"*": 1}, {"x": torch.ones(2)}, {"hidden": 32}, dials, "clip", 128)
        write_method_file(held, place(name))
    Image.new("RGB", (64, 64), "red").save(place("photo.png"))
    Image.new("L", (8, 8), "white").save(place("small.png"))
    Image.new("L", (64, 64), "black").save(place("black.png"))
    return found


def test_mistakes_are_answered_without_torch(places) -> None:
    lines = [line.format(**places) for line in MISTAKES]
    answers = answers_of(RUN, lines)
    wrong = {}
    for line, answer, message in zip(MISTAKES, answers, MISTAKES.values(), strict=True):
        if not answer.startswith(("1 [] error: ", "2 [] error: ")) or message not in answer:
            wrong[line] = answer
    assert wrong == {}
