"""Methods from their names and records; `listing.py` says which there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, cast

from knowedit.errors import ConfigError
from knowedit.io.config import kinds
from knowedit.io.names import nearest, spelled
from knowedit.methods.base import Method
from knowedit.methods.listing import methods


def method_class(name: str) -> type[Method]:
    """The class of a method; "recipe" is the bare locate-then-edit one. "MEMIT" and "neuron_patch"
    are names, too.

    Raises ConfigError for an unknown name, with the nearest known one.
    """
    name = spelled(name, methods())
    if name not in methods():
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


def make_method(
    record: str | Mapping[str, Any] | Method,
    settings: Mapping[str, Any] | Iterable[str] = (),
    **named: Any,
) -> Method:
    """A method from its name, a record as `Method.to_dict` writes it (fields may be left out), or
    another method.

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
    kind = spelled(record["kind"], methods())
    return method_class(kind).from_dict({**record, "kind": kind}).with_settings(settings, **named)
