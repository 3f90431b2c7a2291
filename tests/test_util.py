from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import pytest
from torch import nn
from torch._utils import ExceptionWrapper

import ldm.util
from ldm.util import (
    ConfigError,
    UsageError,
    UserError,
    accepts,
    best_device,
    check_config,
    check_integer,
    counted,
    evaluating,
    get_obj_from_str,
    instantiate_from_config,
    pretrained_wanted,
    shown,
    skip_pretrained,
    why_no_mps,
)
from tests.golden_record import Golden


class Parent:
    def __init__(self, width: int, depth: int = 1) -> None:
        self.width, self.depth = width, depth


class Child(Parent):
    def __init__(self, name: str = "x", **parent: int) -> None:
        super().__init__(**parent)
        self.name = name


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> str:
    """A dotted path under which Child can be imported, however pytest named this module."""
    monkeypatch.setattr(ldm.util, "Child", Child, raising=False)
    return "ldm.util.Child"


def test_builds_what_a_node_names(child: str) -> None:
    built = instantiate_from_config({"target": child, "params": {"width": 3}}, depth=2)
    assert (built.width, built.depth, built.name) == (3, 2, "x")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nothing", "not a dotted path"),
        ("no_such_package.a.B", "no module 'no_such_package'"),
        ("ldm.no_such.B", "no module 'ldm.no_such'"),
        ("ldm.util.Nothing", "has no 'Nothing'"),
    ],
)
def test_unknown_target(path: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        get_obj_from_str(path)


@pytest.mark.parametrize("path", ldm.util._MOVED)
def test_targets_of_earlier_layouts_are_found(path: str) -> None:
    assert get_obj_from_str(path) is get_obj_from_str(ldm.util._MOVED[path])


def test_unknown_and_missing_keys_of_a_parent_count(child: str) -> None:
    check_config({"target": child, "params": {"width": 1, "depth": 2, "name": "a"}})
    with pytest.raises(ConfigError, match="unknown key 'widht' .did you mean 'width'"):
        check_config({"target": child, "params": {"widht": 1, "width": 1}})
    with pytest.raises(ConfigError, match="missing key 'width'"):
        instantiate_from_config({"target": child})


def test_all_problems_are_listed_at_once_with_their_place(child: str) -> None:
    config = {
        "a": {"target": child, "params": {"width": 1, "x": 2}},
        "b": [{"target": "ldm.util.Nope"}],
        "c": {"target": child, "params": {"width": {"target": "nowhere.X"}}},
    }
    with pytest.raises(ConfigError) as error:
        check_config(config, "model")
    text = str(error.value)
    assert "\n" not in text
    for part in ("model.a:", "unknown key 'x'", "model.b[0]:", "Nope", "model.c.params.width:", "nowhere"):
        assert part in text


def test_keyword_that_the_owner_adds_is_not_missing() -> None:
    node = {"personalization_config": {"target": "ldm.modules.embedding_manager.EmbeddingManager"}}
    check_config(node)
    with pytest.raises(ConfigError, match="embedder"):
        check_config({"other": node["personalization_config"]})


def test_exit_codes() -> None:
    assert UserError("x").exit_code == 1 and UsageError("x").exit_code == 2
    assert issubclass(ConfigError, UserError) and issubclass(UserError, ValueError)


def test_skip_pretrained_ends_with_its_block() -> None:
    assert pretrained_wanted()
    with pytest.raises(RuntimeError), skip_pretrained():
        assert not pretrained_wanted()
        raise RuntimeError
    assert pretrained_wanted()


def test_evaluating_restores_the_mode_of_every_part() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout().eval())
    with pytest.raises(KeyError), evaluating(model):
        assert not any(part.training for part in model.modules())
        raise KeyError
    assert [part.training for part in model.modules()] == [True, True, False]


@pytest.mark.parametrize("value", [0, True, 2.0, "3", None])
def test_check_integer(value: object) -> None:
    with pytest.raises(UsageError, match=f"steps is {value!r}; it must be a whole number of at least 1"):
        check_integer(value, "steps", error=UsageError)
    check_integer(1, "steps")
    check_integer(0, "steps", minimum=0)


def test_importing_util_and_console_does_not_import_torch() -> None:
    command = "import sys, ldm.util, ldm.console; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0


@pytest.mark.parametrize(
    ("message", "start", "end"),
    [
        ("short; do this", "short; do this", "short; do this"),
        (f"'{'x y ' * 500}' is long; do this", "'x y x", "' is long; do this"),
        (f"image /a/{'b' * 400}/c.png is broken; do this", "image /a/bb", "bb/c.png is broken; do this"),
        (f"known are {', '.join(map(str, range(400)))}; do this", "known are 0, 1", "398, 399; do this"),
        (f"two: '{'a' * 150}' and '{'b' * 150}'", "two: 'aa", "bb'"),
    ],
)
def test_messages_are_shortened_and_keep_their_ends(message: str, start: str, end: str) -> None:
    for text in (str(UserError(message)), str(ConfigError(f"{message}\n"))):
        assert text.startswith(start) and text.strip().endswith(end)
        assert len(text) < 300 and "\n" not in text


def test_a_message_holds_nothing_that_a_terminal_acts_upon() -> None:
    assert str(UserError("a\x1b[31m \ud800 \u202e b\nc")) == r"a\x1b[31m \ud800 \u202e b c"
    joined = "\U0001f468\u200d\U0001f469 می\u200cخواهم"
    assert str(UserError(joined)) == joined


