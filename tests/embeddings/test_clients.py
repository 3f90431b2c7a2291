"""Our files as the clients' own code reads them.

diffusers' own functions are called. The rules of the other tools are implemented here from their behaviour, each with
the version that they were taken from.
"""

from __future__ import annotations

import base64
import collections
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ldm.embeddings import FORMATS, Concept, LearnedEmbeddings, files_of, write, write_all
from ldm.embeddings.concept import ENCODER_KINDS
from tests.embeddings.samples import learned, vectors

pytestmark = pytest.mark.client_files

FAMILIES = {"SD1": ["clip_l"], "SD2": ["clip_h"], "SDXL": ["clip_l", "clip_g"]}


def word(family: str, count: int, trigger: str = "my-cat") -> LearnedEmbeddings:
    concepts = (
        Concept(trigger, vectors(count, ENCODER_KINDS[kind].width), kind) for kind in FAMILIES[family]
    )
    return LearnedEmbeddings(tuple(concepts))


def content_of(path: Path) -> Any:
    """Load a file as most tools do: safetensors by its suffix, others with torch's weights-only loader."""
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=True)


# -- AUTOMATIC1111 1.10.1 (and Forge) ------------------------------------------------------------------------

ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "FloatStorage"): torch.FloatStorage,
    ("torch", "LongStorage"): torch.LongStorage,
    ("torch.nn.modules.container", "ParameterDict"): torch.nn.ParameterDict,
    ("__builtin__", "set"): set,
}
# The names of entries before the middle of 2024; later versions allow byteorder and .data/serialization_id too.
ENTRY = re.compile(r"[^/]+/(data/\d+|version|data\.pkl)")


class StrictUnpickler(pickle.Unpickler):
    def persistent_load(self, saved_id):
        assert saved_id[0] == "storage"
        return torch.storage.TypedStorage(_internal=True)

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is forbidden")
        return ALLOWED[module, name]


def check_as_a1111(path: Path) -> None:
    """Raise an error for a `.pt` that it calls malicious."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not ENTRY.fullmatch(name):
                    raise pickle.UnpicklingError(f"bad file inside: {name}")
            [program] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            with archive.open(program) as file:
                StrictUnpickler(file).load()
    except zipfile.BadZipFile:
        with path.open("rb") as file:
            unpickler = StrictUnpickler(file)
            for _ in range(5):
                unpickler.load()


def a1111(path: Path) -> dict[str, Tensor]:
    """Return the vectors by encoder, "" where the file does not name one."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            text = json.loads(base64.b64decode(image.text["sd-ti-embedding"]), object_hook=a1111_tensor)
        content, name = text, text["name"]
    else:
        if path.suffix != ".safetensors":
            check_as_a1111(path)
            content = torch.load(path, weights_only=False)  # it was checked
        else:
            content = load_file(path)
        name = path.stem
    assert " " not in name
    if "step" in content:
        assert isinstance(content["step"], int)
    if "string_to_param" in content:
        held = content["string_to_param"]
        held = getattr(held, "_parameters", held)
        assert len(held) == 1, "embedding file has multiple terms in it"
        found = {"": next(iter(held.values()))}
    elif "clip_g" in content and "clip_l" in content:
        found = {"clip_g": content["clip_g"], "clip_l": content["clip_l"]}
    else:
        assert len(content) == 1, "embedding file has multiple terms in it"
        found = {"": next(iter(content.values()))}
    return {kind: (v.unsqueeze(0) if v.dim() == 1 else v).detach().float() for kind, v in found.items()}


def a1111_tensor(value: dict) -> Any:
    return torch.tensor(value["TORCHTENSOR"]) if "TORCHTENSOR" in value else value


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "format", ["safetensors", "a1111", "a1111-png", "diffusers", "onetrainer", "original"]
)
@pytest.mark.parametrize("count", [1, 3])
def test_automatic1111(format, family, count, tmp_path):
    start = word(family, count)
    if family == "SDXL" and format in ("original", "diffusers"):
        pytest.skip("AUTOMATIC1111 has no reader for SDXL in these formats")
    path = write(start, tmp_path / f"my-cat{FORMATS[format].suffix}", format)
    found = a1111(path)
    for concept in start.concepts:
        kind = concept.encoder if family == "SDXL" else ""
        assert torch.equal(found[kind], concept.vectors)


