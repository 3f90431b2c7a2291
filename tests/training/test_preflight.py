"""Checks before the first step."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm import embeddings
from ldm.training import preflight
from ldm.util import UserError
from tests.golden_record import Golden
from tests.training.runs import start


@pytest.mark.done_or_said
@pytest.mark.parametrize(
    ("steps", "warns"), [(400, True), (2000, True), (6100, False), (None, False), (-1, False)]
)
def test_progressive_run_that_ends_before_its_second_vector(steps, warns: bool, caplog) -> None:
    model = Golden("clip_one_vector").model()
    model.embedding_manager.progressive_step, model.embedding_manager.progressive_scale = 0, 2000
    with caplog.at_level(logging.WARNING):
        preflight.check_progress(model, steps)
        preflight.check_progress(Golden("clip_one_vector").model(), steps)
        preflight.check_progress(nn.Identity(), steps)
    assert bool(caplog.records) is warns


@pytest.mark.done_or_said
def test_vectors_for_another_text_encoder_are_refused_before_the_model_is_read(
    tiny_yaml, capsys, monkeypatch
):
    concept = embeddings.Concept("*", torch.zeros(1, 768))
    embeddings.write(embeddings.LearnedEmbeddings((concept,)), Path("wide.pt"), "original")
    monkeypatch.setattr("ldm.training.run.make_model", lambda *a, **k: pytest.fail("the model is read"))
    assert start("--base", tiny_yaml, "-t", "--embedding_manager_ckpt", "wide.pt") == 1
    assert "(width 768) is for Stable Diffusion 1.x" in capsys.readouterr().err


@pytest.mark.done_or_said
def test_identical_captions(tiny_yaml, capsys):
    Path("one.txt").write_text("a photo of {}\n")
    assert start("--base", tiny_yaml, "data.params.train.params.template_file=one.txt") == 0
    assert "all captions are 'a photo of *'" in capsys.readouterr().err


@pytest.mark.done_or_said
def test_truncated_placeholder(tiny_yaml, capsys):
    Path("lines.txt").write_text("one " * 100 + "{}\n")
    assert start("--base", tiny_yaml, "-t", "data.params.train.params.template_file=lines.txt") == 1
    assert "cuts off the placeholder '*'" in capsys.readouterr().err


@pytest.mark.done_or_said
def test_run_warns_once_of_captions_without_placeholder(tiny_yaml, capsys):
    Path("some.txt").write_text("a photo of {}\na photo\n")
    assert start("--base", tiny_yaml, "data.params.train.params.template_file=some.txt") == 0
    assert capsys.readouterr().err.count("placeholder") == 1


class Captions:
    """A dataset of captions; `placeholders` are those that they should contain."""

    def __init__(self, *captions: str, placeholders: tuple[str, ...] = ()) -> None:
        self.lines, self.placeholders = captions, placeholders

    def captions(self) -> list[str]:
        return list(self.lines)


@pytest.fixture
def model():
    model = Golden("clip_one_vector").model()
    model.embedding_manager.take({"*": torch.ones(1, 32), "@": torch.ones(3, 32)}, "test")
    return model


@pytest.mark.done_or_said
def test_captions_without_placeholder_are_one_warning(model, caplog) -> None:
    preflight.check_captions(model, Captions("a *", "an @", "a cat", "a dog"))
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 captions contain no placeholder and train nothing, such as 'a cat'"
    ]
    preflight.check_captions(nn.Identity(), Captions("a cat"))
    assert len(caplog.records) == 1


@pytest.mark.done_or_said
def test_placeholder_of_the_dataset_in_no_caption(model) -> None:
    preflight.check_captions(model, Captions("a *", "the *", placeholders=("*", "another model's")))
    with pytest.raises(UserError, match="none of the captions contains the placeholder '@'"):
        preflight.check_captions(model, Captions("a *", "the *", placeholders=("*", "@")))


@pytest.mark.done_or_said
def test_token_limit_counts_the_most_positions(model, monkeypatch) -> None:
    room = model.cond_stage_model.max_length - 2
    long = " ".join(["a"] * (room - 3)) + " @"
    preflight.check_captions(model, Captions(long, "@"))
    monkeypatch.setattr(model.embedding_manager, "most_positions", lambda: {"@": 5})
    with pytest.raises(UserError, match=rf"token limit of {room + 2} cuts off the placeholder '@'"):
        preflight.check_captions(model, Captions(long, "@"))


def test_samples_of_a_dataset_that_cannot_list_its_captions(model) -> None:
    samples = [{"caption": "a *"}, {"caption": "a *"}, {"caption": "the *"}, {"image": 1}]
    assert preflight.captions_of(samples) == ["a *", "the *"]
    assert preflight.captions_of(iter(samples)) == []


@pytest.mark.done_or_said
def test_a_word_in_no_caption_is_a_warning(model, caplog):
    with caplog.at_level(logging.WARNING):
        preflight.check_captions(model, Captions("a * and @", "a *"))
        assert not caplog.records
        preflight.check_captions(model, Captions("a *", "the *"))
    (record,) = caplog.records
    assert record.getMessage().startswith("no caption contains '@': nothing is learned for it")


@pytest.mark.done_or_said
def test_text_beyond_the_token_limit_is_a_warning(model, caplog):
    room = model.cond_stage_model.prompt_tokenizer.max_length - 2
    with caplog.at_level(logging.WARNING):
        preflight.check_captions(model, Captions("* @", "* " + "the " * (room - 1)))
        assert not caplog.records
        preflight.check_captions(model, Captions("* @", "* " + "the " * room + "toy"))
    (record,) = caplog.records
    assert record.getMessage().startswith("1 of 2 captions are longer than the token limit of")
    assert "the toy" in record.getMessage()
