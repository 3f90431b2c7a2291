"""The packaging files agree with the code, with each other and with the README."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from ldm.commands import entry

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

OURS = {"ldm", "main", "scripts", "checkout", "benchmarks", "tests"}
# Packages that are imported under another name.
IMPORTED_AS = {
    "pyyaml": "yaml",
    "pytorch-lightning": "pytorch_lightning",
    "pillow": "PIL",
    "taming-transformers-rom1504": "taming",
}
# Packages that are needed though no file imports them.
NOT_IMPORTED = {
    "tensorboard": "Lightning's TensorBoardLogger, the default logger, needs it",
    "ruff": "a program, run by the Makefile",
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def setup_argument(name: str) -> Any:
    """Read one literal argument of the call of setup(), without running setup.py."""
    call = next(
        node
        for node in ast.walk(ast.parse(read("setup.py")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup"
    )
    return ast.literal_eval(next(keyword.value for keyword in call.keywords if keyword.arg == name))


def requirements(lines: Iterable[str]) -> dict[str, list[Requirement]]:
    """Parse requirement lines into {canonical name: its requirements}, comments left out."""
    found: dict[str, list[Requirement]] = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


NEEDED = requirements(setup_argument("install_requires"))
EXTRAS = {extra: requirements(lines) for extra, lines in setup_argument("extras_require").items()}
NO_DEPS = requirements(read("requirements-no-deps.txt").splitlines())
CONSTRAINTS = requirements(read("constraints.txt").splitlines())
DIRECT = NEEDED | {name: found for extra in EXTRAS.values() for name, found in extra.items()}


def third_party(paths: Iterable[Path]) -> set[str]:
    """Return the top-level names that the files import, less Python's own and this repository's."""
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - OURS


def imported_as(packages: Iterable[str]) -> set[str]:
    return {IMPORTED_AS.get(package, package.replace("-", "_")) for package in packages}


def pins_on(package: str, python: str) -> list[str]:
    """Return the versions that constraints.txt pins `package` to on one Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    return [
        str(requirement.specifier)
        for requirement in CONSTRAINTS.get(package, [])
        if requirement.marker is None or requirement.marker.evaluate(environment)
    ]


def test_the_library_imports_only_what_setup_installs():
    interop, studio = (set((ROOT / "ldm" / room).rglob("*.py")) for room in ("interop", "studio"))
    # The package pytorch-lightning installs both modules.
    installed = imported_as([*NEEDED, *NO_DEPS]) | {"lightning_fabric"}
    assert third_party(set((ROOT / "ldm").rglob("*.py")) - interop - studio) <= installed
    assert third_party(studio) - installed <= imported_as(EXTRAS["ui"])
    # diffusers is optional; the error without it is one line
    assert third_party(interop) - installed == {"diffusers"}


def test_what_setup_installs_is_needed():
    used = third_party(
        [*(ROOT / "ldm").rglob("*.py"), *ROOT.glob("main.py"), *(ROOT / "scripts").rglob("*.py")]
    )
    unused = {package for package in [*NEEDED, *NO_DEPS] if not imported_as([package]) & used}
    assert unused - set(NOT_IMPORTED) == set()


def test_the_tests_import_only_what_dev_installs():
    allowed = imported_as([*NEEDED, *NO_DEPS, *EXTRAS["dev"]]) | {"packaging"}
    assert third_party((ROOT / "tests").rglob("*.py")) <= allowed
    assert set(EXTRAS) == {"dev", "ui", "notebooks", "browser"}


def test_nothing_requires_torchvision():
    assert "torchvision" not in {*DIRECT, *NO_DEPS, *CONSTRAINTS}


def test_torch_is_the_first_pin_and_no_pin_names_a_build():
    lines = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    assert re.fullmatch(r"torch==[\d.]+", lines[0])
    for line in lines:
        assert re.match(r"[a-z0-9-]+==[0-9][0-9.a-z]*(; python_version (<|>=) \"3\.\d+\")?$", line), line


@pytest.mark.parametrize("python", PYTHONS)
def test_every_direct_dependency_has_one_fitting_pin_on_every_python(python):
    assert python in SpecifierSet(setup_argument("python_requires"))
    for package, wanted in DIRECT.items():
        pins = pins_on(package, python)
        assert len(pins) == 1, f"{package} on Python {python}: {pins}"
        assert pins[0].removeprefix("==") in wanted[0].specifier
    for package in CONSTRAINTS:
        assert len(pins_on(package, python)) <= 1


def test_what_the_dependencies_need_is_pinned_too():
    """Follow requirements from package to package, except from packages installed in another version than pinned."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    # torch itself pins the CUDA packages, and which ones it needs depends on its build.
    own = re.compile(r"nvidia-|cuda-|triton$")
    to_see, seen = list(DIRECT), set()
    while to_see:
        package = to_see.pop()
        seen.add(package)
        try:
            distribution = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if pins_on(package, here) != [f"=={distribution.version.partition('+')[0]}"]:
            continue
        for line in distribution.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                name = canonicalize_name(requirement.name)
                if name not in seen and not own.match(name):
                    to_see.append(name)
    assert {package for package in seen if package not in CONSTRAINTS} == set()


def test_conda_installs_the_same():
    environment = yaml.safe_load(read("environment.yaml"))
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["-c constraints.txt", "torch", "-e .[dev]"]
    python = next(entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    assert python.removeprefix("python=") in PYTHONS
    assert "--no-deps -r requirements-no-deps.txt" in read("environment.yaml")


def test_the_makefile_installs_torch_by_its_pin_before_the_rest():
    steps = [line for line in read("Makefile").splitlines() if line.startswith("\t$(PIP_INSTALL)")]
    assert [step.split()[-1] for step in steps] == ["torch", "'.[dev]'", "requirements-no-deps.txt"]
    assert "--no-deps" in steps[2]
    assert "-c constraints.txt" in next(
        line for line in read("Makefile").splitlines() if "PIP_INSTALL =" in line
    )


def test_the_console_command_is_the_entry_of_the_library():
    (script,) = setup_argument("entry_points")["console_scripts"]
    name, _, target = script.partition(" = ")
    module, _, function = target.partition(":")
    assert name == "textual-inversion"
    assert getattr(importlib.import_module(module), function) is entry.main


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE))


def test_every_make_command_that_is_documented_exists():
    documented = {
        target for name in ["README.md", ".ci/run"] for target in re.findall(r"\bmake ([a-z-]+)", read(name))
    }
    assert {"demo", "test"} <= documented <= makefile_targets()
    assert {"demo", "test", "test-slow", "test-gpu", "lint", "format", "clean"} <= makefile_targets()


def test_every_script_that_the_readme_or_the_makefile_runs_exists():
    commands = read("README.md") + read("Makefile")
    named = set(re.findall(r"(?:python|\$\(PY\)) ((?:\w+/)?\w+\.py)", commands))
    modules = re.findall(r"(?:python|\$\(PY\)) -m (benchmarks[.\w]+\w)", commands)
    named |= {f"{module.replace('.', '/')}.py" for module in modules}
    assert named and modules
    assert {script for script in named if not (ROOT / script).is_file()} == set()


def test_ci_runs_the_test_command_of_the_readme():
    lines = read(".ci/run").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert any(line.startswith("make test ") for line in lines)
    assert re.search(r"^make test$", read("README.md"), flags=re.MULTILINE)