def test_the_error_of_a_loader_process_is_one_line() -> None:
    try:
        raise ConfigError("image not found: a.png; check the path")
    except ConfigError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(ConfigError, match=r"^image not found: a.png; check the path$"):
        wrapped.reraise()


def test_counting_tells_between_the_items() -> None:
    told: list[tuple[int, int]] = []
    assert list(counted("abc", lambda *figures: told.append(figures), seconds=0)) == list("abc")
    assert told == [(1, 3), (2, 3)]
    told.clear()
    assert list(counted("abc", lambda *figures: told.append(figures))) == list("abc") and not told


def test_values_are_shown_short() -> None:
    assert shown("cat") == "cat"
    assert shown(["cat"]) == "['cat']"
    assert shown("a" * 1000, 20) == "a" * 9 + "..." + "a" * 8
    assert len(shown("\n" * 10**6)) <= 60


@pytest.mark.done_or_said
def test_the_device_to_compute_on(apple_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert best_device() == "mps" and why_no_mps() is None
    monkeypatch.setenv("DISABLE_MPS", "1")
    assert best_device() == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert best_device() == "cuda"


class Sized:
    def __init__(self, batch_size: int, ddconfig: Mapping[str, int] | None = None) -> None: ...


def test_values_are_checked_with_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ldm.util, "Sized", Sized, raising=False)
    node = {"target": "ldm.util.Sized", "params": {"batch_size": 0}}
    with pytest.raises(ConfigError) as caught:
        check_config(node, "data", lambda key: f" <{key}>")
    assert str(caught.value).startswith(
        "data.params.batch_size is 0 <data.params.batch_size>; it must be a whole"
    )
    with pytest.raises(ConfigError, match="^ldm.util.Sized: batch_size is 'x'; it must be a whole number"):
        instantiate_from_config({**node, "params": {"batch_size": "x"}})
    instantiate_from_config(
        {"target": "ldm.util.Sized"}, batch_size=object()
    )  # what code adds is not checked
    with pytest.raises(
        ConfigError, match=r"x.params.ddconfig: unknown key 'ch_mul' \(did you mean 'ch_mult'"
    ):
        check_config(
            {"target": "ldm.util.Sized", "params": {"batch_size": 1, "ddconfig": {"ch_mul": 1}}}, "x"
        )


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"target": 5}, "x.target is 5; it must be a text"),
        ({"target": "torch.nn.Identity", "params": [1]}, r"x.params is \[1\]; it must be a mapping"),
        ({"target": "torch.nn.Identity", "parms": {}}, "unknown key 'parms' .did you mean 'params'"),
        (
            {"target": "torch.nn.Identity", "params": {"unet_config": {"traget": "a.B"}}},
            "x.params.unet_config has no target",
        ),
    ],
)
def test_nodes_that_are_none(node: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_config(node, "x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"linear_start": 0.5, "linear_end": 0.1}, "x.params.linear_start is 0.5, more than linear_end"),
        ({"channels": 3}, "x.params.unet_config.params.in_channels is 4, but channels of the model is 3"),
        (
            {"conditioning_key": "concat"},
            "x.params.conditioning_key is concat, but a learned word needs crossattn",
        ),
    ],
)
def test_parameters_that_contradict_each_other(change: dict, words: str) -> None:
    config = Golden("clip_one_vector").config()
    params = dict(config["params"])
    check_config({"target": config["target"], "params": params}, "x")
    with pytest.raises(ConfigError, match=words):
        check_config({"target": config["target"], "params": params | change}, "x")


@pytest.mark.parametrize(
    ("targets", "absent"),
    [
        ({"optimizer_config": "bytes_and_bits.AdamW"}, ["optimizer_config"]),
        ({"optimizer_config": "torch.optim.AdamW", "logger": "no_logs.Logger"}, ["logger"]),
        ({"optimizer_config": "torch.no_module.AdamW"}, []),  # for the reader of sources
        ({"optimizer_config": "bytes_and_bits.AdamW", "logger": "json.JSONEncoder"}, []),
    ],
)
def test_packages_that_are_not_installed(targets: dict, absent: list) -> None:
    """Unless a class of the user's own, here json's, may bring them within reach."""
    nodes = {name: {"target": target} for name, target in targets.items()}
    found = list(ldm.util.absent_packages({"model": {"params": nodes}}))
    assert [problem.key for problem in found] == [f"model.params.{name}.target" for name in absent]
    assert all("check its spelling, or install the package that has it" in problem.rest for problem in found)


def test_the_groups_of_a_first_stage_divide_its_channels() -> None:
    node = Golden("clip_one_vector").config()["params"]["first_stage_config"]
    check_config(node, "x")
    node["params"]["ddconfig"]["num_groups"] = 7
    with pytest.raises(
        ConfigError, match=r"x.params.ddconfig.num_groups is 7, no divisor of \d+, a level's channels"
    ):
        check_config(node, "x")


def test_keywords_pass_through_classes_that_are_mixed_in():
    class Base:
        def __init__(self, size, denoiser=None): ...

    class Mixin:
        def __init__(self, weight, **more): ...

    class Both(Mixin, Base): ...

    class Alone(Mixin): ...

    assert all(accepts(Both, name) for name in ("weight", "size", "denoiser")) and not accepts(Both, "colour")
    assert accepts(Alone, "weight") and not accepts(Alone, "size")
