"""Methods from their names and records; `listing.py` says which there are."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from inspect import isabstract
from pathlib import Path
from typing import Any, cast

from knowedit.errors import ConfigError
from knowedit.io.config import all_or_none, kinds
from knowedit.io.names import nearest, spelled
from knowedit.methods.base import Method
from knowedit.methods.listing import methods


def method_class(name: str) -> type[Method]:
    """The class of a method; "recipe" is the bare locate-then-edit one. "MEMIT" and "neuron_patch"
    are names, too.

    A class that this process has defined is known by its name, too.

    Raises ConfigError for an unknown name, with the nearest known one.
    """
    known = {**methods(), **kinds(Method)}  # a class of the user's own is known once it is defined
    name = spelled(name, known)
    if name not in methods():
        if name in known:
            return cast(type[Method], kinds(Method)[name])
        raise ConfigError(f"unknown method {name!r}; {nearest(name, methods())}")
    listed = methods()[name]
    if listed.entry is not None:
        found = listed.entry.load()
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise ConfigError(
                f"entry point {listed.entry.value!r} is not a Method; mend the distribution "
                f"{listed.group}"
            )
        return found
    import_module(listed.module)
    if name not in kinds(Method):
        raise ConfigError(f"{listed.module} has no method {name!r}: a method is named as its file")
    return cast(type[Method], kinds(Method)[name])


def method_in(file: Path) -> type[Method]:
    """The one method that a Python file defines; the file is run, once a process.

    Raises ConfigError: no such file, an error in it, no method or several, one that lacks what a
    method needs, or one that is called like one of ours or that of another file.
    """
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; name a Python file that defines a method")
    found = _method_in(file.resolve(), file.stat().st_mtime_ns)
    _FILES[found] = str(file)
    return found


#: The methods of files, and how these were named.
_FILES: dict[type[Method], str] = {}


def made_by(method: Method) -> dict[str, Any]:
    """For the record of a run: the file of a method of one's own, and its settings as `--set`
    takes them; nothing for one of ours.
    """
    if (file := _FILES.get(type(method))) is None:
        return {}
    return {"own": {"file": file, "set": changed(method.to_dict(), type(method)().to_dict())}}


def changed(config: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    """What of a record differs from another, as `--set` takes it: `["metric.gain=0.95"]`."""
    before = _flat(usual)
    return [
        f"{name}={json.dumps(value)}"
        for name, value in _flat(config).items()
        if name not in before or before[name] != value
    ]


def _flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """`{"metric": {"gain": 0.9}}` as `{"metric.gain": 0.9}`."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        inner = isinstance(value, Mapping)
        found |= _flat(value, f"{before}{name}.") if inner else {f"{before}{name}": value}
    return found


@cache
def _method_in(file: Path, _: int) -> type[Method]:
    name = f"knowedit_own_{file.stem}"
    with all_or_none(Method.family, name):
        return _only_method_in(file, name)


def _only_method_in(file: Path, name: str) -> type[Method]:
    ours, known = set(methods()), kinds(Method)
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
    ]
    found = [one for one in found if not isabstract(one)] or found  # without its own bases
    if len(found) != 1:
        names = ", ".join(one.__name__ for one in found) or "none"
        raise ConfigError(
            f"{file} must define one method, a class made from Method; it has {names}"
        )
    (made,) = found
    lacking = sorted(getattr(made, "__abstractmethods__", ()))
    lacking += [] if hasattr(made, "name") else ["name"]
    if lacking:
        raise ConfigError(
            f"{file}: {made.__name__} lacks {', '.join(lacking)}, as every method has"
        )
    if made.kind in ours:
        raise ConfigError(
            f"{file} calls its method {made.name!r}, which is one of ours; give it another name"
        )
    other = _FILES.get(cast(type[Method], known.get(made.kind)))
    if other is not None and Path(other).is_file() and Path(other).resolve() != file:
        raise ConfigError(
            f"{file} calls its method {made.kind!r}, as {other} does; give its class another name"
        )
    return made


def make_method(
    record: str | Mapping[str, Any] | Method,
    settings: Mapping[str, Any] | Iterable[str] = (),
    **named: Any,
) -> Method:
    """A method from its name, a record as `Method.to_dict` writes it (fields may be left out), a
    Python file with a class of one's own, or another method.

    Args:
        settings: changed in it, as `Config.with_settings` takes them: `["metric.gain=0.95"]`.
        named: the same, for names without dots: `layers=5`.

    Raises:
        ConfigError: an unknown method or setting, or a value of the wrong type.
    """
    if isinstance(record, Method):
        return record.with_settings(settings, **named)
    if isinstance(record, str):
        record = {"kind": record}
    if not isinstance(record, Mapping) or not isinstance(record.get("kind"), str):
        raise ConfigError(
            f"a method's record needs its name as 'kind', got {record!r}; known: "
            f"{', '.join(methods())}"
        )
    kind = record["kind"]
    if kind.endswith(".py"):
        kind = method_in(Path(kind)).kind
    kind = spelled(kind, {**methods(), **kinds(Method)})
    return method_class(kind).from_dict({**record, "kind": kind}).with_settings(settings, **named)
