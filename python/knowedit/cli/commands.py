"""How a command line is read: groups of commands, old spellings, `--config` and `--set`, options
that commands share, and errors in one line.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from knowedit.cli import recorded
from knowedit.errors import ConfigError, KnowEditError
from knowedit.io.config import parse_setting
from knowedit.io.documents import read_document
from knowedit.io.files import is_safetensors
from knowedit.io.names import nearest

#: Options of earlier versions, and what says the same now.
OLD = {
    "--edits": "--limit",
    "--facts": "--limit for how many, --dataset for which",
    "--subjects": "--limit",
    "--prompts": "--limit",
    "--methods": "--method, once for each method",
    "--layers": "--layer, once for each layer or range",
    "--kinds": "--kind, once for each",
    "--targets": "--target, once for each",
    "--seeds": "--halvings",
    "--setting": "--set",
    "--gain": "--set gain=VALUE",
    "--weight": "--set weight=VALUE",
    "--merge": "--set merge_subjects=true",
    "--no-merge": "--set merge_subjects=false",
    "--batch-tokens": "--budget",
    "--pack": "--packed",
    "--no-pack": "--no-packed",
}
EDIT, SWEEP = "knowedit.edit", "knowedit.sweep"  # what --config leaves in a context's `meta`
FILE, SET = "knowedit.config", "knowedit.set"  # defaults from --config and --set, by parameter
FILE_SET = "knowedit.config.set"  # what --config says under `set`, as --set takes it

#: What every error of the parser is. Typer brings its own copy of click or not, as its version has
#: it; this is the class in both.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Interrupted(Exception):
    """Ctrl-C, which typer would end without a word; its text is what is kept."""


class Command(TyperCommand):
    """A command that answers options of earlier versions with today's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for param in self.get_params(ctx) for name in param.opts + param.secondary_opts}
        for word in args:
            name = word.partition("=")[0]
            if word == "--":
                break
            if name in OLD and name not in own:
                raise KnowEditError(f"{name} is now {OLD[name]}; see {ctx.command_path} --help")
        given = self.make_parser(ctx).parse_args(args=list(args))[0]
        if given.get("config") and not ctx.resilient_parsing:
            read_config(ctx, Path(given["config"]))  # before any option: it says their defaults
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    """Commands under one word; alone it shows its help, and a wrong name gets the nearest one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"there is no command {args[0]!r}; {nearest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Interrupted(*stop.args) from None


class App(typer.Typer):
    """A group of `Command`s."""

    def __init__(self, **others: Any) -> None:
        super().__init__(**{"cls": Group, **others})

    def command(self, name: str | None = None, **others: Any) -> Callable[[Any], Any]:
        def decorate(function: Any) -> Any:
            text = " ".join((function.__doc__ or "").split())  # typer would keep its line breaks
            made = {"cls": Command, "help": text, **others}
            super(App, self).command(name, **made)(spread(function))
            return function

        return decorate


def spread(function: Callable[..., None]) -> Callable[..., None]:
    """`function`, whose last parameter is a dataclass of options, as typer reads it: with a
    parameter for each of the fields instead. Any other function as it is.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or not dataclasses.is_dataclass(hints[parameters[-1].name]):
        return function
    shared: type = hints[parameters[-1].name]
    *own, last = [p.replace(annotation=hints[p.name]) for p in parameters]
    types = typing.get_type_hints(shared, include_extras=True)
    by_name = {field.name: field for field in dataclasses.fields(shared)}
    # what is special comes first: the fields of the class itself, then those of its bases
    order = (name for cls in shared.__mro__ for name in inspect.get_annotations(cls))
    fields = {name: by_name[name] for name in dict.fromkeys(order)}

    @functools.wraps(function)
    def with_options(**given: Any) -> None:
        options = {name: given.pop(name) for name in fields}
        function(**given, **{last.name: shared(**options)})

    made = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory(),
            annotation=types[name],
        )
        for name, field in fields.items()
    ]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    with_options.__signature__ = inspect.Signature([*own, *made])  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in [*own, *made]}
    del with_options.__wrapped__  # typer would read the signature of that
    return with_options


def usage(error: Any) -> str:
    """An error of the parser in one line, with the nearest option where one is not known."""
    ctx, name = error.ctx, getattr(error, "option_name", None)
    if ctx is None:
        return str(error.format_message())
    if name is not None and hasattr(error, "possibilities"):
        options = [p for p in ctx.command.get_params(ctx) if p.param_type_name == "option"]
        known = [name for p in options for name in (*p.opts, *p.secondary_opts)]
        return f"{ctx.command_path} has no option {name}; {nearest(name, known)}"
    said = " ".join(error.format_message().split()).rstrip(".")
    return f"{said[:1].lower()}{said[1:]}; see {ctx.command_path} --help"


# -- --config and --set ---------------------------------------------------------------------------