def test_automatic1111s_check_can_fail(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "new.pt")
    with pytest.raises(pickle.UnpicklingError, match="bad file inside"):
        check_as_a1111(tmp_path / "new.pt")
    strange = {"a": torch.zeros(2, dtype=torch.complex64)}
    torch.save(strange, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(pickle.UnpicklingError, match="forbidden"):
        check_as_a1111(tmp_path / "a.pt")


def test_the_file_of_a_run_passes_automatic1111s_check_and_loads_in_the_originals_code(tmp_path):
    """Also with several words, unused vectors and a record."""
    both = LearnedEmbeddings((*learned("*").concepts, *learned("@", seed=1).concepts))
    [path] = write_all(both, tmp_path, "original")
    check_as_a1111(path)
    # The original: torch.load, then the two dicts are used by the keys of string_to_token.
    content = torch.load(path, map_location="cpu", weights_only=False)
    for place, (trigger, token) in enumerate(content["string_to_token"].items()):
        assert isinstance(token, Tensor) and token.dtype == torch.int64 and token.shape == ()
        assert torch.equal(content["string_to_param"][trigger], both.concepts[place].vectors)


@pytest.mark.parametrize("format", ["a1111", "a1111-png"])
def test_steps_that_are_not_known_are_a_number(format, tmp_path):
    from ldm.embeddings import read

    path = write(word("SD1", 1), tmp_path / f"cat{FORMATS[format].suffix}", format)
    a1111(path)  # it checks the type
    assert read(path).metadata.steps is None
    if format == "a1111":
        assert torch.load(path, weights_only=True)["step"] == 0


# -- the other tools -----------------------------------------------------------------------------------------


def comfyui(path: Path, key: str, width: int) -> Tensor:
    """ComfyUI 0.3: the first value of string_to_param, else the encoder's key, else the first value.

    A `.pt` that the weights-only loader refuses is read by its entries: the last with at least 768 numbers.
    """
    try:
        content = content_of(path)
    except pickle.UnpicklingError:
        with zipfile.ZipFile(path) as archive:
            for name in reversed([name for name in archive.namelist() if "data/" in name]):
                numbers = torch.frombuffer(bytearray(archive.read(name)), dtype=torch.float32)
                if len(numbers) >= 768:
                    return numbers.reshape(-1, 768 if len(numbers) % 768 == 0 else 1024)
        raise
    if "string_to_param" in content:
        found = next(iter(content["string_to_param"].values()))
    else:
        found = content[key] if key in content else next(iter(content.values()))
    assert found.shape[-1] == width, "the shape mismatches, it is ignored"
    return found if found.dim() > 1 else found[None]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["safetensors", "a1111", "diffusers", "onetrainer", "original"])
@pytest.mark.parametrize("count", [1, 3])
def test_comfyui(format, family, count, tmp_path):
    if format == "original" and (family, count) not in (("SD1", 1), ("SD1", 3), ("SD2", 1)):
        pytest.skip("ComfyUI guesses the width from the count of numbers")
    if format == "diffusers" and family == "SDXL":
        pytest.skip("ComfyUI does not read diffusers' two files")
    start = word(family, count)
    path = write(start, tmp_path / f"cat{FORMATS[format].suffix}", format)
    for concept in start.concepts:
        assert torch.equal(comfyui(path, concept.encoder, concept.width), concept.vectors)


def invokeai(path: Path) -> dict[str, Tensor]:
    """InvokeAI 5: the known keys, which are asked for in this order; other files have the width as first dimension."""
    content = content_of(path)
    if "string_to_token" in content:
        return {"": next(iter(content["string_to_param"].values()))}
    if "emb_params" in content:
        return {"": content["emb_params"]}
    if "clip_g" in content:
        return {"clip_l": content["clip_l"], "clip_g": content["clip_g"]}
    value = next(iter(content.values()))
    assert value.shape[0] in (768, 1024, 1280), "InvokeAI reports it as incompatible with the model"
    return {"": value[None]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["safetensors", "a1111"])
def test_invokeai(format, family, tmp_path):
    start = word(family, 3)
    found = invokeai(write(start, tmp_path / f"cat{FORMATS[format].suffix}", format))
    for concept in start.concepts:
        assert torch.equal(found[concept.encoder if family == "SDXL" else ""], concept.vectors)


