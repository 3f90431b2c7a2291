"""Signatures that are read from sources agree with those of the imported classes."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ldm import signatures, util, values
from ldm.training.callbacks import KNOWN_CALLBACKS
from ldm.util import ConfigError, config_problems, get_obj_from_str, stand_in
from ldm.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parents[1]
# Classes whose sources are not enough: their modules import all of another module, or their base class has the options.
UNKNOWN = {"torch.nn.Identity", "ldm.training.callbacks.performance.ChannelsLast"}


def targets_in(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["target"]} if isinstance(node.get("target"), str) else set()
        return own.union(*map(targets_in, node.values()))
    return set().union(*map(targets_in, node)) if isinstance(node, list) else set()


def shipped_targets() -> set[str]:
    yamls = [
        OmegaConf.to_container(read_yaml(path), resolve=False) for path in ROOT.glob("configs/**/*.yaml")
    ]
    known = {node["target"] for node in KNOWN_CALLBACKS.values()} | {part for part, _ in util.PARTS.values()}
    return known.union(*map(targets_in, yamls), {"pytorch_lightning.Trainer"}) - UNKNOWN


@pytest.mark.parametrize("target", sorted(shipped_targets()))
def test_a_source_has_the_parameters_of_its_class(target: str) -> None:
    kind = stand_in(target)
    assert kind is not None
    given, real = util._accepted(kind), util._accepted(get_obj_from_str(target))
    assert given is not None and real is not None
    assert [p.name for p in given] == [p.name for p in real]
    parameters = {parameter.name: parameter for parameter in real}
    required = [[p.name for p in one if p.default is p.empty] for one in (given, real)]
    assert required[0] == required[1]
    for parameter in given:
        hint = values.hint(kind, parameter.name)
        # Names of other modules stay unknown, which allows every value.
        known = values.hint(get_obj_from_str(target), parameter.name)
        # A tensor, which no YAML holds, stands for nothing.
        written = str(hint).replace("ldm.signatures.Foreign", "torch.Tensor")
        assert hint in (Any, known) or written == str(known)
        defaults = [one.default for one in (parameter, parameters[parameter.name])]
        assert defaults[0] == defaults[1] or hint is Any


def test_most_annotations_are_known() -> None:
    kinds = [kind for target in shipped_targets() if target.startswith("ldm.") and (kind := stand_in(target))]
    hints = [values.hint(kind, p.name) for kind in kinds for p in util._accepted(kind) or ()]
    assert sum(hint is Any for hint in hints) < 0.1 * len(hints)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.params.timestep", 5),
        ("model.params.timesteps", 1),
        ("model.params.personalization_config.params.num_vectors_per_token", "two"),
        ("model.params.personalization_config.target", "ldm.modules.embeding_manager.EmbeddingManager"),
        ("model.params.personalization_config.target", "ldm.modules.embedding_manager.EmbedingManager"),
        ("model.params.first_stage_config.params.ddconfig.chanel_mult", [1]),
        ("data.params.train.params.flip_p", 2),
        ("data.params.train", {"target": "ldm.data.personalized.PersonalizedBase"}),
    ],
)
def test_a_mistake_is_the_same_from_sources_and_from_classes(key: str, value: Any) -> None:
    config = read_yaml(ROOT / "configs/latent-diffusion/txt2img-finetune.yaml")
    OmegaConf.update(config, key, value, merge=False)
    node = {"model": {k: config.model[k] for k in ("target", "params")}, "data": config.data}
    found = list(config_problems(node, "", stand_in))
    assert found == list(config_problems(node, "")) and found


def read(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let these modules of a folder be read as those of known packages are."""
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(signatures, "PACKAGES", (*signatures.PACKAGES, *names))
    signatures.declared.cache_clear()
    signatures._tree.cache_clear()
    signatures._namespace.cache_clear()


def test_a_class_of_a_user_is_left_to_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_alone.py").write_text("class Kind:\n    def __init__(self, size): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert stand_in("mine_alone.Kind") is None
    assert stand_in("not_installed.Kind") is None  # another class's module may make it importable
    with pytest.raises(ConfigError, match="no module 'not_installed'; check its spelling, or install"):
        get_obj_from_str("not_installed.Kind")
    for path in ("Kind", ".mine_alone.Kind", "mine_alone."):
        with pytest.raises(ConfigError, match=f"'{path}' is not a dotted path"):
            stand_in(path)


