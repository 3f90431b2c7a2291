"""The signatures of classes and functions from their source text, without importing their modules.

Torch and Lightning take seconds to import, and a YAML can be checked against what their classes accept without them.
Only packages whose style is known are read: a module can define a name in ways that its text does not show.
"""

from __future__ import annotations

import ast
import collections.abc
import copy
import importlib.util
import inspect
import os
import pathlib
import sys
import types
import typing
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

# The modules with whose names annotations are evaluated.
_LIGHT = {module.__name__: module for module in (typing, collections.abc, os, pathlib)}


class NotInSource(Exception):
    """The source does not say, in a form that is read here, what is at a path."""


class Absent(NotInSource):
    """There is no such module, or it has no such name; the argument is the module, and the name if that is missing."""


class Foreign:
    """A class of another package, which is not read: a base class, or that of tensors in an annotation."""


# What is read; tests compare it with the imported classes.
PACKAGES = ("ldm", "benchmarks", "pytorch_lightning", "torch")


@cache
def declared(path: str) -> Any:
    """Return a stand-in for the class or function at a dotted path; None if its source is not read or not enough.

    A stand-in has the name, the ancestors and the parameters of the original, with defaults and annotations, and does
    nothing; that of a class has its constants too, and a method for each of its own. Annotations that need other
    modules than Python's own are not evaluated.

    Raises:
        Absent: nothing is at this path.
    """
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] not in PACKAGES:
        return None
    try:
        found = _in_module(module, name, frozenset())
    except Absent as error:
        if error.args in ((module, name), (module,)) or module.startswith(f"{error.args[0]}."):
            raise
        return None  # it is what is at the path that needs something absent
    except NotInSource:
        return None
    return None if inspect.isclass(found) and _passes_on(found) else found


def _passes_on(kind: type) -> bool:
    """Whether a class of another package, which is not read, has a say in the arguments of a class."""
    if Foreign not in kind.__mro__:
        return False
    nearer = kind.__mro__[: kind.__mro__.index(Foreign)]
    constructors = [vars(one)["__init__"] for one in nearer if "__init__" in vars(one)]
    takes_all = (
        any(one.kind is one.VAR_KEYWORD for one in inspect.signature(function).parameters.values())
        for function in constructors
    )
    return all(takes_all)


def _in_module(module: str, name: str, seen: frozenset[str]) -> Any:
    if f"{module}.{name}" in seen:
        raise NotInSource
    seen |= {f"{module}.{name}"}
    tree, package = _tree(module)
    for node in reversed(tree.body):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return _stand_in(node, module, seen)
        if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
            raise NotInSource
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _in_module(_absolute(node, package), alias.name, seen)
    bound = {one.id for one in ast.walk(tree) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
    bound |= {one.name for one in ast.walk(tree) if isinstance(one, (ast.FunctionDef, ast.ClassDef))}
    imported = {a.asname or a.name for one in ast.walk(tree) if isinstance(one, _IMPORTS) for a in one.names}
    # Names that come from elsewhere: all of another module, or computed when they are asked for.
    if {name, "*", "__getattr__"} & (bound | imported):
        raise NotInSource
    raise Absent(module, name)


_IMPORTS = (ast.Import, ast.ImportFrom)
# What defines no other constructor within a class, whatever its text.
_PLAIN = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Expr, ast.Pass, ast.AnnAssign)
# Decorators that leave the parameters of a function as they are.
_KEEP_SIGNATURES = {"override", "torch.no_grad()", "_defaults_from_env_vars"}


@cache
def _tree(module: str) -> tuple[ast.Module, str]:
    """The source of a module, and the package that its relative imports begin from."""
    file = _file(module)
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise NotInSource from error
    return tree, module if file.name == "__init__.py" else module.rpartition(".")[0]


def is_absent(package: str) -> bool:
    """Whether no top-level package or module of this name is installed or in the working directory."""
    return package not in sys.modules and _spec(package) is None


