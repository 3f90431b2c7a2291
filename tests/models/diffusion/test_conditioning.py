from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.conditioning import (
    TimedCondition,
    TimedPrompts,
    at_timesteps,
    concat_conditions,
    condition_rows,
)
from ldm.util import UserError


def test_tensors_lists_and_dicts_are_concatenated() -> None:
    one, other = torch.zeros(2, 3), torch.ones(2, 3)
    both = torch.cat([one, other])
    torch.testing.assert_close(concat_conditions(one, other), both)
    torch.testing.assert_close(concat_conditions([one], [other])[0], both)
    joined = concat_conditions(
        {"c_crossattn": [one], "c_concat": [other]}, {"c_crossattn": [other], "c_concat": [one]}
    )
    torch.testing.assert_close(joined["c_crossattn"][0], both)
    torch.testing.assert_close(joined["c_concat"][0], torch.cat([other, one]))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.zeros(1, 77, 8), torch.zeros(1, 77, 16), r"\(1, 77, 8\) and \(1, 77, 16\)"),
        (torch.zeros(1, 4), [torch.zeros(1, 4)], "a tensor of shape .* but the conditioning is a list of 1"),
        (
            {"c_concat": []},
            {"c_crossattn": []},
            "a dict of c_concat but the conditioning is a dict of c_crossattn",
        ),
    ],
)
def test_conditions_of_different_forms_are_an_error(first, second, message: str) -> None:
    with pytest.raises(UserError, match=message):
        concat_conditions(first, second)


def test_condition_rows_is_the_batch_size() -> None:
    assert condition_rows({"c_concat": [], "c_crossattn": [torch.zeros(3, 2)]}) == 3
    assert condition_rows(None) is None and condition_rows([]) is None


def test_a_plain_context_is_guided_against_a_layered_one():
    plain, layered = torch.randn(2, 5, 8), torch.randn(2, 3, 2, 5, 8)
    for first, second in ((plain, layered), (layered, plain)):
        both = concat_conditions(first, second)
        assert both.shape == (4, 3, 2, 5, 8)
    assert torch.equal(both[2:], plain[:, None, None].expand(-1, 3, 2, -1, -1))
    assert concat_conditions(layered, torch.randn(1, 1, 1, 5, 8)).shape == (3, 3, 2, 5, 8)
    for other in (torch.randn(2, 4, 2, 5, 8), torch.randn(2, 3, 2, 6, 8), torch.randn(2, 6, 8)):
        with pytest.raises(UserError, match="cannot be guided against"):
            concat_conditions(layered, other)


def timed(prompts: list[str], seen: list) -> TimedCondition:
    def encode(texts, times):
        seen.append((list(texts), times.tolist()))
        return torch.stack(
            [torch.full((2, 3), len(text) + float(time)) for text, time in zip(texts, times, strict=True)]
        )

    return TimedCondition([TimedPrompts(prompts, encode, lambda times: times // 10)])


def test_a_condition_that_depends_on_the_timestep():
    seen: list = []
    cond = timed(["a", "bb", "a"], seen)
    with torch.no_grad():
        first = cond.at(torch.tensor([50.5, 50.5, 50.5]))
        assert torch.equal(cond.at(torch.tensor([51.0, 51.0, 51.0])), first), "the stage is the same"
        assert seen == [(["a", "bb"], [50.5, 50.5])]
        cond.at(torch.tensor([60, 50, 50]))
        assert seen[1] == (["a"], [60]), "another row, another stage"
    cond.at(torch.tensor([60, 50, 50]))
    assert seen[2] == (["a", "bb", "a"], [60, 50, 50]), "with gradient nothing is kept"


def test_rows_of_a_timed_condition_and_guidance():
    seen: list = []
    plain = torch.zeros(3, 2, 3)
    both = concat_conditions(plain, timed(["a", "bb", "ccc"], seen))
    assert condition_rows(both) == len(both) == 6
    times = torch.tensor([1, 1, 1, 7, 8, 9])
    whole = at_timesteps({"c_crossattn": [both], "c_adm": plain}, times)["c_crossattn"][0]
    assert whole.shape == (6, 2, 3) and not whole[:3].any()
    assert whole[3:, 0, 0].tolist() == [8, 10, 12]
    assert torch.equal(both[2:5].at(times[2:5]), whole[2:5])
    with pytest.raises(UserError, match="cannot be guided against"):
        concat_conditions([plain], both)
