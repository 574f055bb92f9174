"""Settings as values: frozen dataclasses that go to a dictionary and back, tagged by kind and
version.

    @dataclass(frozen=True)
    class Metric(Config):              # a family: fields of this type take any of its kinds
        family = "metric"

    @dataclass(frozen=True)
    class Covariance(Metric):          # kind "covariance" (the class' name, or `kind = ...`)
        gain: float = 0.9

    Covariance().to_dict()             # {"kind": "covariance", "version": 1, "gain": 0.9}
    Metric.from_dict({"kind": "covariance", "gain": 0.8})

Values are checked against the fields' types when an object is made, so that a wrong one is an error
of ours that names the field, and not a TypeError from somewhere below.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import types
import typing
from abc import ABCMeta
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from knowedit.errors import ConfigError
from knowedit.io.names import nearest, spelled
from knowedit.io.ranges import outside

_KINDS: dict[str, dict[str, type[Config]]] = {}
TAGS = ("kind", "version")
Self = TypeVar("Self", bound="Config")


class ConfigType(ABCMeta):
    """Makes wrong names and numbers of settings errors of ours, that say what is known."""

    def __call__(cls, *values: Any, **named: Any) -> Any:
        if not getattr(cls, "__abstractmethods__", None) and dataclasses.is_dataclass(cls):
            fields = fields_of(cls)
            if len(values) > len(fields):
                raise ConfigError(
                    f"{getattr(cls, 'kind', cls.__name__)} takes its settings by name: "
                    f"{', '.join(fields)}"
                )
            for name in named:
                if name not in fields:
                    raise ConfigError(_unknown(cls, name, fields))
        return super().__call__(*values, **named)


@contextmanager
def all_or_none(family: str, module: str) -> Iterator[None]:
    """Kinds of a family that `module` defines within stay known only if nothing is raised; one that
    they took the place of comes back.
    """
    before = dict(_KINDS[family])
    try:
        yield
    except BaseException:
        now = _KINDS[family]
        for kind in [kind for kind, made in now.items() if made.__module__ == module]:
            if kind in before:
                now[kind] = before[kind]
            else:
                del now[kind]
        raise


class Config(metaclass=ConfigType):
    """Base of every recorded setting: a frozen dataclass of plain values and other configs.

    Attributes:
        family: set by the root of several interchangeable kinds; a field of the root's type takes
            any of them.
        kind: the name within the family; by default the class' name in lower case with hyphens.
        version: of the fields' meaning; raise it when they change, and mend old records in
            `migrate`.
    """

    family: ClassVar[str]
    kind: ClassVar[str]
    version: ClassVar[int] = 1

    def __init_subclass__(cls, *, abstract: bool = False, **others: Any) -> None:
        """`abstract`: a base of kinds that is none itself."""
        super().__init_subclass__(**others)
        if "__repr__" not in vars(cls):
            cls.__repr__ = Config.__repr__  # type: ignore[method-assign]  # not the dataclass' own
        if "family" in vars(cls):  # the root, which no record names
            _KINDS.setdefault(cls.family, {})
        if abstract or "family" in vars(cls):
            return
        if "kind" not in vars(cls):
            cls.kind = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()
        _KINDS.setdefault(getattr(cls, "family", cls.kind), {})[cls.kind] = cls

    def __post_init__(self) -> None:
        for name, hint in fields_of(type(self)).items():
            value = _checked(
                hint, getattr(self, name), f"{self._called()}.{name}", _default(type(self), name)
            )
            if (must := outside(type(self), name, value)) is not None:
                raise ConfigError(f"{self._called()}.{name} must {must}, got {value}")
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        """What differs from the defaults; it fits a screen."""
        cls = type(self)
        shown = {name: getattr(self, name) for name in fields_of(cls)}
        changed = [f"{n}={_short(v)}" for n, v in shown.items() if not _same(v, _default(cls, n))]
        return f"{cls.__name__}({', '.join(changed)})"

    @classmethod
    def _called(cls) -> str:
        return getattr(cls, "kind", cls.__name__)

    @classmethod
    def migrate(cls, record: dict[str, Any], version: int) -> dict[str, Any]:
        """A record of an older `version` in today's fields."""
        return record

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `from_dict` reads back equal; every field is in it, defaults
        too.
        """
        fields = {name: plain(getattr(self, name)) for name in fields_of(type(self))}
        return {"kind": self.kind, "version": self.version} | fields

    @classmethod
    def from_dict(
        cls: type[Self], record: Mapping[str, Any] | str, *, base: Config | None = None
    ) -> Self:
        """The config of a record, which may leave out fields: `base`, else the class, says what
        they are.

        Args:
            record: as `to_dict` writes it, or the name of a kind.
            base: an object to change; used where the record names no other kind.

        Raises:
            ConfigError: an unknown kind or field (with the nearest known one), a value of the wrong
                type, a record of a newer version, or an object that no record can hold.
        """
        if isinstance(record, str):
            record = {"kind": record}
        if not isinstance(record, Mapping):
            raise ConfigError(f"{cls._called()}: expected a record, got {_got(record)}")
        values = dict(record)
        kind, version = values.pop("kind", None), values.pop("version", None)
        if kind is None and base is not None:
            kind = base.kind
        known = kinds(cls)
        if kind is None:
            kind = vars(cls).get("kind")
        kind = spelled(kind, known) if isinstance(kind, str) else kind
        if not isinstance(kind, str) or kind not in known:
            what = getattr(cls, "family", "config")
            raise ConfigError(f"unknown {what} {kind!r}; {nearest(str(kind), known)}")
        made = known[kind]
        if version is not None:
            if type(version) is not int or version < 1:
                raise ConfigError(f"{kind}.version must be 1, 2, ..., got {_got(version)}")
            if version > made.version:
                raise ConfigError(
                    f"{kind}: the record is of version {version}, this program knows "
                    f"{made.version}; install a newer one"
                )
            values = made.migrate(values, version) if version < made.version else values
        names = fields_of(made)
        for name in values:
            if name not in names:
                raise ConfigError(f"{kind} has no setting {name!r}; {nearest(str(name), names)}")
        start = (
            {} if base is None or type(base) is not made else {n: getattr(base, n) for n in names}
        )
        for name, value in values.items():
            before = start[name] if name in start else _default(made, name)
            start[name] = _checked(names[name], value, f"{kind}.{name}", before)
        return typing.cast(Self, made(**start))

    def with_settings(
        self: Self, settings: Mapping[str, Any] | Iterable[str] = (), **named: Any
    ) -> Self:
        """A copy with some settings changed.

        Args:
            settings: `{"metric.gain": 0.95}`, or `["metric.gain=0.95"]` as on the command line
                (values in JSON, else text); one such text may stand alone. A name without dots may
                also be a field of one of the parts, if of one only.

        Raises:
            ConfigError: as `from_dict`; a name that several parts have; what is not `name=value`.
        """
        if isinstance(settings, Mapping):
            given = {_name(name): value for name, value in settings.items()}
        elif isinstance(settings, Iterable):
            texts = [settings] if isinstance(settings, str) else settings
            given = dict(map(parse_setting, texts))
        else:
            raise ConfigError(f"{self.kind}: settings are names and values, got {_got(settings)}")
        changed = self
        for path, value in {**given, **named}.items():
            changed = changed._with(_places(changed, path), value)
        return changed

    def _with(self: Self, path: list[str], value: Any) -> Self:
        name, *rest = path
        if name not in (names := fields_of(type(self))):
            raise ConfigError(f"{self.kind} has no setting {name!r}; {nearest(name, names)}")
        if rest:
            part = getattr(self, name)
            if not isinstance(part, Config):
                raise ConfigError(
                    f"{self.kind}.{name} is {part!r} and has no setting {rest[0]!r}; set {name} "
                    f"first"
                )
            value = part._with(rest, value)
        return type(self).from_dict({name: value}, base=self)


def _unknown(cls: type, name: str, fields: Mapping[str, Any]) -> str:
    """What to say of a setting that there is not: it may be one of a part."""
    kind = getattr(cls, "kind", cls.__name__)
    for part in fields:
        default = _default(cls, part)
        if isinstance(default, Config) and name in fields_of(type(default)):
            made = type(default).__name__
            return (
                f"{kind} has no setting {name!r}; it is one of {part}: {part}={made}({name}=...), "
                f"or with_settings(['{part}.{name}=...'])"
            )
    return f"{kind} has no setting {name!r}; {nearest(name, fields)}"


def parse_setting(text: str) -> tuple[str, Any]:
    """`"metric.gain=0.95"` as name and value: JSON where it is JSON, a number as Python writes it
    (`.5`, `5.`), else text. Raises ConfigError.
    """
    name, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")
    if not equals or not name.strip():
        raise ConfigError(f"{text!r}: give name=value, such as metric.gain=0.95")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        number = re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", value, re.IGNORECASE)
        return name.strip(), float(value) if number else value.strip()


def _name(name: Any) -> str:
    """The name of a setting. Raises ConfigError for what is no text."""
    if not isinstance(name, str):
        raise ConfigError(f"the name of a setting is a text, such as 'metric.gain'; got {name!r}")
    return name


def kinds(cls: type[Config]) -> dict[str, type[Config]]:
    """Every kind that a field of type `cls` takes, by name."""
    known = _KINDS.get(getattr(cls, "family", getattr(cls, "kind", "")), {})
    return {kind: found for kind, found in known.items() if issubclass(found, cls)}


def fields_of(cls: Any) -> Mapping[str, Any]:
    """`{name: type}` of a dataclass' settings, in order."""
    return _fields_of(cls)


