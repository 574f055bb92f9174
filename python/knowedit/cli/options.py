"""What the commands share: their options, old spellings, `--config` and `--set`, and what is made
of them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from knowedit.errors import ConfigError, KnowEditError
from knowedit.io.config import parse_setting
from knowedit.io.names import nearest

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit
    from knowedit.methods.base import Method

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
}
EDIT, SWEEP = "knowedit.edit", "knowedit.sweep"  # what --config leaves in a context's `meta`


class Command(TyperCommand):
    """A command that answers options of earlier versions with today's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for param in self.get_params(ctx) for name in param.opts}
        for word in args:
            name = word.partition("=")[0]
            if word == "--":
                break
            if name in OLD and name not in own:
                raise KnowEditError(f"{name} is now {OLD[name]}; see {ctx.command_path} --help")
        return super().parse_args(ctx, args)


class App(typer.Typer):
    """A group of `Command`s."""

    def command(self, name: str | None = None, **others: Any) -> Callable[[Any], Any]:
        def decorate(function: Any) -> Any:
            text = " ".join((function.__doc__ or "").split())  # typer would keep its line breaks
            made = {"cls": Command, "help": text, **others}
            return super(App, self).command(name, **made)(function)

        return decorate


def _from_file(ctx: typer.Context, path: Path | None) -> Path | None:
    """`--config`: what the file says is the default of the command's options."""
    if path is None:
        return None
    known: dict[str, Any] = {}
    for param in ctx.command.get_params(ctx):
        spelled = [o.lstrip("-").replace("-", "_") for o in param.opts if o.startswith("--")]
        known |= dict.fromkeys(spelled or [str(param.name)], param)
    record = _read(ctx, path, "method" in known)
    if "methods" in record or "grid" in record:
        ctx.meta[SWEEP] = path
        return path
    for key, value in record.items():
        name = str(key).replace("-", "_")
        if name not in known:
            if EDIT in ctx.meta:
                continue  # an edit knows more than some commands ask for
            raise ConfigError(
                f"{path}: {ctx.command_path} has no option {key!r}; {nearest(name, known)}"
            )
        option = known[name]
        if name == "set" and isinstance(value, Mapping):
            value = [f"{setting}={json.dumps(of)}" for setting, of in value.items()]
        parts = value if isinstance(value, list) else [value]
        parts = [json.dumps(part) if isinstance(part, Mapping) else part for part in parts]
        several = getattr(option, "multiple", False)
        if not several and len(parts) != 1:
            raise ConfigError(f"{path}: {key} is one value, got {value!r}")
        ctx.default_map = {
            **(ctx.default_map or {}),
            str(option.name): [str(part) for part in parts] if several else parts[0],
        }
    return path


def _read(ctx: typer.Context, path: Path, has_method: bool) -> dict[str, Any]:
    """Options from a YAML or JSON file, or from the record in an edit file."""
    if path.suffix in (".yaml", ".yml", ".json"):
        import yaml

        try:
            record = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: neither YAML nor JSON ({error})") from None
        if not isinstance(record, Mapping):
            raise ConfigError(f"{path}: expected names and values, got {type(record).__name__}")
        return {"method": dict(record)} if "kind" in record and has_method else dict(record)
    from knowedit.edits.edit import Edit

    edit = ctx.meta[EDIT] = Edit.load(path)
    if not edit.config:
        raise ConfigError(f"{path} does not record how it was made; it is of an earlier version")
    return {"facts": str(path), **edit.report.details.get("run", {}), "method": edit.config}


def _as_options(ctx: typer.Context, given: list[str] | None) -> list[str] | None:
    """`--set` of commands without a method: other options by name."""
    for text in given or ():
        name, value = parse_setting(text)
        known = {str(p.name): p for p in ctx.command.get_params(ctx)}
        name = name.replace("-", "_")
        if name not in known:
            raise ConfigError(f"{ctx.command_path} has no setting {name!r}; {nearest(name, known)}")
        several = getattr(known[name], "multiple", False)
        ctx.default_map = {**(ctx.default_map or {}), name: [str(value)] if several else value}
    return given


def _quiet(asked: bool) -> bool:
    from knowedit.io import progress

    progress.console.quiet = asked
    return asked


