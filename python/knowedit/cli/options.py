"""The options that commands share, in groups (a dataclass each, see `commands.spread`), and what is
made of them.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowedit.cli.commands import (
    EDIT,
    Config,
    EitherSettings,
    OptionSettings,
    method_settings,
)
from knowedit.errors import KnowEditError
from knowedit.io.lines import printable

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit
    from knowedit.io.ranks import Ranks
    from knowedit.methods.base import Method
    from knowedit.models.editable import EditableModel


def hush(asked: bool) -> bool:
    """Show no notes and bars from here on, or show them."""
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
        callback=method_settings,
        help='A setting of the method: metric.gain=0.95, steps=20, modules=["q_proj"]; repeatable.',
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
        min=1, help="Keys to sum for the statistics; default: 64 for each of a key's dimensions."
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
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Stop at a record of a public set that cannot be edited; else it is left out, and "
        "named in a note.",
    ),
]
Join = Annotated[
    str | None,
    typer.Option(
        help="What stands between prompts and answers: none, blank or line; default: what each "
        "fact says, or as they would be written."
    ),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="The prompts are the user's turns in the model's chat.")
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Of all random numbers: the methods', those of the statistics' corpus (the order of a "
        "hub data set, the model's own samples; files are read in order), the intervals'.",
        show_default="0",
    ),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (as saved).")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="As in transformers: cpu, cuda, auto (layers spread over GPUs); default: the GPU, if "
        "any."
    ),
]
Dequantise = Annotated[
    bool,
    typer.Option(
        "--dequantise",
        help="Open a checkpoint with quantised weights as the floats that they stand for.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=hush, help="Show the result only: no notes, no bars."),
]
Folder = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder for the results, read by `knowedit report`."),
]


def json_text(record: Any) -> str:
    """JSON that every program reads: a number that is none (NaN) or infinite is null."""
    return json.dumps(_finite(record), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Output:
    """How every command that does something shows it."""

    as_json: Json = False
    quiet: Quiet = False

    def show(self, record: Any, text: Callable[[], Any]) -> None:
        """Print the result: `record` with --json, else `text()`."""
        print(json_text(record) if self.as_json else printable(str(text())))


@dataclass(frozen=True)
class Loading(Output):
    """And how one that needs a model loads it."""

    dtype: Dtype = "auto"
    device_map: DeviceMap = None
    dequantise: Dequantise = False

    def load(self, model: str) -> EditableModel:
        """Load the model. Raises ModelError."""
        from knowedit.models.load import load_model

        return load_model(
            model,
            dtype=self.dtype,
            device_map=placed(self.device_map),
            dequantise=self.dequantise,
            say=say,
        )

    def words(self) -> list[str]:
        """The options that load the same model again."""
        given = {"--dtype": self.dtype, "--device-map": self.device_map}
        words = [w for o, v in given.items() if v not in (None, "auto") for w in (o, v)]
        return [*words, *(["--dequantise"] if self.dequantise else [])]


@dataclass(frozen=True)
class Run(Loading):
    """What every command that computes takes."""

    settings: OptionSettings = None
    config: Config = None
    seed: Seed = None


@dataclass(frozen=True)
class EitherRun(Run):
    """What every command takes that runs a method of its own: --set reaches that too."""

    settings: EitherSettings = None


@dataclass(frozen=True)
class MethodRun(Run):
    """What every command that computes edits takes."""

    method: Methods = field(default_factory=lambda: ["memit"])
    settings: Settings = None
    corpus: MethodsCorpus = None
    tokens: Tokens = None
    statistics: Statistics = None
    layers: Layers = None

    def methods(self) -> list[Method]:
        """The methods, as `parse_methods`."""
        return parse_methods(self.method, self.settings, self.layers, self.seed)


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
    Where a seed is given, a note says which method uses no random numbers.

    Raises:
        KnowEditError: several names in one; ConfigError: an unknown method or setting.
    """
    from knowedit.methods.registry import make_method

    chosen, made = parse_layers(layers), []
    for text in given:
        if not text.startswith("{") and "," in text:
            one_by_one = " ".join(f"--method {name}" for name in text.split(","))
            raise KnowEditError(f"--method takes one name; repeat it: {one_by_one}")
        method = make_method(_record(text) if text.startswith("{") else text, settings or ())
        if chosen is not None:
            method = method.with_settings({"layers": chosen})
        made.append(method if seed is None else seeded(method, seed))
    return made