def read_config(ctx: typer.Context, path: Path) -> None:
    """`--config`: what the file says is the default of the command's options, and goes before what
    `--set` says.
    """
    known = _options(ctx)
    record = _read(ctx, path, "method" in known)
    if "methods" in record or "grid" in record:
        ctx.meta[SWEEP] = path
        return
    for key, value in record.items():
        name = str(key).replace("-", "_")
        if name not in known:
            if EDIT in ctx.meta:
                continue  # an edit knows more than some commands ask for
            raise ConfigError(
                f"{path}: {ctx.command_path} has no option {key!r}; {nearest(name, known)}"
            )
        if name == "set":
            ctx.meta[FILE_SET] = _settings(value, f"{path}: {key}")
        else:
            _set_default(ctx, FILE, known[name], value, f"{path}: {key}")


def _settings(value: Any, place: str) -> list[str]:
    """What a file says under `set`, names and values or a list of `name=value`, as the list."""
    if isinstance(value, Mapping):
        return [f"{name}={json.dumps(of)}" for name, of in value.items()]
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{place} must be names and values, or name=value, got {value!r}")
    return texts


def method_settings(ctx: typer.Context, given: list[str] | None) -> list[str]:
    """`--set` of commands whose settings are a method's: the file's, then the command line's."""
    return [*ctx.meta.get(FILE_SET, ()), *(given or ())]


def option_settings(ctx: typer.Context, given: list[str] | None) -> list[str]:
    """`--set` of commands that run no method: their other options by name."""
    for text in (others := either_settings(ctx, given)):
        name, known = parse_setting(text)[0], _options(ctx)
        raise ConfigError(f"{ctx.command_path} has no setting {name!r}; {nearest(name, known)}")
    return others


def either_settings(ctx: typer.Context, given: list[str] | None) -> list[str]:
    """`--set` of commands that run a method of their own: their other options by name. Returns
    what names none of them: the settings of the method.
    """
    known, others = _options(ctx), []
    for source in (ctx.meta.get(FILE_SET, ()), given or ()):
        settings: dict[str, Any] = {}
        for text in source:
            name, value = parse_setting(text)
            option = name.replace("-", "_")
            if option not in known:
                others.append(text)
                continue
            if getattr(known[option], "multiple", False):  # repeatable, as the option is
                more = value if isinstance(value, list) else [value]
                value = [*settings.get(option, []), *more]
            settings[option] = value
            _set_default(ctx, SET, known[option], value, f"--set {option}")
    return others


def _options(ctx: typer.Context) -> dict[str, Any]:
    """The parameters of the command by name, as the command line spells them."""
    known: dict[str, Any] = {}
    for param in ctx.command.get_params(ctx):
        spelled = [o.lstrip("-").replace("-", "_") for o in param.opts if o.startswith("--")]
        known |= dict.fromkeys(spelled or [str(param.name)], param)
    return known


def _set_default(ctx: typer.Context, source: str, option: Any, value: Any, place: str) -> None:
    """Make `value` the default of an option; what --set says goes before what a file says."""
    parts = value if isinstance(value, list) else [value]
    parts = [json.dumps(part) if isinstance(part, Mapping) else part for part in parts]
    several = getattr(option, "multiple", False)
    if not several and len(parts) != 1:
        raise ConfigError(f"{place} is one value, got {value!r}")
    ctx.meta.setdefault(source, {})[str(option.name)] = (
        [str(part) for part in parts] if several else parts[0]
    )
    ctx.default_map = {**ctx.meta.get(FILE, {}), **ctx.meta.get(SET, {})}


def _read(ctx: typer.Context, path: Path, has_method: bool) -> dict[str, Any]:
    """Options from a YAML or JSON file, or from the record in an edit file."""
    if path.suffix in (".yaml", ".yml", ".json") and not is_safetensors(path):
        record = read_document(path)
        if record is None:
            raise ConfigError(f"{path} is empty; write options into it, such as method: memit")
        if not isinstance(record, Mapping):
            raise ConfigError(f"{path}: expected names and values, got {type(record).__name__}")
        return {"method": dict(record)} if "kind" in record and has_method else dict(record)
    from knowedit.edits.edit import Edit

    edit = ctx.meta[EDIT] = Edit.load(path)
    if not edit.config:
        raise ConfigError(f"{path} does not record how it was made; it is of an earlier version")
    options = recorded.found(edit.report.details.get("run", {}), path)
    return {"facts": str(path), **options, "method": edit.config}


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Options from a .yaml or .json file, a method's record, or an edit file; the command "
        "line wins.",
    ),
]
OptionSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        is_eager=True,
        callback=option_settings,
        help="An option by name, as name=value; repeatable.",
    ),
]
EitherSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        is_eager=True,
        callback=either_settings,
        help="An option by name, else a setting of the method that is run here, as name=value; "
        "repeatable.",
    ),
]