Model = Annotated[str, typer.Argument(help="A hub id or a folder.")]
Methods = Annotated[
    list[str],
    typer.Option("--method", help="A name of `knowedit methods`, or a record; repeatable."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help='A setting of the method: metric.gain=0.95, steps=20, modules=["q_proj"]; repeatable.',
    ),
]
OptionSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        is_eager=True,
        callback=_as_options,
        help="An option by name, as name=value; repeatable.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_from_file,
        help="Options from a .yaml or .json file, a method's record, or an edit file; the command "
        "line wins.",
    ),
]
_CORPUS = (
    "A .txt/.jsonl/.parquet(.gz) file, 'wikipedia', 'hf:owner/name' or 'self' (the model's own "
    "samples); repeatable."
)
Corpus = Annotated[list[str], typer.Option(help=_CORPUS)]
MethodsCorpus = Annotated[
    list[str] | None,
    typer.Option("--corpus", help=_CORPUS, show_default="wikipedia, neuron-patch: self"),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        help="Keys to sum for the statistics; default: 64 for each of a key's dimensions."
    ),
]
Statistics = Annotated[
    Path | None,
    typer.Option(
        help="A file or folder of `knowedit stats` (collected or imported) instead of --corpus."
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layer", help="A layer, or a range such as 4-8; repeatable. Default: the preset's."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first so many.")]
Seed = Annotated[int | None, typer.Option(help="Of everything random.", show_default="0")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (as saved).")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="As in transformers: cpu, cuda, auto (layers spread over GPUs); default: the GPU, if "
        "any."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=_quiet, help="Show the result only: no notes, no bars."),
]
Folder = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder for the results, read by `knowedit report`."),
]


def parse_layers(given: Sequence[str] | None) -> tuple[int, ...] | None:
    """`["5"]`, `["4-8"]` or `["4", "6"]` as layer numbers; None where none is given.

    Raises KnowEditError.
    """
    layers: set[int] = set()
    for text in given or ():
        if "," in text:
            raise KnowEditError(f"--layer {text!r}: repeat it, as in --layer 4 --layer 6")
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        first, last = (int(n or numbers[1]) for n in numbers.groups()) if numbers else (1, 0)
        if first > last:
            raise KnowEditError(f"--layer {text!r}: give a number like 5 or a range like 4-8")
        layers.update(range(first, last + 1))
    return tuple(sorted(layers)) or None


def parse_methods(
    given: Sequence[str],
    settings: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    seed: int | None = None,
) -> list[Method]:
    """Methods from names or JSON records, each with the settings, layers and seed that were given.

    Raises:
        KnowEditError: several names in one; ConfigError: an unknown method or setting.
    """
    from knowedit.io.config import Config, fields_of
    from knowedit.methods.registry import make_method

    made = []
    for text in given:
        if not text.startswith("{") and "," in text:
            one_by_one = " ".join(f"--method {name}" for name in text.split(","))
            raise KnowEditError(f"--method takes one name; repeat it: {one_by_one}")
        method = make_method(json.loads(text) if text.startswith("{") else text, settings or ())
        if (chosen := parse_layers(layers)) is not None:
            method = method.with_settings({"layers": chosen})
        parts = [getattr(method, name) for name in fields_of(type(method))]
        seeded = [method, *(part for part in parts if isinstance(part, Config))]
        if seed is not None and any("seed" in fields_of(type(part)) for part in seeded):
            method = method.with_settings({"seed": seed})
        made.append(method)
    return made


def edit_of(ctx: typer.Context) -> Edit | None:
    """The edit that `--config` named, if it named one."""
    return ctx.meta.get(EDIT)


def placed(device_map: str | None) -> Any:
    """What `load_model` takes for --device-map: this process' own GPU, where there is one and
    nothing else was said.
    """
    from knowedit.statistics.distributed.ranks import Ranks

    if device_map is None:
        return Ranks.current().device
    return None if device_map == "cpu" else device_map


def one(corpus: list[str] | None) -> Any:
    """A corpus as `documents` takes it; None where none was named."""
    return corpus[0] if corpus and len(corpus) == 1 else corpus


def say(text: str) -> None:
    """Print a note to standard error, unless --quiet."""
    from knowedit.io import progress

    if not progress.console.quiet:
        print(text, file=sys.stderr)
