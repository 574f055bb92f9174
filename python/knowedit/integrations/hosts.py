"""The hosts we know by name, and the folders of any other: what cannot be found in the code."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from knowedit.errors import ConfigError

#: Corrections of the hosts' own faults, each changes results.
FIXES: dict[str, str] = {
    "generation": "texts are generated with the whole attention mask; the hosts' loop is wrong "
    "from the second token on with transformers 5",
    "rome_key": "ROME divides by the averaged key that its left vector was made of, not by the "
    "bare prompt's",
    "history": "a module's cache of the keys that were written is emptied when the weights are not "
    "those that its last edit left: edits that were taken back are no part of them",
    "half": "keys, states and values of a float16 or bfloat16 model are handed on in float32, so "
    "that AlphaEdit's solve takes them and nothing is rounded on the way",
}


@dataclass(frozen=True)
class Host:
    """Where a host's code is and what to change in it.

    Attributes:
        name: for messages.
        roots: folders whose modules are searched.
        fixes: names of `FIXES`.
        layers: whose statistics are collected together when the host does not say.
    """

    name: str
    roots: tuple[Path, ...]
    fixes: frozenset[str] = frozenset()
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """A host that is known by name.

    Attributes:
        packages: imported before the search; one of them is enough.
        flat: its packages lie side by side in a repository's folder, which is searched whole.
    """

    packages: tuple[str, ...]
    flat: bool = True
    fixes: tuple[str, ...] = field(default=())


ADAPTERS = {
    "memit": Adapter(("memit", "rome")),
    "alphaedit": Adapter(("AlphaEdit", "memit", "rome")),
    "easyedit": Adapter(("easyeditor",), flat=False),
}


def resolve(
    where: str | Path | ModuleType, fix: tuple[str, ...] = (), layers: tuple[int, ...] = ()
) -> Host:
    """The host that is meant: a known one's name, a module, a package's name or a folder.

    Raises:
        ConfigError: it cannot be imported or found; an unknown correction.
    """
    if unknown := sorted(set(fix) - set(FIXES)):
        raise ConfigError(f"fix={', '.join(unknown)} is not known; known: {', '.join(FIXES)}")
    chosen = frozenset(fix)
    if isinstance(where, ModuleType):
        return Host(where.__name__, (_folder(where),), chosen, layers)
    if isinstance(where, str) and where in ADAPTERS:
        adapter = ADAPTERS[where]
        found = [m for m in map(_import, adapter.packages) if m is not None]
        if not found:
            raise ConfigError(
                f"{where}: none of {', '.join(adapter.packages)} can be imported; put the "
                f"repository's folder on sys.path (or start there), or pass the folder"
            )
        roots = {_folder(m).parent if adapter.flat else _folder(m) for m in found}
        return Host(where, tuple(sorted(roots)), chosen | set(adapter.fixes), layers)
    if Path(where).is_dir():
        return Host(str(where), (Path(where).resolve(),), chosen, layers)
    module = _import(str(where))
    if module is None:
        raise ConfigError(
            f"{str(where)!r} is neither a folder, nor a package that can be imported, nor one of "
            f"{', '.join(ADAPTERS)}"
        )
    return Host(str(where), (_folder(module),), chosen, layers)


def _import(name: str) -> ModuleType | None:
    """The module, or None when there is none of that name; what fails inside it is raised."""
    try:
        if importlib.util.find_spec(name) is None:
            return None
    except ModuleNotFoundError:
        return None
    return importlib.import_module(name)


def _folder(module: ModuleType) -> Path:
    """A package's folder, or the folder of a single module."""
    paths = list(getattr(module, "__path__", []))
    file = paths[0] if paths else str(Path(str(module.__file__)).parent)
    return Path(file).resolve()
