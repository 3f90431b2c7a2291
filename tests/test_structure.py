"""The structure of the code: which room may import which, how large files are, and what no file may do."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each room with the rooms that it may import besides itself; `base` is the modules directly in ldm/. Imports point
# from later rooms to earlier ones.
LIBRARY = {
    "base": set(),
    "embeddings": {"base"},
    "data": {"base"},
    "modules": {"base", "embeddings"},
    "models": {"base", "embeddings", "modules"},
    "interop": {"base", "embeddings", "modules", "models"},
}
EVERYTHING = {*LIBRARY, "generate", "evaluation", "training", "studio", "commands"}
ROOMS = {
    **LIBRARY,
    "generate": {*LIBRARY},
    "evaluation": {*LIBRARY, "generate"},
    "training": {*LIBRARY, "generate"},
    "studio": {*LIBRARY, "generate", "training"},
    "commands": EVERYTHING,
    "main": EVERYTHING,
    "benchmarks": EVERYTHING | {"main", "scripts"},
    "scripts": EVERYTHING | {"main", "benchmarks"},
}

MOST_FILES, MOST_LINES = 140, 600
SMALL = 5  # lines; files of at most so many are not counted


def sources(root: Path) -> list[Path]:
    """Return every Python file of the library, `main.py`, `scripts/` and `benchmarks/` under `root`, sorted."""
    folders = ("ldm", "scripts", "benchmarks")
    return sorted(
        [*root.glob("main.py"), *(path for name in folders for path in root.glob(f"{name}/**/*.py"))]
    )


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str | None:
    """Return the room of a dotted module name; None for a module of another package."""
    top, *rest = module.split(".")
    if top in {"main", "scripts", "benchmarks"}:
        return top
    if top != "ldm":
        return None
    return rest[0] if rest and rest[0] in ROOMS else "base"


def imports(tree: ast.AST, path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import in `tree`, those inside functions included."""
    package = module_name(path, root).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def wrong_directions(tree: ast.AST, path: Path, root: Path) -> Iterator[tuple[int, str]]:
    here = room(module_name(path, root))
    for line, name in imports(tree, path, root):
        there = room(name)
        if there not in {None, here, *ROOMS[here]}:
            yield line, f"{here} imports {name}, which is in {there}"


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def prints(tree: ast.AST, path: Path, root: Path) -> Iterator[tuple[int, str]]:
    if module_name(path, root).startswith("ldm"):
        for node in calls(tree):
            if isinstance(node.func, ast.Name) and node.func.id == "print":
                yield node.lineno, "print() in the library: use a logger, or ldm.console.write_line"


CHOOSER = "ldm/util.py"


def device_choices(tree: ast.AST, path: Path, root: Path) -> Iterator[tuple[int, str]]:
    for node in calls(tree):
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            yield node.lineno, ".cuda(): the caller chooses the device, with .to(device)"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for default in [*node.args.defaults, *node.args.kw_defaults]:
                if isinstance(default, ast.Constant) and str(default.value).startswith(("cuda", "cpu")):
                    yield default.lineno, f"{node.name}() has a device as a default"
        elif isinstance(node, ast.IfExp) and path.relative_to(root).as_posix() != CHOOSER:
            names = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            if "cpu" in names and names & {"cuda", "cuda:0"}:
                yield node.lineno, "a choice of a device: use ldm.util.best_device"


