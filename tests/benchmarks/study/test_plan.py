from __future__ import annotations

import pytest

from benchmarks.study.plan import Inversion, Study, plan, read_record, write_record
from ldm.util import UserError


def test_every_inversion_once_and_all_concepts_before_another_seed() -> None:
    planned = plan(["c0", "c1"], ["draft"], [1, 8], range(2))
    assert len(planned) == len({one.id for one in planned}) == 12
    assert [one.concept for one in planned[:3]] == ["c0", "c1", "draft"]
    assert {one.seed for one in planned[:6]} == {0}


def test_an_inversion_is_done_if_its_files_have_the_same_settings(tmp_path) -> None:
    study, one = Study(tmp_path), Inversion("c0", 8, 2)
    assert not study.done(one, {"steps": 20})
    write_record(study.record(one), {"settings": {"steps": 20}})
    assert not study.done(one, {"steps": 20})
    study.embedding(one).touch()
    assert study.done(one, {"steps": 20})
    with pytest.raises(UserError, match="was made with steps 20, not 400; .*another --out"):
        study.done(one, {"steps": 400})
    study.record(one).write_text("{")
    with pytest.raises(UserError, match="remove it, and it is made again"):
        read_record(study.record(one))
