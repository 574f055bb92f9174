"""The methods by name, found without importing them: one module of `PACKAGES` is one method, named
as its file.

Other distributions add theirs by an entry point of the group "knowedit.methods" that names the
class.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

#: The packages whose modules are methods, by the group that `knowedit methods` lists them in.
PACKAGES = {
    "locate": "locate/named",
    "gradient": "gradient/named",
    "learned": "learned/named",
    "neurons": "neurons/named",
}


@dataclass(frozen=True)
class Listed:
    """A method that can be had.

    Attributes:
        name: as the command line and records say it.
        group: "locate", "gradient", "learned", "neurons", or the distribution that adds it.
        summary: the first line of its module's docstring.
        module: where it is. entry: its entry point, if another distribution adds it.
    """

    name: str
    group: str
    summary: str
    module: str
    entry: EntryPoint | None = None


@cache
def methods() -> dict[str, Listed]:
    """Every method by name, ours first; nothing is imported."""
    found: dict[str, Listed] = {}
    here = Path(__file__).parent
    for group, package in PACKAGES.items():
        for file in sorted((here / package).glob("[!_]*.py")):
            name = file.stem.replace("_", "-")
            text = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
            module = f"{__package__}.{package.replace('/', '.')}.{file.stem}"
            found[name] = Listed(name, group, " ".join(text.partition("\n\n")[0].split()), module)
    found["recipe"] = Listed(
        "recipe",
        "locate",
        "Any metric, target, spread, keys and training.",
        f"{__package__}.locate.recipe",
    )
    for entry in entry_points(group="knowedit.methods"):
        if entry.name not in found:
            owner = entry.dist.name if entry.dist else entry.module
            found[entry.name] = Listed(entry.name, owner, "", entry.module, entry)
    return found