@cache
def _fields_of(cls: Any) -> Mapping[str, Any]:
    hints = typing.get_type_hints(cls)
    found = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    return types.MappingProxyType(found)


def paths_of(config: Config) -> list[str]:
    """The names of all settings, those of the parts as `metric.gain`."""
    found: list[str] = []
    for name in fields_of(type(config)):
        part = getattr(config, name)
        inner = paths_of(part) if isinstance(part, Config) else []
        found += [name] if not isinstance(part, Config) else [f"{name}.{path}" for path in inner]
    return found


def plain(value: Any) -> Any:
    """`value` as JSON holds it; what no record can hold as `{"reference": type, "digest": ...}`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return {"reference": type(value).__name__, "digest": _digest(value)}


def _digest(value: Any) -> str | None:
    """Of an object that is only referred to: of its own `digest()`, or of its tensors' bits; None
    where it has none.
    """
    if hasattr(value, "digest"):
        return value.digest()
    digest = hashlib.blake2b(digest_size=16)
    parts = sorted(value.items()) if isinstance(value, Mapping) else [("", value)]
    for name, part in parts:
        if not hasattr(part, "untyped_storage"):
            return None
        digest.update(f"{name} {tuple(part.shape)} {part.dtype}".encode())
        flat = part.detach().cpu().contiguous().flatten()
        digest.update(flat.view(import_module("torch").uint8).numpy().tobytes())
    return digest.hexdigest()


def _places(config: Config, path: str) -> list[str]:
    """Where the setting of that name is: `metric.gain`, or `gain` where one part only has it."""
    names = path.split(".")
    if len(names) > 1 or names[0] in fields_of(type(config)):
        return names
    parts = [name for name in fields_of(type(config)) if isinstance(getattr(config, name), Config)]
    found = [[part, *names] for part in parts if names[0] in fields_of(type(getattr(config, part)))]
    if len(found) > 1:
        several = ", ".join(".".join(place) for place in found)
        raise ConfigError(f"{config.kind}: {path!r} could be {several}; name one of them")
    return found[0] if found else names


_MISSING = object()


def _default(cls: type, name: str) -> Any:
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else _MISSING


def _same(value: Any, other: Any) -> bool:
    """Equal as settings; tensors and their like only if they are one object."""
    try:
        return bool(value == other)
    except (RuntimeError, ValueError):
        return value is other


def _checked(hint: Any, value: Any, place: str, before: Any = _MISSING) -> Any:
    """`value` as a field of type `hint` holds it. Raises ConfigError with `place`, what was
    expected and what came.
    """
    found = _fit(hint, value, place, before)
    if found is _MISSING:
        found = _fit(hint, _python(value), place, before)
    if found is _MISSING:
        raise ConfigError(f"{place} must be {_say(hint)}, got {_got(value)}")
    return found


def _python(value: Any) -> Any:
    """Numbers of numpy and torch, and lists of them, as Python's own."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_python(part) for part in value] if isinstance(value, (list, tuple)) else value


