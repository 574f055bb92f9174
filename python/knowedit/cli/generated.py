"""Options made from the fields of a dataclass of settings: types, defaults, and help from its
docstring.

A field of a nested part is an option of its own name, and sets every part that has it; `--set
part.field=value` sets one. What is no number, text or switch, and what has the name of an option of
an earlier version, is set by `--set` alone.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Annotated, Any, ClassVar, TypeVar

import typer
from typer.main import get_command

from knowedit.cli.commands import OLD, Command
from knowedit.io.config import Config, fields_of, paths_of

SETTINGS = "knowedit.settings"  # what was given, in a context's `meta`, by field
Settings = TypeVar("Settings", bound=Config)


class ConfigCommand(Command):
    """A command with the fields of `config` ("module:Class") as options, but for those `without`;
    it finds what was given in `ctx.meta[SETTINGS]`. The module is imported when the options are
    asked for.
    """

    config: ClassVar[str]
    without: ClassVar[tuple[str, ...]] = ()

    def get_params(self, ctx: Any) -> list[Any]:
        own = super().get_params(ctx)
        taken = {str(param.name) for param in own} | set(self.without)
        module, _, name = self.config.partition(":")
        made = options_of(getattr(import_module(module), name)())
        return [*own[:-1], *(o for o in made if o.name not in taken), *own[-1:]]  # --help is last

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        left = super().parse_args(ctx, args)
        own = {str(param.name) for param in self.params}
        given = {name: ctx.params.pop(name) for name in set(ctx.params) - own}
        ctx.meta[SETTINGS] = {name: value for name, value in given.items() if value is not None}
        return left


def command(config: str, without: tuple[str, ...] = ()) -> type[ConfigCommand]:
    """The class of a command with the fields of `config` as options, but for those `without`."""
    return type("ConfigCommand", (ConfigCommand,), {"config": config, "without": without})


def options_of(settings: Any) -> list[Any]:
    """An option a field of `settings`, an instance with the defaults, and of its parts."""
    found: dict[str, tuple[type, str, list[str]]] = {}
    for path, value, hint, text in _leaves(settings):
        name = path.rpartition(".")[2]
        if f"--{name.replace('_', '-')}" in OLD or (kind := _plain(hint)) is None:
            continue
        part = f"{path.rpartition('.')[0]}: " if "." in path else ""
        shown = "none" if value is None else str(value)
        kind, help_, defaults = found.get(name, (kind, text, []))
        found[name] = kind, help_, [*defaults, f"{part}{shown}"]
    options = {name: _option(name, *about) for name, about in found.items()}

    def fields() -> None: ...

    fields.__annotations__ = options
    fields.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what typer reads
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
            for name, option in options.items()
        ]
    )
    alone = typer.Typer(add_completion=False)
    alone.command()(fields)
    return list(get_command(alone).params)


def _option(name: str, kind: type, text: str, defaults: list[str]) -> Any:
    """The annotation of typer for it."""
    spelled = f"--{name.replace('_', '-')}"
    if kind is bool:
        spelled += f"/--no-{name.replace('_', '-')}"
    return Annotated[
        kind | None, typer.Option(spelled, help=text, show_default=", ".join(defaults))
    ]


def changed(settings: Settings, given: dict[str, Any], named: Sequence[str] = ()) -> Settings:
    """`settings` with the options that were given, each in every part that has it, and with
    `name=value` of `--set`.

    Raises ConfigError.
    """
    every = {
        path: given[name]
        for path in paths_of(settings)
        if (name := path.rpartition(".")[2]) in given
    }
    return settings.with_settings(every).with_settings(named)


def _leaves(settings: Any, path: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Path, value, type and help of every field that is no part."""
    texts = attribute_help(type(settings))
    for name, hint in fields_of(type(settings)).items():
        value = getattr(settings, name)
        if isinstance(value, Config):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield path + name, value, hint, texts.get(name, "")


def _plain(hint: Any) -> type | None:
    """The type of one number, text or switch; None for anything else."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    kinds = [option for option in options if option is not type(None)]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (int, float, bool, str) else None


def attribute_help(cls: type) -> dict[str, str]:
    """`{field: sentence}` of the docstring's section "Attributes"."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    texts: dict[str, str] = {}
    for names, text in entries:
        sentence = " ".join(text.split())
        texts |= dict.fromkeys(names.split(", "), sentence[:1].upper() + sentence[1:])
    return texts
