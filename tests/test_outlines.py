"""What a file of `torch.save` holds, without its numbers."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from ldm.files import file_kind
from ldm.outlines import outline_of
from ldm.pickles import PickleError, shapes_of

pytestmark = pytest.mark.one_reader


@pytest.mark.parametrize("legacy", [False, True])
def test_both_layouts_give_the_content_without_numbers(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "x.pt"
    content = {"a": {"b": torch.ones(2, 3)}, "step": 7, "half": torch.ones(4, dtype=torch.float16)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    outline = outline_of(path, file_kind(path))
    assert outline.pickle.content["step"] == 7
    assert shapes_of(outline.pickle.content) == {"a.b": (2, 3), "half": (4,)}
    assert outline.places.keys() == outline.pickle.storages.keys()
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(PickleError, match="cut off"):
        outline_of(path, "pickle" if legacy else "zip")


def test_a_pickle_of_other_things_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(PickleError, match="it is a pickle, but not of torch.save"):
        outline_of(path, "pickle")
    path.write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(PickleError, match=r"asks for 'pathlib.*', which tensors never need"):
        outline_of(path, "pickle")
