"""Names of a package that are imported when they are first asked for (PEP 562).

A package says which in one place, where type checkers read them too:

    if TYPE_CHECKING:
        from package.module import Name as Name

    __getattr__, __dir__, __all__ = lazy(__name__, __file__, globals())
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy(
    package: str, file: str, kept: dict[str, Any]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of the package in `file`. What is imported is put into
    `kept`, the package's globals, so that it is looked up once.
    """
    modules = declared(file)

    def attribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        kept[name] = getattr(import_module(modules[name]), name)
        return kept[name]

    return attribute, lambda: sorted({*kept, *modules}), sorted(modules)


def declared(file: str) -> dict[str, str]:
    """The module of every name that a file imports under `if TYPE_CHECKING:` as itself."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for block in tree.body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for line in block.body:
                if isinstance(line, ast.ImportFrom) and line.module:
                    again = [alias.name for alias in line.names if alias.asname == alias.name]
                    found |= dict.fromkeys(again, line.module)
    return found