def test_sources_that_are_not_enough_are_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "strange.py").write_text(
        "from somewhere_else import Base\n"
        "from torch.nn import *\n"
        "def kind(): return Made\n"
        "Computed = kind()\n"
        "class Open(Base):\n    def __init__(self, **options): pass\n"
        "class Closed(Base):\n    def __init__(self, size: int = 3): pass\n"
        "class Late:\n    def __init__(self, verbose=False): pass\n"
        "class Mixed(Base, Late): pass\n"
        "class Taking(Base, Late):\n    def __init__(self, size, **more): pass\n"
        "@kind\nclass Decorated:\n    def __init__(self, size): pass\n"
        "class Made:\n    def __new__(cls, size): pass\n"
        "class Bound:\n    __init__ = kind\n"
        "class Wrapped:\n    @kind\n    def __init__(self, size): pass\n"
        "class Chosen:\n    if kind:\n        def __init__(self, size): pass\n"
        "class Meta(metaclass=kind):\n    def __init__(self, size): pass\n"
        "class Replaced:\n    def __init__(self, size): pass\n"
        "Replaced = kind(Replaced)\n"
        "if kind:\n    class Inner:\n        def __init__(self, size): pass\n"
    )
    read(tmp_path, monkeypatch, "strange")
    unclear = "Computed Open Decorated Made Linear Bound Wrapped Chosen Meta Replaced Inner Mixed Taking"
    for name in unclear.split():
        assert stand_in(f"strange.{name}") is None, name
    assert list(inspect.signature(stand_in("strange.Closed")).parameters) == ["size"]


def test_what_is_not_there_is_the_error_of_the_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "__init__.py").touch()
    (tmp_path / "house" / "room.py").write_text("import os\nclass Bed: pass\n")
    read(tmp_path, monkeypatch, "house")
    for path in ("house.rooms.Bed", "house.cellar.shelf.Wine", "house.room.Bet"):
        with pytest.raises(ConfigError) as early:
            stand_in(path)
        with pytest.raises(ConfigError) as late:
            get_obj_from_str(path)
        assert str(early.value) == str(late.value)
    assert stand_in("house.room.Bed") is not None
    assert stand_in("house.room.os") is None


def test_a_base_class_that_is_missing_is_not_taken_for_the_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heirs").mkdir()
    (tmp_path / "heirs" / "__init__.py").touch()
    (tmp_path / "heirs" / "son.py").write_text("from heirs.father import Father\nclass Son(Father): pass\n")
    read(tmp_path, monkeypatch, "heirs")
    assert stand_in("heirs.son.Son") is None


def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain.py").write_text(
        "from __future__ import annotations\n"
        "from typing import Literal\n"
        "from elsewhere import MANY\n"
        "SIZE = -7\n"
        "def open_box(how: Literal['slow', 'fast'] = 'slow', size: int = SIZE, max_images: int = MANY, "
        "*, force: float = -1.5, eta: float = float('inf')): ...\n"
    )
    read(tmp_path, monkeypatch, "plain")
    function = stand_in("plain.open_box")
    known = [inspect.signature(function).parameters[name].default for name in ("how", "size", "force")]
    assert known == ["slow", -7, -1.5]
    assert "plain" not in sys.modules
    found = list(values.problems(function, {"how": "never", "size": 0}))
    assert [name for name, _, _ in found] == ["how", "size"]
    # Of a default that only the module knows, the YAML may have the value, which nothing else allows.
    given = {"how": "slow", "size": -7, "max_images": -1, "eta": float("inf")}
    assert not list(values.problems(function, given))


def test_nothing_of_a_source_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loud.py").write_text(
        "raise SystemExit('imported')\nclass Kind:\n    def __init__(self, a=exit(1), b: exit(2) = 1): exit(3)\n"
    )
    read(tmp_path, monkeypatch, "loud")
    kind = signatures.declared("loud.Kind")
    assert list(inspect.signature(kind).parameters) == ["a", "b"]
    assert kind() is not None


def test_constants_and_methods_of_a_class_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(tmp_path, monkeypatch, "constants")
    (tmp_path / "constants.py").write_text(
        "class Base:\n    family = 'clip'\n    size: int = 3\n    named: str\n    def take(self): raise ValueError\n"
        "class Own(Base):\n    family = 'b' + 'ert'\n    @property\n    def dials(self): return {}\n"
    )
    base, own = signatures.declared("constants.Base"), signatures.declared("constants.Own")
    assert base.family == "clip" and own.size == 3 and not hasattr(own, "named")
    assert not hasattr(own, "family"), "neither that of its ancestor nor a guess"
    assert "take" in vars(base) and "take" not in vars(own) and "dials" in vars(own)
    assert base().take() is None, "nothing is run"