def doubles(tree: ast.AST, path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Find conversions to float64, which Apple GPUs lack, of tensors that may be on a device."""
    if room(module_name(path, root)) in {"models", "modules", "training", "generate"}:
        for node in calls(tree):
            call = ast.unparse(node.func)
            if call.endswith(".double") and not call.endswith(".cpu().double"):
                yield node.lineno, ".double(): an Apple GPU has no float64; write .cpu().double()"


def unwanted_packages(tree: ast.AST, path: Path, root: Path) -> Iterator[tuple[int, str]]:
    for line, name in imports(tree, path, root):
        if name.split(".")[0] == "torchvision":
            yield line, "torchvision: it has to match the build of torch, and nothing may need it"
    for node in tree.body if isinstance(tree, ast.Module) else []:
        for line, name in imports(node, path, root):
            at_import = not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if name.split(".")[0] == "taming" and at_import:
                yield line, "taming is imported where a VQ model is built, not when the module is imported"


OWN_INSERT = "scripts/checkout.py"


def path_changes(tree: ast.AST, path: Path, root: Path) -> Iterator[tuple[int, str]]:
    for node in calls(tree):
        inserts = ast.unparse(node.func) == "sys.path.insert"
        if inserts and path.relative_to(root).as_posix() != OWN_INSERT:
            yield (
                node.lineno,
                "sys.path.insert: use scripts/checkout.py as the other scripts do, or python -m",
            )


def addresses(tree: ast.AST, path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Find literals that are web addresses or absolute paths; docstrings may cite sources."""
    cited = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in cited:
            # "http://" alone begins the address of this machine that the page prints.
            if re.search(r"https?://.", node.value):
                yield node.lineno, f"a web address in code: {node.value!r}"
            # Linux describes the processor in /proc; the page serves what is under /view.
            if re.match(r"/(?!proc/|view/)\w+/\w", node.value):
                yield node.lineno, f"an absolute path in code: {node.value!r}"


RULES = [wrong_directions, prints, device_choices, doubles, unwanted_packages, path_changes, addresses]


def violations(rule: Callable[[ast.AST, Path, Path], Iterator[tuple[int, str]]], root: Path) -> list[str]:
    found = []
    for path in sources(root):
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        found += [f"{path.relative_to(root)}:{line}: {problem}" for line, problem in rule(tree, path, root)]
    return found


@pytest.mark.parametrize("rule", RULES)
def test_the_code_keeps_the_rule(rule):
    assert violations(rule, ROOT) == []


def test_every_folder_of_the_library_is_a_known_room():
    folders = {path.relative_to(ROOT / "ldm").parts[0] for path in (ROOT / "ldm").glob("*/**/*.py")}
    assert folders <= set(ROOMS), "list in ROOMS what a new folder may import"


def test_at_most_one_module_imports_taming():
    importers = [
        path
        for path in sources(ROOT)
        if any(name.split(".")[0] == "taming" for _, name in imports(ast.parse(path.read_text()), path, ROOT))
    ]
    assert len(importers) <= 1


def length(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_library_has_few_files():
    """A file is what a reader wants to have open at once: neither a single function nor a large part of a room."""
    counted = [path for path in (ROOT / "ldm").glob("**/*.py") if length(path) > SMALL]
    assert len(counted) <= MOST_FILES
    assert len([path for path in counted if path.is_relative_to(ROOT / "ldm" / "commands")]) <= 6


def test_no_file_is_long():
    checked = [*sources(ROOT), *(ROOT / "tests").glob("**/*.py")]
    assert {str(path.relative_to(ROOT)): length(path) for path in checked if length(path) > MOST_LINES} == {}


BAD = {
    "ldm/util.py": ("from ldm.modules import attention", wrong_directions),
    "ldm/modules/attention.py": (
        "def f():\n    from ..models.autoencoder import AutoencoderKL",
        wrong_directions,
    ),
    "ldm/models/ddpm.py": ("import ldm.training.config", wrong_directions),
    "ldm/data/personalized.py": ("from ldm import embeddings", wrong_directions),
    "ldm/embeddings/read.py": ("from ..modules.tokens import PromptTokenizer", wrong_directions),
    "ldm/training/run.py": ("import main", wrong_directions),
    "ldm/generate/images.py": ("from ldm.commands.base import guarded", wrong_directions),
    "ldm/commands/train.py": ("from main import main", wrong_directions),
    "ldm/interop/diffusers.py": ("from ldm.generate import generate", wrong_directions),
    "ldm/prompts.py": ("print('hello')", prints),
    "main.py": ("model.cuda()", device_choices),
    "benchmarks/pairs.py": ("model.cuda()", device_choices),
    "ldm/generate/choice.py": ("device = 'cuda' if available else 'cpu'", device_choices),
    "ldm/models/double.py": ("x.double().cpu()", doubles),
    "scripts/demo.py": ("import sys\nsys.path.insert(0, 'x')", path_changes),
    "scripts/txt2img.py": ("def run(device='cuda'):\n    pass", device_choices),
    "ldm/images.py": ("if True:\n    import torchvision.transforms", unwanted_packages),
    "ldm/models/autoencoder.py": (
        "try:\n    from taming.modules.vqvae import quantize\nexcept ImportError:\n    pass",
        unwanted_packages,
    ),
    "ldm/files.py": ("'''Cites https://example.org.'''\nURL = 'https://example.org/model.ckpt'", addresses),
    "ldm/checkpoint.py": ("CACHE = '/data/models'", addresses),
}


@pytest.mark.parametrize("file", BAD)
def test_a_bad_line_is_found(file, tmp_path):
    line, rule = BAD[file]
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    assert len(violations(rule, tmp_path)) == 1
    assert [other.__name__ for other in RULES if other is not rule and violations(other, tmp_path)] == []


def test_good_lines_pass(tmp_path):
    good = {
        "main.py": "from ldm.training.run import fit\nfrom ldm.util import UserError\nprint('done')",
        "ldm/util.py": "'''See https://example.org.'''\nimport torch\nprinted = torch.cuda.is_available()",
        "ldm/models/autoencoder.py": "def build():\n    from taming.modules import vqvae\n    return vqvae",
        "ldm/models/diffusion/ddpm.py": "from ..autoencoder import AutoencoderKL\nfrom ...modules import ema",
    }
    for file, text in good.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert [violation for rule in RULES for violation in violations(rule, tmp_path)] == []


# Runs in a process of its own. torchvision and taming cannot be imported there, and each module is imported after the
# others are removed again, so that a circular import fails from every module that belongs to it.
IMPORT_ALL = """
import importlib, json, sys, traceback
for name in ("torchvision", "taming"):
    sys.modules[name] = None
failed = {}
for module in json.loads(sys.argv[1]):
    for known in [name for name in sys.modules if name == "ldm" or name.startswith("ldm.")]:
        del sys.modules[known]
    try:
        importlib.import_module(module)
    except Exception:
        failed[module] = traceback.format_exc(limit=-2)
print(json.dumps(failed))
"""


def import_all(root: Path, modules: list[str]) -> dict[str, str]:
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps(modules)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_module_imports_by_itself_without_torchvision():
    modules = [module_name(path, ROOT) for path in sources(ROOT) if path.is_relative_to(ROOT / "ldm")]
    if importlib.util.find_spec("gradio") is None:  # an extra
        modules = [
            name for name in modules if name.removeprefix("ldm.studio.") not in ("page", "tabs", "server")
        ]
    assert import_all(ROOT, modules) == {}


def test_a_circular_import_and_a_missing_package_are_found(tmp_path):
    package = tmp_path / "ldm"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text("import ldm.b\nx = 1")
    (package / "b.py").write_text("from ldm.a import x")
    (package / "c.py").write_text("import torchvision")
    assert sorted(import_all(tmp_path, ["ldm.a", "ldm.b", "ldm.c"])) == ["ldm.a", "ldm.c"]
