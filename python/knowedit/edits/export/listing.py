"""The export formats by name, found without importing them: one module beside this one is one
format, named as its file, with a function `write(model, edits, path) -> Path`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import cast

from knowedit.errors import EditError
from knowedit.io.names import nearest, spelled


@cache
def formats() -> dict[str, str]:
    """Every format by name, with the first paragraph of its module's docstring; nothing is
    imported.
    """
    found: dict[str, str] = {}
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        if file.name != Path(__file__).name:
            text = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
            found[file.stem.replace("_", "-")] = " ".join(text.partition("\n\n")[0].split())
    return found


def export_format(name: str) -> Callable[..., Path]:
    """The `write` of a format: from a model, its edits and where to write, all or nothing. Raises
    EditError for an unknown name.
    """
    name = spelled(name, formats())
    if name not in formats():
        raise EditError(f"unknown export format {name!r}; {nearest(name, formats())}")
    module = import_module(f"{__package__}.{name.replace('-', '_')}")
    return cast("Callable[..., Path]", module.write)