def _spec(package: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(package)  # of a top-level package this imports nothing
    except ValueError:  # a module without a specification, such as __main__
        return None


def _file(module: str) -> Path:
    top, *rest = module.split(".")
    spec = _spec(top) if top else None
    if spec is None:
        raise NotInSource
    if not rest and spec.origin is not None and spec.origin.endswith(".py"):
        return Path(spec.origin)
    if spec.submodule_search_locations is None:
        raise NotInSource
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    for depth, name in enumerate(rest, 1):
        files = [
            file for folder in folders for file in (folder / f"{name}.py", folder / name / "__init__.py")
        ]
        found = [file for file in files if file.is_file()]
        if found and depth == len(rest):
            return found[0]
        inside = (one for folder in folders if folder.is_dir() for one in folder.iterdir())
        if not any(one.name.partition(".")[0] == name for one in inside):
            break
        folders = [folder / name for folder in folders]
    else:
        raise NotInSource
    raise Absent(".".join([top, *rest[:depth]]))


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    base = package.split(".")
    return ".".join([*base[: len(base) - node.level + 1], *([node.module] if node.module else [])])


def _stand_in(node: ast.FunctionDef | ast.ClassDef, module: str, seen: frozenset[str]) -> Any:
    if isinstance(node, ast.FunctionDef):
        return _function(node, module)
    if node.keywords:  # a metaclass
        raise NotInSource
    body: dict[str, Any] = {"__module__": module}
    decorators = [text for one in node.decorator_list if (text := ast.unparse(one)) != "runtime_checkable"]
    if decorators:
        raise NotInSource
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            body["__init__"] = _function(part, module)
        elif (
            not isinstance(part, _PLAIN)
            and ("__init__" in (text := ast.unparse(part)) or "__new__" in text)
            or isinstance(part, ast.FunctionDef)
            and part.name in ("__new__", "__init_subclass__")
        ):
            raise NotInSource
        else:
            body |= _member(part)
    ancestors = dict.fromkeys(_ancestor(base, module, seen) for base in node.bases)
    ancestors.pop(object, None)
    try:
        return types.new_class(node.name, tuple(ancestors), {}, lambda names: names.update(body))
    except TypeError as error:
        raise NotInSource from error


def _member(part: ast.stmt) -> dict[str, Any]:
    """A constant of a class that is written out, or what stands for one of its methods, by its name."""
    match part:
        case ast.FunctionDef(name=name) if not name.startswith("__"):
            return {name: lambda *arguments, **keywords: None}
        case (
            ast.Assign(targets=[ast.Name(id=name)], value=value)
            | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
        ):
            try:
                return {name: ast.literal_eval(value)}
            except ValueError:
                return {name: _NotWrittenOut()}
    return {}


class _NotWrittenOut:
    """An attribute of a class that its source does not tell: the stand-in has none, whatever its ancestors have."""

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError


def _ancestor(base: ast.expr, module: str, seen: frozenset[str]) -> type:
    """The stand-in of a base class, or `Foreign` for one of another package."""
    if isinstance(base, ast.Subscript):  # Dataset[dict[str, Any]]
        base = base.value
    name = ast.unparse(base)
    if name in ("object", "Protocol", "ABC"):
        return object
    head, _, rest = name.partition(".")
    tree, package = _tree(module)
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            # A base class for the type checker alone.
            for one in node.orelse:
                if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == name:
                    return _ancestor(one.value, module, seen)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _class(module, name, seen)
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        origin = _absolute(node, package) if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names:
            if (alias.asname or alias.name) != head:
                continue
            path = ".".join(part for part in (origin, alias.name, rest) if part)
            if path.partition(".")[0] != module.partition(".")[0]:
                return Foreign
            return _class(*path.rpartition(".")[::2], seen)
    raise NotInSource


def _class(module: str, name: str, seen: frozenset[str]) -> type:
    found = _in_module(module, name, seen)
    if not inspect.isclass(found):
        raise NotInSource
    return found


def _function(node: ast.FunctionDef, module: str) -> Any:
    """A function with the parameters of another that does nothing."""
    if not {*map(ast.unparse, node.decorator_list)} <= _KEEP_SIGNATURES:
        raise NotInSource
    given = copy.deepcopy(node.args)
    for one in (*given.posonlyargs, *given.args, *given.kwonlyargs):
        if one.annotation is not None:
            one.annotation = ast.Constant(ast.unparse(one.annotation))
    for rest in (given.vararg, given.kwarg):
        if rest is not None:
            rest.annotation = None
    own = dict(_namespace(module))
    positional = [*given.posonlyargs, *given.args]
    for defaults, names in (
        (given.defaults, positional[len(positional) - len(given.defaults) :]),
        (given.kw_defaults, given.kwonlyargs),
    ):
        for index, (default, name) in enumerate(zip(list(defaults), names, strict=True)):
            if default is not None:
                own[key := f"default of {name.arg}"] = value = _default(default, module)
                defaults[index] = ast.Name(key, ast.Load())
                if value is UNKNOWN:  # which would be no mistake in a YAML
                    name.annotation = None
    shell = copy.copy(node)  # with the fields that a later Python adds
    shell.args, shell.body, shell.decorator_list, shell.returns = given, [ast.Pass()], [], None
    exec(
        compile(ast.fix_missing_locations(ast.Module([shell], [])), "<signature>", "exec", dont_inherit=True),
        own,
    )
    return own[node.name]


# What stands for a default that the source does not write out.
UNKNOWN = object()


def _default(default: ast.expr, module: str) -> Any:
    """The value of a default that is written out, or is a constant of the module."""
    try:
        return ast.literal_eval(default)
    except ValueError:
        return _namespace(module).get(default.id, UNKNOWN) if isinstance(default, ast.Name) else UNKNOWN


@cache
def _namespace(module: str) -> dict[str, Any]:
    """The names of a module that cost nothing: constants, what Python's own light modules give it, and Tensor."""
    found: dict[str, Any] = {}
    for node in _tree(module)[0].body:
        if isinstance(node, ast.ImportFrom) and node.module in _LIGHT and not node.level:
            for alias in node.names:
                found[alias.asname or alias.name] = getattr(_LIGHT[node.module], alias.name, Any)
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            # No YAML holds a tensor, so that any class will do.
            found |= {a.asname or a.name: Foreign for a in node.names if a.name == "Tensor"}
        elif isinstance(node, ast.Import):
            found |= {a.asname or a.name: _LIGHT[a.name] for a in node.names if a.name in _LIGHT}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found
