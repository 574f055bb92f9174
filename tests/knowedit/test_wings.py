"""The order of the wings: imports go down only, in no circle, and none hides in a function
(unit).
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "python" / "knowedit"
#: From the lowest to the highest; a wing imports itself and what stands before it.
WINGS = (
    "errors",
    "io",
    "facts",
    "models",
    "statistics",
    "edits",
    "methods",
    "integrations",
    "evaluation",
    "studies",
    "report",
    "cli",
)
TOP = ("knowedit", "knowedit.__main__")
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> str:
    parts = ("knowedit", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


#: The one import that goes up, and the one that stands in a function: `Edit.method()` rebuilds the
#: method from its record, when it is asked to.
UPWARD = ("knowedit.edits.edit", "knowedit.methods.registry")
MODULES = {module_of(file): file for file in FILES}


@cache
def imports(module: str) -> tuple[tuple[str, bool, int], ...]:
    """(imported module of ours, whether inside a function, line), those for type checkers left
    out.
    """
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    found: list[tuple[str, bool, int]] = []

    def visit(node: ast.AST, hidden: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.append((full if full in MODULES else str(node.module), hidden, node.lineno))
        if isinstance(node, ast.Import):
            found.extend((alias.name, hidden, node.lineno) for alias in node.names)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, hidden or inside)

    visit(tree, False)
    return tuple(entry for entry in found if entry[0].partition(".")[0] == "knowedit")


def wing(module: str) -> str:
    return module.split(".")[1] if module.count(".") else module


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    if module in TOP:
        return
    place = WINGS.index(wing(module))
    for name, hidden, line in imports(module):
        if hidden and (module, name) == UPWARD:
            continue
        assert name not in TOP, f"{module}:{line} imports the package itself"
        assert WINGS.index(wing(name)) <= place, (
            f"{module}:{line} imports {name}, which is above it"
        )


def test_imports_go_in_no_circle():
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name, hidden, _ in imports(module):
                # a package's own names come after its modules: it may import them, not they it
                if not hidden and name in MODULES:
                    walk(name, (*path, module))
            done.add(module)

    for module in MODULES:
        walk(module, ())


@pytest.mark.parametrize("module", [m for m in MODULES if wing(m) != "cli" and m not in TOP])
def test_no_import_of_ours_hides_in_a_function(module):
    """Commands import what they need when they run, so that `--help` imports no torch."""
    hidden = {(module, name) for name, inside, _ in imports(module) if inside} - {UPWARD}
    assert not hidden, f"{sorted(hidden)}: import at the top of the module"


def test_the_kernels_do_not_know_the_pipeline():
    kernels = PACKAGE.parents[1] / "knowedit_kernels"
    for file in kernels.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            roots = {name.partition(".")[0] for name in names}
            assert not roots & {"knowedit", "transformers"}, file


def test_every_wing_is_there():
    found = {wing(module) for module in MODULES if module not in TOP}
    assert found == set(WINGS)