def kohya_gen_img(path: Path) -> dict[str, Tensor]:
    """gen_img.py of sd-scripts 0.9: the first dimension is the number of tokens."""
    content = content_of(path)
    if "clip_l" in content and "clip_g" in content:
        return {"clip_l": content["clip_l"], "clip_g": content["clip_g"]}
    content = content.get("string_to_param", content)
    value = next(iter(content.values()))
    return {"": torch.stack([value[token] for token in range(value.size()[0])])}


def sdnext(path: Path, widths: list[int]) -> dict[str, Tensor]:
    """SD.Next of 2024: each tensor of a safetensors file for the encoder of its width; of a .pt the vectors of `*`."""
    content = content_of(path)
    tensors = content["string_to_param"].values() if path.suffix != ".safetensors" else content.values()
    found = {}
    for tensor in tensors:
        rows = list(tensor)  # the first dimension is the number of tokens
        [width] = {row.shape[-1] if row.dim() else 1 for row in rows}
        assert width in widths
        found[{1280: "clip_g"}.get(width, "clip_l") if len(widths) > 1 else ""] = torch.stack(rows)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["safetensors", "a1111", "diffusers", "onetrainer"])
@pytest.mark.parametrize("count", [1, 3])
def test_kohya_and_sdnext_find_as_many_tokens_as_there_are_vectors(format, family, count, tmp_path):
    if family == "SDXL" and format in ("diffusers", "a1111"):
        pytest.skip("they read SDXL from clip_l and clip_g in a safetensors file")
    start = word(family, count)
    path = write(start, tmp_path / f"cat{FORMATS[format].suffix}", format)
    for found in (kohya_gen_img(path), sdnext(path, [concept.width for concept in start.concepts])):
        for concept in start.concepts:
            assert torch.equal(found[concept.encoder if family == "SDXL" else ""], concept.vectors)


@pytest.mark.parametrize("family", FAMILIES)
def test_onetrainer(family, tmp_path):
    """OneTrainer of 2025 reads the key emp_params, or the names of SDXL's encoders."""
    start = word(family, 3)
    content = content_of(write(start, tmp_path / "cat.safetensors", "onetrainer"))
    for concept in start.concepts:
        assert torch.equal(content[concept.encoder if family == "SDXL" else "emp_params"], concept.vectors)


@pytest.mark.parametrize("count", [1, 3])
def test_invoke_training_continues_from_a_file(count, tmp_path):
    """invoke-training 0.5 wants the placeholder as the key of [N, d]."""
    content = content_of(write(word("SD1", count, "<cat>"), tmp_path / "x.safetensors", "diffusers"))
    assert list(content) == ["<cat>"] and content["<cat>"].dim() == 2


class EmptyTokenizer:
    """What diffusers asks a tokenizer before it adds words."""

    added_tokens_encoder: dict = {}

    def get_vocab(self) -> dict:
        return {}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["diffusers", "a1111", "safetensors"])
@pytest.mark.parametrize("count", [1, 3])
def test_diffusers_functions_read_our_files(format, family, count, tmp_path):
    """For SDXL it loads one file for each text encoder."""
    loading = pytest.importorskip("diffusers.loaders.textual_inversion")
    mixin = loading.TextualInversionLoaderMixin
    if family == "SDXL" and format != "diffusers":
        pytest.skip("diffusers reads a word of SDXL from two files only")
    start = word(family, count, "<cat>")
    path = write(start, tmp_path / f"learned_embeds{FORMATS[format].suffix}", format)
    files = files_of(start, path, format)
    assert [file.stem for file in files] == ["learned_embeds", "learned_embeds_2"][: len(start.concepts)]
    for concept, file in zip(start.concepts, files, strict=True):
        loaded = loading.load_textual_inversion_state_dicts([str(tmp_path)], weight_name=file.name)
        token = "<cat>" if format == "safetensors" else None
        tokens, found = mixin._retrieve_tokens_and_embeddings([token], loaded, EmptyTokenizer())
        tokens, found = mixin._extend_tokens_and_embeddings(tokens, found, EmptyTokenizer())
        assert tokens == ["<cat>", "<cat>_1", "<cat>_2"][:count]
        assert torch.equal(torch.stack(list(found)), concept.vectors)
