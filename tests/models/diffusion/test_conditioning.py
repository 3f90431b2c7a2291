from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.conditioning import concat_conditions, condition_rows
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