def _record(text: str) -> dict[str, Any]:
    """A method's record. Raises KnowEditError for what is not JSON."""
    try:
        found: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise KnowEditError(
            f"--method {text!r} begins like a record and is not JSON ({error}); quote it for the "
            "shell, or write it into a file and give --config FILE"
        ) from None
    return found


def seeded(method: Method, seed: int) -> Method:
    """The method with this seed, in whichever of its parts draw random numbers; a note says where
    neither it nor its statistics do.
    """
    places = method.seeds()
    if not places and not method.needs_statistics:
        say(f"note: {method.name} draws no random numbers; --seed does not change its edits")
    return method.with_settings(dict.fromkeys(places, seed))


def edit_of(ctx: typer.Context) -> Edit | None:
    """The edit that `--config` named, if it named one."""
    return ctx.meta.get(EDIT)


def placed(device_map: str | None) -> Any:
    """What `load_model` takes for --device-map: this process' own GPU, where there is one and
    nothing else was said.
    """
    from knowedit.io.ranks import Ranks

    if device_map is None:
        return Ranks.current().device
    return None if device_map == "cpu" else device_map


@contextmanager
def in_ranks() -> Iterator[Ranks]:
    """The processes of torchrun, or this one alone, working as one: only the first one speaks, but
    for an error that the others do not have.
    """
    from knowedit.io.ranks import under_torchrun

    with under_torchrun() as ranks, ExitStack() as silence:
        if ranks.rank > 0:
            hush(True)
            silence.enter_context(redirect_stdout(StringIO()))
            logging.disable(logging.WARNING)
            silence.callback(logging.disable, logging.NOTSET)
        try:
            yield ranks
        except KeyboardInterrupt as stop:
            raise SystemExit(130) if ranks.rank > 0 else stop from None
        except (KnowEditError, OSError) as error:
            if ranks.rank > 0 and getattr(error, "everywhere", False):
                raise SystemExit(1) from error
            raise


def one(corpus: list[str] | None) -> Any:
    """A corpus as `documents` takes it; None where none was named."""
    return corpus[0] if corpus and len(corpus) == 1 else corpus


GO_ON = "run the same command again to go on"
AGAIN = "run the same command again"
STATISTICS = "finished key statistics are kept"


def kept_so_far(folder: Path | None, count: int, what: str) -> str:
    """What Ctrl-C says of a command that writes the results of so many methods, rows or runs to
    --output as they come.
    """
    if folder is None:
        return (
            f"no result was written, {STATISTICS}; with -o FOLDER results are written as they "
            "come, and the same command goes on"
        )
    results = f"the results of {count} {what}{'s' * (count != 1)} are"
    return f"{results if count else 'no results are yet'} in {folder}, {STATISTICS}; {GO_ON}"


def kept_at_the_end(folder: Path | None, statistics: bool = True) -> str:
    """What it says of one that writes --output, if given, when all is measured."""
    where = "" if folder is None else f" to {folder}, which is done at the end"
    kept = f"; {STATISTICS}" if statistics else ""
    return f"no result was written{where}{kept}; {AGAIN} to start over"


def command_line(*words: Any) -> str:
    """A command to copy: `knowedit` and these words, quoted as a shell needs them."""
    return shlex.join(["knowedit", *map(str, words)])


def say(text: str) -> None:
    """Print a note to standard error, unless --quiet."""
    from knowedit.io import progress

    if not progress.console.quiet:
        print(printable(text), file=sys.stderr)
