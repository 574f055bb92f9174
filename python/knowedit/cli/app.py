"""The `knowedit` command: what `main` catches, and the groups of commands."""

from __future__ import annotations

import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from knowedit.cli import edit, evaluate, lists, measure, stats, study, train
from knowedit.cli.options import App, Config, Corpus, Json, OptionSettings, Quiet, one
from knowedit.errors import KnowEditError
from knowedit.io.tables import Table
from knowedit.models.download import DEFAULT_MODEL

app = App(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Change single facts inside a language model, see what moved, and take it back bit for "
    "bit.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"knowedit {version('knowedit-kernels')}")
        raise typer.Exit


@app.callback()
def shared(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and end.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs.")] = False,
) -> None:
    """What every command has in common."""
    logging.getLogger("knowedit").setLevel(logging.INFO if verbose else logging.NOTSET)


def main() -> None:
    """Run the command line; errors a user can mend end with one line and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        app(prog_name="knowedit")
    except KnowEditError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        said = f"error: {error.strerror or error}: {error.filename or ''}"
        print(said.rstrip(": "), file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(
            "interrupted; what was checkpointed is kept, run the same command to go on",
            file=sys.stderr,
        )
        raise SystemExit(130) from None


@app.command()
def demo(
    model: Annotated[str, typer.Argument(help="A hub id or a folder.")] = DEFAULT_MODEL,
    corpus: Corpus = ["self"],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Keys to sum for the statistics.")] = 16_384,
    settings: OptionSettings = None,
    config: Config = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the page demo.html there.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Edit six facts of a real language model, show what changed and what did not, and undo it bit
    for bit.
    """
    from knowedit.cli.demo import run

    run(model, one(corpus), tokens, output)


for _group in (edit, evaluate, measure):
    app.add_typer(_group.app)
app.add_typer(stats.app, name="stats")
app.add_typer(train.app, name="train")
app.add_typer(study.app, name="study")
app.add_typer(lists.app)


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="An edit, a statistics file, or an edited model's folder.")
    ],
) -> None:
    """Say what a file of ours holds: method, facts, layers, norms, the model it belongs to."""
    from knowedit.cli.inspection import describe

    print(describe(path))


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Also check this model.")] = None,
    as_json: Json = False,
) -> None:
    """What hardware is here, which kernels will run, why not the others, and whether a model can be
    edited.
    """
    from knowedit.cli.inspection import diagnose

    report = diagnose(model)
    if as_json:
        print(json.dumps(report))
        return
    tables = [
        Table([section, ""], [(name, str(value)) for name, value in entries.items()])
        for section, entries in report.items()
    ]
    print("\n\n".join(map(str, tables)))
