"""Names of a package that are imported when they are first asked for (PEP 562)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any


def attributes(
    package: str, modules: Mapping[str, Iterable[str]], kept: dict[str, Any], name: str
) -> Any:
    """The attribute `name` of `package`, from the module of `modules` that has it; it is put into
    `kept`, the package's globals, so that it is looked up once.

    Raises:
        AttributeError: no module has it.
    """
    for module, names in modules.items():
        if name in names:
            kept[name] = getattr(import_module(module), name)
            return kept[name]
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
