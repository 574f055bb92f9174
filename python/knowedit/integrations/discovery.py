"""Finding functions in loaded modules: by name and signature, and every place that holds them.

Editing code imports functions by value (`from .compute_z import compute_z`) and keeps them in
tables (`{"MEMIT": apply_memit_to_model}`), so replacing one means replacing it in each holder.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

#: Marks what we have put in place; its value is the host's own function.
ORIGINAL = "__knowedit_original__"


@dataclass(frozen=True)
class Signature:
    """What a function must look like.

    Attributes:
        name: pattern of its whole name.
        required: its first parameters, in order.
        optional: parameters that may follow, in any order.
        keywords: it may take `**kwargs`.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    keywords: bool = False

    def named(self, function: FunctionType) -> bool:
        return re.fullmatch(self.name, function.__name__) is not None

    def difference(self, function: FunctionType) -> str | None:
        """How the function's parameters differ, or None."""
        found = inspect.signature(function).parameters
        names = [n for n, p in found.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        first, rest = tuple(names[: len(self.required)]), names[len(self.required) :]
        if first != self.required:
            return f"its parameters are ({', '.join(names)}), not ({', '.join(self.required)}, ...)"
        if unknown := [name for name in rest if name not in self.optional]:
            return f"it has unknown parameters: {', '.join(unknown)}"
        if len(names) < len(found) and not self.keywords:
            return "it takes further keywords (**), whose meaning is not known"
        return None


@dataclass(frozen=True)
class Place:
    """A name or a table's entry that holds a function.

    Attributes:
        table: the module's names, or the dictionary.
        key: where in it.
        index: where in the tuple or list that stands there, or None.
        label: for people.
    """

    table: dict[Any, Any]
    key: Any
    index: int | None
    label: str

    def put(self, value: Any) -> None:
        """Replace what is held."""
        if self.index is None:
            self.table[self.key] = value
            return
        entries = list(self.table[self.key])
        entries[self.index] = value
        self.table[self.key] = type(self.table[self.key])(entries)


def modules_under(roots: Sequence[Path]) -> list[ModuleType]:
    """The loaded modules whose files lie under one of the folders."""
    folders = tuple(
        {f"{path}{os.sep}" for root in roots for path in (root.absolute(), root.resolve())}
    )

    def inside(module: ModuleType) -> bool:
        file = getattr(module, "__file__", None)
        return isinstance(file, str) and os.path.abspath(file).startswith(folders)

    return [module for module in list(sys.modules.values()) if inside(module)]


def functions(modules: Iterable[ModuleType]) -> list[FunctionType]:
    """The functions that the modules define, each once; what we have put in place is left out."""
    modules = list(modules)
    names = {module.__name__ for module in modules}
    found = {
        id(value): value
        for module in modules
        for value in list(vars(module).values())
        if isinstance(value, FunctionType)
        and value.__module__ in names
        and not hasattr(value, ORIGINAL)
    }
    return list(found.values())


def holders(
    wanted: Iterable[Callable[..., Any]], hosts: Iterable[ModuleType]
) -> dict[int, list[Place]]:
    """Every module's name that holds one of the functions, and every entry of the dictionaries of
    `hosts` and of the main program, by the function's id.
    """
    ids = {id(function) for function in wanted}
    found: dict[int, list[Place]] = {i: [] for i in ids}
    tables = {module.__name__ for module in hosts} | {"__main__"}
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        name = getattr(module, "__name__", "")
        if not isinstance(names, dict) or name.startswith("knowedit"):
            continue
        for key, value in list(names.items()):
            if id(value) in ids:
                found[id(value)].append(Place(names, key, None, f"{name}.{key}"))
            elif type(value) is dict and name in tables and not key.startswith("__"):
                for place, held in _entries(value, f"{name}.{key}"):
                    if id(held) in ids:
                        found[id(held)].append(place)
    return found


def _entries(table: dict[Any, Any], label: str) -> Iterator[tuple[Place, Any]]:
    for key, value in list(table.items()):
        yield Place(table, key, None, f"{label}[{key!r}]"), value
        if type(value) in (tuple, list):
            for index, held in enumerate(value):
                yield Place(table, key, index, f"{label}[{key!r}][{index}]"), held


def mentions(function: FunctionType, name: str) -> bool:
    """Whether the function's own code uses a name or a keyword: how a host's dialect is told."""

    def words(constant: Any) -> Iterator[Any]:
        if isinstance(constant, tuple):
            for part in constant:
                yield from words(part)
        else:
            yield constant

    code = function.__code__
    return name in code.co_names or name in set(words(code.co_consts))


def source_of(function: FunctionType) -> ast.AST | None:
    """The function's syntax tree, or None when its source cannot be read."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return None


def read_from(tree: ast.AST, name: str) -> set[str]:
    """The attributes that are read from the variable `name`, such as `hparams`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == name
    }


def returned(tree: ast.AST) -> ast.expr | None:
    """What a function returns last: the expression, or what the name that is returned was last
    given. Functions inside it are left out.
    """
    own = sorted(_own_statements(tree), key=lambda node: node.lineno)
    values = [node.value for node in own if isinstance(node, ast.Return)]
    if not values or not isinstance(name := values[-1], ast.Name):
        return values[-1] if values else None
    given = [
        node.value
        for node in own
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == name.id for target in node.targets)
    ]
    return given[-1] if given else None


def _own_statements(tree: ast.AST, inside: bool = False) -> Iterator[ast.stmt]:
    """The statements of the outermost function, at any depth."""
    for node in ast.iter_child_nodes(tree):
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if function and inside:
            continue
        if isinstance(node, ast.stmt):
            yield node
        yield from _own_statements(node, inside or function)
