"""What all methods have in common: contexts, gradients, files, guidance, and several words in one prompt."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.embeddings import Concept, LearnedEmbeddings, Metadata, read, write
from ldm.embeddings.method_files import MethodFile, read_method_file, triggers_of, write_method_file
from ldm.generate import load_embeddings
from ldm.generate.embeddings import conditions
from ldm.generate.images import generate
from ldm.models.diffusion.conditioning import TimedCondition, at_timesteps, concat_conditions
from ldm.modules import methods
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.methods import METHODS
from ldm.modules.methods.words import Together
from ldm.modules.personalization import DenoiserShape
from ldm.training.fitting import check_state
from ldm.util import ConfigError, UserError, accepts, skip_pretrained
from tests.modules.methods.conftest import SMALL, words

ALL = sorted(METHODS)


def context(model, prompts, time=500.0):
    """The context of prompts at a timestep."""
    cond = model.get_learned_conditioning(prompts)
    return cond.at(torch.full((len(prompts),), time)) if isinstance(cond, TimedCondition) else cond


@pytest.mark.parametrize("method", ALL)
def test_every_parameter_has_a_gradient_from_a_training_step(model, method):
    made = words(model, method, num_vectors_per_token=2)
    model.train()
    made.nested_dropout = 0.0
    loss, _ = model.p_losses(
        torch.randn(6, 4, 8, 8),
        model.training_condition(["a photo of *", "a * in the grass"] * 3),
        torch.tensor([10, 400, 900, 300, 600, 990]),
    )
    loss.backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in model.model.parameters())


@pytest.mark.parametrize("method", ALL)
def test_a_file_gives_the_same_images_in_any_model(model, method, tmp_path):
    made = words(model, method, num_vectors_per_token=2)
    options = {"steps": 2, "scale": 3.0, "negative_prompt": "dog", "sampler": "dpm_solver"}
    first = generate(model, ["a photo of *"], **options)
    made.save(tmp_path / "a.safetensors")
    words(model, "output" if method != "output" else "xti")  # what the model holds does not matter
    assert load_embeddings(model, tmp_path / "a.safetensors") == ["*"]
    assert type(model.embedding_manager) is type(made) and model.embedding_manager.loaded
    again = generate(model, ["a photo of *"], **options)
    assert first[0].tobytes() == again[0].tobytes()
    other = generate(model, ["a photo of *"], **{**options, "negative_prompt": "cat"})
    assert other[0].tobytes() != first[0].tobytes(), "guidance does nothing"


@pytest.mark.parametrize("method", ALL)
def test_the_state_continues_bit_for_bit(model, method):
    made = words(model, method)
    other = words(model, method, seed=9)
    other.load_state_dict(made.state_dict())
    assert other.loaded
    ids = model.cond_stage_model.token_ids(["a *"], made)
    times = torch.tensor([70.5])
    encoder = model.cond_stage_model
    assert torch.equal(made.encode(encoder, ids, times), other.encode(encoder, ids, times))


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("syntax", ["a1111", "comfyui"])
def test_weights_of_a_prompt_scale_what_the_word_adds(model, method, syntax):
    words(model, method)
    options = {"steps": 1, "scale": 2.0, "prompt_syntax": syntax}
    plain, same, strong = (
        generate(model, [prompt], **options)[0].tobytes()
        for prompt in ("a photo of *", "a photo of (*:1.0)", "a photo of (*:1.5)")
    )
    assert plain == same != strong


@pytest.mark.parametrize("method", ALL)
def test_prompts_without_the_word_are_encoded_plainly(model, method):
    words(model, method)
    with torch.no_grad():
        encoded = model.get_learned_conditioning(["a photo"])
    assert torch.equal(encoded, model.cond_stage_model.encode(["a photo"]))


@pytest.mark.parametrize("method", ALL)
def test_weighted_prompts_without_the_word_are_encoded_plainly(model, method):
    made = words(model, method)
    prompts = ["a (photo:1.2) of *", "a (dog:1.3) BREAK a cat", "a photo of (*:0.8)"]
    with torch.no_grad():
        both, negative = conditions(model, prompts, "a (bear:1.1)", "a1111")
        apart = [conditions(model, [prompt], None, "a1111", 2)[0] for prompt in prompts]
        model.embedding_manager = None
        plain, plain_negative = conditions(model, prompts[1:2], "a (bear:1.1)", "a1111")
        model.embedding_manager = made
        assert torch.equal(apart[1], plain) and torch.equal(negative[:1], plain_negative)
        times = torch.tensor([900.0, 500.0, 100.0])
        alone = [at_timesteps(part, time[None]) for part, time in zip(apart, times, strict=True)]
        expected = functools.reduce(concat_conditions, alone)
        torch.testing.assert_close(at_timesteps(both, times), expected)


@pytest.mark.parametrize("method", ALL)
def test_a_training_step_whose_captions_lack_the_word_has_a_backward_pass(model, method):
    made = words(model, method)
    condition = model.training_condition(["a photo"])
    loss, _ = model.p_losses(torch.randn(1, 4, 8, 8), condition, torch.tensor([500]))
    loss.backward()
    assert not any(p.grad.any() for p in made.embedding_parameters())


def test_words_of_several_methods_and_plain_vectors_in_one_prompt(model, tmp_path):
    files = []
    for name, method in zip(("<a>", "<b>", "<c>"), ("prospect", "prospect", "neti"), strict=True):
        words(model, method, name).save(tmp_path / f"{len(files)}.safetensors")
        files.append(tmp_path / f"{len(files)}.safetensors")
    plain = Concept("<d>", torch.full((2, 32), 0.2))
    write(LearnedEmbeddings((plain,)), tmp_path / "d.pt", "original")
    alone = {}
    for file, name in ((files[0], "<a>"), (files[1], "<b>"), (files[2], "<c>"), (tmp_path / "d.pt", "<d>")):
        load_embeddings(model, file)
        alone[name] = context(model, [f"a photo of {name}"])
    names = load_embeddings(model, [*files, tmp_path / "d.pt"])
    assert names == ["<a>", "<b>", "<c>", "<d>"] and isinstance(model.embedding_manager, Together)
    for name, expected in alone.items():
        found = context(model, [f"a photo of {name}"])
        if expected.ndim == 3:
            expected = expected[:, None, None]
        torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-4, atol=1e-5)
    together = context(model, ["<a> and <b> and <c> and <d>"])
    assert together.shape == (1, len(model.denoiser_shape.layers), 2, 77, 32)
    images = generate(model, ["<a> with <d>", "<b> with <c>"], steps=2, scale=3.0, batch_size=2)
    assert len(images) == 2
    prompts = ["<a> and <b>", "<b> and <c>"]
    with torch.no_grad():
        kept = model.get_learned_conditioning(prompts)
        for time in (900.0, 500.0, 20.0):
            found = kept.at(torch.full((2,), time))
            torch.testing.assert_close(found, context(model, prompts, time), rtol=0, atol=1e-6)


def test_a_learned_negative_joins_beside_words_of_a_method(model, tmp_path):
    words(model, "prospect", "<a>").save(tmp_path / "a.safetensors")
    vectors = (Concept("<d>", torch.ones(1, 32)), Concept("<d>-neg", torch.ones(1, 32)))
    write(LearnedEmbeddings(vectors), tmp_path / "d.pt", "original")
    load_embeddings(model, [tmp_path / "a.safetensors", tmp_path / "d.pt"])
    prompts = ["<a> with <d>", "<a>", "<d>-neg"]
    assert model.negative_prompts(prompts, "a dog") == ["a dog <d>-neg", "a dog", "a dog"]
    assert model.negative_prompts(["<d>"], "<d>-neg, dark") == ["<d>-neg, dark"]


def test_the_same_word_twice_is_one_line(model, tmp_path):
    for name in ("a", "b"):
        words(model, "prospect").save(tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="two of the files hold '\\*'"):
        load_embeddings(model, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_words_that_are_one_for_the_tokenizer_are_one_line(model, tmp_path):
    for name in ("<a>", "<A>"):
        words(model, "prospect", name).save(tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="two of the files hold '<a>'"):
        load_embeddings(model, [tmp_path / "<a>.safetensors", tmp_path / "<A>.safetensors"])
    plain = LearnedEmbeddings((Concept("<d>", torch.ones(1, 32)), Concept("<D>", torch.ones(1, 32))))
    write(plain, tmp_path / "d.pt", "original")
    with pytest.raises(UserError, match="'<D>' is there twice, first as '<d>'"):
        load_embeddings(model, [tmp_path / "<a>.safetensors", tmp_path / "d.pt"])


@pytest.mark.parametrize(
    ("vectors", "message"), [(1024, "1024 vectors, a prompt has room for 75"), (1, "would be")]
)
def test_a_small_file_does_not_ask_for_large_words(model, vectors, message, monkeypatch):
    made, built = METHODS["neti"], []

    def counted(self, count, new_word=made.new_word):
        word = new_word(self, count)
        built.append(sum(value.nbytes for value in word.state_dict().values() if value.device.type != "meta"))
        return word

    monkeypatch.setattr(made, "new_word", counted)
    large = {"features": 4096, "hidden": 4096}
    content = MethodFile("neti", {"<a>": vectors}, {"one": torch.zeros(1)}, large, width=32)
    with pytest.raises(UserError, match=message):
        made.from_file(content, model.cond_stage_model, model.denoiser_shape)
    assert sum(built) == 0


def test_plain_vectors_after_a_method(model, tmp_path):
    words(model, "xti")
    write(LearnedEmbeddings((Concept("<d>", torch.ones(1, 32)),)), tmp_path / "d.pt", "original")
    assert load_embeddings(model, tmp_path / "d.pt") == ["<d>"]
    assert context(model, ["a <d>"]).shape == (1, 77, 32)


@pytest.mark.parametrize("method", [name for name in ALL if name != "xti"])
def test_what_reads_vectors_refuses_a_method_in_one_line(model, method, tmp_path):
    words(model, method).save(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"words of the method '{method}'") as caught:
        read(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(tmp_path))
    assert triggers_of(tmp_path / "a.safetensors") == ["*"]


def changed(path, **values):
    """A file with other values in its record."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])["__metadata__"]
    record = json.loads(header["textual_inversion"]) | values
    save_file(load_file(path), path, header | {"textual_inversion": json.dumps(record)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 2}, "has version 2 of the files of methods"),
        ({"method": "dream"}, "is of the method 'dream'; known are prospect"),
        ({"method": 3}, "names no method or no words"),
        ({"words": {"*": 0}}, "a word has 0 vectors"),
        ({"words": {"*": 10**6}}, "a word has 1000000 vectors"),
        ({"width": 768}, "has width 768; this model's text encoder is clip of width 32"),
        ({"options": {"stages": 4}}, "its 'vectors' is 3x1x32 and would be 4x1x32"),
        ({"options": {"stages": 10**9}}, "stages is 1000000000"),
        ({"options": {"stages": 2.5}}, "stages is 2.5"),
        ({"words": {"*": 2}}, "its 'vectors' is 3x1x32 and would be 3x2x32"),
        ({"dials": {"strength": math.nan}}, "its 'strength' is nan, no finite number; it is damaged"),
        ({"dials": {"strength": -math.inf}}, "its 'strength' is -inf, no finite number"),
        ({"options": {"stages": 10**400}}, "its 'stages' is 1000"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(model, values, message, tmp_path):
    words(model, "prospect").save(tmp_path / "a.safetensors")
    changed(tmp_path / "a.safetensors", **values)
    with pytest.raises(UserError, match=message) as caught:
        load_embeddings(model, tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stated", [None, 3, ["cat"], {"*": 3}, {"<other>": "cat"}])
def test_a_file_without_the_initializer_is_readable(model, stated, tmp_path):
    """Such as one of an earlier version."""
    words(model, "prospect").save(tmp_path / "a.safetensors")
    assert read_method_file(tmp_path / "a.safetensors").initializers == {"*": "cat"}
    changed(tmp_path / "a.safetensors", initializers=stated)
    assert read_method_file(tmp_path / "a.safetensors").initializers == {}
    assert load_embeddings(model, tmp_path / "a.safetensors") == ["*"]


@pytest.mark.parametrize("stated", [None, 3, {"steps": "many", "learning_rate": float("inf")}])
def test_how_words_were_trained(model, stated, tmp_path):
    words(model, "prospect").save(tmp_path / "a.safetensors")
    content = read_method_file(tmp_path / "a.safetensors")
    assert content.metadata == Metadata()
    known = Metadata(steps=400, base_model_hash="ab12", images=5)
    write_method_file(dataclasses.replace(content, metadata=known), tmp_path / "a.safetensors")
    again = read_method_file(tmp_path / "a.safetensors")
    assert again.metadata == known and again.renamed({"*": "<cat>"}).metadata == known
    changed(tmp_path / "a.safetensors", metadata=stated)
    assert read_method_file(tmp_path / "a.safetensors").metadata == Metadata()


def test_a_distance_that_is_not_measured_is_refused(model, monkeypatch):
    monkeypatch.setattr(model, "embedding_reg_weight", 0.1)
    node = {"params": {"placeholder_strings": ["*"]}}
    with pytest.raises(ConfigError, match="embedding_reg_weight is 0.1, and .*ProSpect has no distance"):
        model.make_personalization({"target": "ldm.modules.methods.ProSpect", **node})
    assert model.make_personalization({"target": "ldm.modules.methods.DreamArtist", **node})


def test_tensors_that_are_missing_or_not_finite_are_one_line(model, tmp_path):
    words(model, "output").save(tmp_path / "a.safetensors")
    content = read_method_file(tmp_path / "a.safetensors")
    for tensors, message in (
        ({"vectors": content.tensors["vectors"]}, "its 'residual' is absent and would be 1x32"),
        ({**content.tensors, "residual": torch.full((1, 32), float("nan"))}, "holds NaN"),
        ({**content.tensors, "more": torch.zeros(2)}, "its 'more' is 2 and would be absent"),
    ):
        write_method_file(MethodFile(**{**vars(content), "tensors": tensors}), tmp_path / "b.safetensors")
        with pytest.raises(UserError, match=message):
            load_embeddings(model, tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("method", "begun", "yaml"),
    [
        ("prospect", {"stages": 5, "num_vectors_per_token": 2}, {"stages": 3}),
        ("neti", {"hidden": 4, "bypass": 0.1}, {}),
        ("grid", {"residual": True, "layers": True, "strength": 0.8}, {"residual_layers": False}),
        ("output", {"residual_keys": False}, {}),
    ],
)
def test_a_run_that_began_from_a_file_goes_on_by_its_state(model, method, begun, yaml, tmp_path, caplog):
    words(model, method, **begun).save(tmp_path / "a.safetensors")
    given = {"initializer_words": ["cat"], "denoiser": model.denoiser_shape} | SMALL.get(method, {}) | yaml
    kind, encoder = METHODS[method], model.cond_stage_model
    given["placeholder_strings"] = ["*"]
    run = kind(encoder, embedding_manager_ckpt=str(tmp_path / "a.safetensors"), **given)
    assert "is not used" in caplog.text
    model.embedding_manager = kind(encoder, **given)  # as a resumed run builds it
    state = {f"embedding_manager.{name}": value for name, value in run.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    check_state(tmp_path / "last.ckpt", model)
    model.load_state_dict(state, strict=False)
    resumed = model.embedding_manager
    assert (resumed.placeholders, resumed.options(), resumed.dials()) == (
        run.placeholders,
        run.options(),
        run.dials(),
    )
    loaded = kind(encoder, **given)  # and as anything else does that has a state dict
    loaded.load_state_dict(run.state_dict())
    ids, times = encoder.token_ids(["a *"], run), torch.tensor([700.0])
    expected = run.eval().encode(encoder, ids, times)
    for words_ in (resumed, loaded):
        assert torch.equal(words_.eval().encode(encoder, ids, times), expected)


def test_the_state_of_other_words_does_not_fit(model, tmp_path):
    state = {f"embedding_manager.{name}": v for name, v in words(model, "neti").state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    words(model, "prospect")
    with pytest.raises(UserError, match="does not fit the configuration"):
        check_state(tmp_path / "last.ckpt", model)


def test_beginning_from_a_file(model, tmp_path):
    made = words(model, "prospect", "<cat>")
    made.save(tmp_path / "a.safetensors")
    encoder, path = model.cond_stage_model, str(tmp_path / "a.safetensors")
    kind = type(made)
    again = kind(encoder, placeholder_strings=["*"], embedding_manager_ckpt=path)
    assert again.placeholders == {"*": 1} and again.loaded and again.stages == 3
    again.reset(encoder)
    assert torch.equal(again.word("*").vectors, made.word("<cat>").vectors)
    kind.check_file(path, ["*"])
    with pytest.raises(UserError, match="holds '<cat>', and placeholder_strings are 'a, b'"):
        kind.check_file(path, ["a", "b"])
    with pytest.raises(UserError, match="is of the method 'prospect', and XTI needs a file of 'xti'"):
        METHODS["xti"].check_file(path, ["*"])
    write(LearnedEmbeddings((Concept("*", torch.ones(1, 32)),)), tmp_path / "p.pt", "original")
    with pytest.raises(UserError, match="holds plain vectors, and ProSpect needs"):
        kind.check_file(tmp_path / "p.pt", ["*"])


def test_absent_words_and_groups(model):
    made = words(model, "prospect", "<a>", "<b>")
    assert made.absent_parameters(["a <a>"]) == [made.word("<b>").vectors]
    assert [len(group["params"]) for group in made.parameter_groups()] == [2]


def test_copies_are_independent(model):
    made = words(model, "neti")
    twin = copy.deepcopy(made)
    with torch.no_grad():
        next(twin.embedding_parameters()).add_(1)
    assert not torch.equal(next(twin.embedding_parameters()), next(made.embedding_parameters()))


SD1_LAYERS = "IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"


@pytest.fixture(scope="module")
def sd1(clip_vit_l):
    """The text encoder and the denoiser of Stable Diffusion 1, on the meta device."""
    with skip_pretrained(), torch.device("meta"):
        encoder = FrozenCLIPEmbedder(str(clip_vit_l))
        unet = UNetModel(
            image_size=32,
            in_channels=4,
            model_channels=320,
            out_channels=4,
            num_res_blocks=2,
            attention_resolutions=[4, 2, 1],
            num_heads=8,
            use_spatial_transformer=True,
            context_dim=768,
            channel_mult=(1, 2, 4, 4),
        )
    return encoder.to("meta"), unet


# What is made of each target of the YAMLs: options, the shape of two encoded prompts, and of every parameter.
NETI_SD1 = (
    (2, 16, 2, 77, 768),
    [(160, 2048), (160,), (128, 160), *[(128,)] * 3, (128, 128), *[(128,)] * 3, (3072, 128), (3072,)],
)
SHAPES = {
    "ProSpect": ({}, (2, 77, 768), [(4, 2, 768)]),
    "XTI": ({}, (2, 16, 1, 77, 768), [(2, 768)] * 16),
    "NeTI": ({}, *NETI_SD1),
    "CoReNeTI": ({}, *NETI_SD1),
    "OutputResidual": ({}, (2, 77, 768), [(2, 768)]),
    "Grid": (
        {"stages": 4, "layers": True, "residual": True},
        (2, 16, 1, 77, 768),
        [(4, 16, 2, 768), (4, 2, 768)],
    ),
    "CoReGrid": (
        {"stages": 4, "residual_layers": True},
        (2, 16, 1, 77, 768),
        [(4, 2, 768), (4, 16, 2, 768)],
    ),
    # As prospect_residual.yaml has it: values alone.
    "Grid of values": (
        {"stages": 4, "residual_layers": True, "residual_keys": False},
        (2, 16, 2, 77, 768),
        [(4, 2, 768), (4, 16, 2, 768)],
    ),
    "CoRe": ({}, (2, 77, 768), [(2, 768)]),
    "EmbeddingManager": ({"cross_init": True}, (2, 77, 768), [(2, 768)]),
    "DreamArtist": ({"negative_vectors": 3}, (2, 77, 768), [(2, 768), (3, 768)]),
}


@pytest.mark.parametrize("target", SHAPES)
def test_shapes_and_gradients_of_stable_diffusion_1(sd1, target):
    encoder, unet = sd1
    assert " ".join(unet.layer_names) == SD1_LAYERS
    options, shape, parameters = SHAPES[target]
    kind = getattr(methods, target.split()[0], EmbeddingManager)
    denoiser = {"denoiser": DenoiserShape(unet.layer_names, 1000)} if accepts(kind, "denoiser") else {}
    with torch.device("meta"):
        made = kind(
            encoder,
            placeholder_strings=["*"],
            initializer_words=["cat"],
            num_vectors_per_token=2,
            **denoiser,
            **options,
        ).to("meta")
        assert [tuple(p.shape) for p in made.embedding_parameters()] == parameters
        encoded = made.encode(encoder, torch.zeros(2, 77, dtype=torch.long), torch.zeros(2))
        assert tuple(encoded.shape) == shape
        loss = unet(torch.zeros(2, 4, 64, 64), torch.zeros(2), context=encoded).sum()
        gradients = torch.autograd.grad(loss, list(made.embedding_parameters()), allow_unused=True)
        if made.adds_loss:
            distance = made.context_loss(encoder)
            assert distance.shape == ()
            assert torch.autograd.grad(distance, list(made.embedding_parameters())[:1])[0] is not None
    assert [gradient.shape for gradient in gradients] == [p.shape for p in made.embedding_parameters()]


@pytest.mark.parametrize("method", ALL)
def test_gradients_are_those_of_finite_differences(model, method):
    """Of the context, through encoder and insertion, in float32; the denoiser's part is the same for all methods."""
    made = words(model, method, num_vectors_per_token=2)
    encoder = model.cond_stage_model
    ids, times = encoder.token_ids(["a photo of * in the grass"], made), torch.tensor([640.0])
    mix = torch.randn(made.encode(encoder, ids, times).shape, generator=torch.Generator().manual_seed(0))
    parameters = list(made.embedding_parameters())

    def value():
        return (made.encode(encoder, ids, times) * mix).sum()

    gradients = torch.autograd.grad(value(), parameters)
    directions = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in parameters]
    expected = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(sign * 3e-4 * direction)
            found.append(float(value()))
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(sign * 3e-4 * direction)
    assert (found[0] - found[1]) / 6e-4 == pytest.approx(expected, rel=2e-2)
