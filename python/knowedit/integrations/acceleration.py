"""Putting the replacements in place and taking them back."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from knowedit.errors import ConfigError
from knowedit.integrations.discovery import ORIGINAL, Place, functions, holders, modules_under
from knowedit.integrations.hosts import Host, resolve
from knowedit.integrations.replacements import REPLACEMENTS, Replacement
from knowedit.integrations.replacements.base import forget_notes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replaced:
    """One function of the host, its replacement and where it was put."""

    original: FunctionType
    replacement: Any
    what: str
    places: tuple[Place, ...]

    @property
    def name(self) -> str:
        return f"{self.original.__module__}.{self.original.__name__}"


@dataclass
class Acceleration:
    """The replacements in one host.

    Attributes:
        host: where they are.
        replaced: what runs ours now.
        left: names of functions that were left alone, with the reason.
    """

    host: Host
    replaced: list[Replaced] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def install(self) -> Acceleration:
        """Search the host's loaded modules and replace what is known; again after more of them have
        been imported.

        Raises:
            ConfigError: nothing of the host that is known is loaded.
        """
        forget_notes()
        chosen: list[tuple[FunctionType, Replacement]] = []
        modules = modules_under(self.host.roots)
        for function in functions(modules):
            for kind in REPLACEMENTS:
                if kind.signature.named(function) and kind.wanted(self.host):
                    name = f"{function.__module__}.{function.__name__}"
                    if (reason := kind.refusal(function)) is None:
                        chosen.append((function, kind))
                    elif not kind.common:
                        self.left[name] = reason
                        logger.warning("%s is left as it is: %s", name, reason)
                    break
        if not chosen and not self.replaced:
            raise ConfigError(
                f"{self.host.name}: no function that could be accelerated is loaded from "
                f"{', '.join(map(str, self.host.roots))}; import the host's modules first"
                + "".join(f"\n  {name}: {reason}" for name, reason in self.left.items())
            )
        where = holders((function for function, _ in chosen), modules)
        for function, kind in chosen:
            made = functools.wraps(function)(kind.make(function, self.host))
            setattr(made, ORIGINAL, function)
            places = tuple(where[id(function)])
            for place in places:
                place.put(made)
            self.replaced.append(Replaced(function, made, kind.what, places))
        _INSTALLED[self.host.name] = self
        return self

    def uninstall(self) -> None:
        """Give the host its own functions back, also where ours were imported since."""
        modules = modules_under(self.host.roots)
        where = holders((one.replacement for one in self.replaced), modules)
        for one in self.replaced:
            for place in where[id(one.replacement)]:
                place.put(one.original)
        self.replaced.clear()
        self.left.clear()
        _INSTALLED.pop(self.host.name, None)

    def explain(self) -> str:
        """What was replaced, where, and what was left alone and why."""
        lines = [f"{self.host.name}: {len(self.replaced)} functions replaced"]
        for one in self.replaced:
            lines.append(f"  {one.name}: {one.what}")
            lines += [f"      in {place.label}" for place in one.places]
        if self.left:
            lines.append(f"  left as they are: {len(self.left)}")
            lines += [f"  {name}: {reason}" for name, reason in self.left.items()]
        if self.host.fixes:
            lines.append(f"  corrections: {', '.join(sorted(self.host.fixes))}")
        return "\n".join(lines)


_INSTALLED: dict[str, Acceleration] = {}


def accelerate(
    host: str | Path | ModuleType,
    *,
    fix: str | Sequence[str] = (),
    layers: Sequence[int] = (),
) -> Acceleration:
    """Replace a host's slow functions by fast ones with the same results.

    Args:
        host: "easyedit", "memit" or "alphaedit"; or a package, its name, or a folder, whose
            modules that are loaded by now are searched.
        fix: corrections of the host's faults to switch on, by name (`hosts.FIXES`); they change
            results.
        layers: whose statistics are collected in one pass, where the host asks for one layer at a
            time without saying which others it will want.

    Returns:
        what was done: `.explain()` says it, `.uninstall()` takes it back.

    Raises:
        ConfigError: the host cannot be found, or has no function that is known.
    """
    chosen = (fix,) if isinstance(fix, str) else tuple(fix)
    found = resolve(host, chosen, tuple(layers))
    if found.name in _INSTALLED:
        _INSTALLED[found.name].uninstall()
    return Acceleration(found).install()


@contextmanager
def accelerated(
    host: str | Path | ModuleType, *, fix: str | Sequence[str] = (), layers: Sequence[int] = ()
) -> Iterator[Acceleration]:
    """`accelerate` within a block."""
    done = accelerate(host, fix=fix, layers=layers)
    try:
        yield done
    finally:
        done.uninstall()


def uninstall(host: str | None = None) -> None:
    """Take back the replacements in one host, by the name it was given by, or in all."""
    for name in [host] if host is not None else list(_INSTALLED):
        if name not in _INSTALLED:
            raise ConfigError(f"{name!r} is not accelerated; {', '.join(_INSTALLED) or 'none'} is")
        _INSTALLED[name].uninstall()


def explain() -> str:
    """What is replaced at the moment, in every host."""
    found = [done.explain() for done in _INSTALLED.values()]
    return "\n".join(found) or "nothing is accelerated"