def _fit(hint: Any, value: Any, place: str, before: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(args, value, place, before)
    if origin is Literal:
        return value if any(value == arg and type(value) is type(arg) for arg in args) else _MISSING
    if origin is tuple:
        return _tuple(args, value, place)
    if hint is None or hint is type(None):
        return None if value is None else _MISSING
    if hint in (bool, int, str):
        return value if type(value) is hint else _MISSING
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if number else _MISSING
    if hint is Path:
        return Path(value) if isinstance(value, (str, Path)) else _MISSING
    cls = origin or hint
    if isinstance(cls, type) and issubclass(cls, Config):
        return _config(cls, value, before)
    if isinstance(value, Mapping) and "reference" in value:
        raise ConfigError(
            f"{place} was an object ({value['reference']}), which the record only refers to; "
            f"pass it again"
        )
    if isinstance(value, Mapping) and hasattr(cls, "from_dict"):
        return cls.from_dict(value)
    return value if not isinstance(cls, type) or isinstance(value, cls) else _MISSING


def _one_of(options: tuple[Any, ...], value: Any, place: str, before: Any) -> Any:
    """The first option that takes the value as it is, else the first that can convert it."""
    exact = [o for o in options if isinstance(o, type) and type(value) is o and o is not float]
    for option in [*exact, *options]:
        found = _fit(option, value, place, before)
        if found is not _MISSING:
            return found
    return _MISSING


def _tuple(args: tuple[Any, ...], value: Any, place: str) -> Any:
    """A tuple from a tuple or a list; a single number or text where any number of them may
    stand.
    """
    several = len(args) == 2 and args[1] is Ellipsis
    if not isinstance(value, (list, tuple, range)):
        if not several or isinstance(value, Mapping) or value is None:
            return _MISSING
        one = _fit(args[0], value, place, _MISSING)
        return _MISSING if one is _MISSING else (one,)
    parts = args[:1] * len(value) if several else args
    if len(parts) != len(value):
        return _MISSING
    found = tuple(_fit(part, item, place, _MISSING) for part, item in zip(parts, value))
    return _MISSING if any(item is _MISSING for item in found) else found


def _config(cls: type[Config], value: Any, before: Any) -> Any:
    if isinstance(value, cls):
        return value
    if isinstance(value, str) or (isinstance(value, Mapping) and "reference" not in value):
        return cls.from_dict(value, base=before if isinstance(before, cls) else None)
    return _MISSING


def _say(hint: Any) -> str:
    """A type in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_say(arg) for arg in args)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple:
        several = len(args) == 2 and args[1] is Ellipsis
        return f"a list of {_several(args[0])}" if several else f"({', '.join(map(_say, args))})"
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "None",
    }
    if hint in words:
        return words[hint]
    if isinstance(hint, type) and issubclass(hint, Config):
        return f"a {getattr(hint, 'family', hint.__name__)} ({', '.join(kinds(hint))})"
    return getattr(hint, "__name__", str(hint))


def _several(hint: Any) -> str:
    """A type in words, in the plural."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    words = {int: "whole numbers", float: "numbers", str: "texts"}
    if all(option in words for option in options):
        return " or ".join(words[option] for option in options)
    return f"any number of: {_say(hint)}"


def _got(value: Any) -> str:
    """What came instead, with its type."""
    return "nothing" if value is None else f"{type(value).__name__} {_short(value)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
