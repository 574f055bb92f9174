"""The `knowedit` command: what `main` catches, and the groups of commands."""

from __future__ import annotations

import logging
import shutil
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from knowedit.cli import (
    edit,
    evaluate,
    lists,
    measure,
    recommend,
    session,
    stats,
    study,
    train,
    trial,
)
from knowedit.cli.commands import App, Interrupted, UsageError, usage
from knowedit.cli.options import (
    AGAIN,
    Corpus,
    EitherRun,
    Output,
    Strict,
    kept_at_the_end,
    one,
    parse_methods,
    say,
)
from knowedit.errors import KnowEditError, Terminated
from knowedit.io.lines import printable
from knowedit.io.progress import kept_on_interrupt
from knowedit.io.tables import Table
from knowedit.models.download import DEFAULT_MODEL

app = App(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
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
    """Run the command line. What a user can mend ends with one line: exit code 1, or 2 for a
    command line that cannot be read.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(prog_name="knowedit", standalone_mode=False)
        if code == 130:  # typer's own word for an interruption while a command line is read
            raise KeyboardInterrupt
    except Terminated as stop:
        _end(f"interrupted: {stop}", 130)
    except KnowEditError as error:
        _end(f"error: {error}", 1)
    except UsageError as error:
        _end(f"error: {usage(error)}", 2)
    except OSError as error:
        _end(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), 1)
    except (Interrupted, KeyboardInterrupt) as stop:
        _end(f"interrupted: {str(stop) or f'nothing was written; {AGAIN}'}", 130)
    except Exception as error:
        if logging.getLogger("knowedit").level == logging.INFO:
            raise
        _end(_unforeseen(error), 1)
    raise SystemExit(code or 0)


class _Printable(logging.Formatter):
    """Warnings name what is in files, too."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _terminated(*_: object) -> NoReturn:
    """What schedulers send ends a command as Ctrl-C does: with everything put in order."""
    raise KeyboardInterrupt


def _unforeseen(error: Exception) -> str:
    """One line for an error of another library, or of a mistake of ours."""
    if type(error).__name__ == "DispatchError":  # the kernels', which says all there is to say
        return f"error: {error}"
    said = " ".join(str(error).split())[:400]
    return (
        f"error: {type(error).__name__}: {said}; this was not foreseen: see where with `knowedit "
        "--verbose ...`, and please report it"
    )


def _end(text: str, code: int) -> NoReturn:
    print(printable(text), file=sys.stderr)
    raise SystemExit(code)


@app.command()
def demo(
    model: Annotated[str, typer.Argument(help="A hub id or a folder.")] = DEFAULT_MODEL,
    method: Annotated[
        str, typer.Option("--method", help="A name of `knowedit methods`.")
    ] = "neuron-patch",
    corpus: Corpus = ["self"],  # noqa: B006
    tokens: Annotated[
        int, typer.Option(min=1, help="Of ordinary text to read, if the method needs any.")
    ] = 16_384,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the page demo.html there.")
    ] = None,
    *,
    run: EitherRun,
) -> None:
    """Edit six facts of a real language model, show what changed and what did not, and undo it bit
    for bit.
    """
    from knowedit.cli.demo import demonstrate

    (chosen,) = parse_methods([method], run.settings, seed=run.seed)
    seed = run.seed or 0
    with kept_on_interrupt(lambda: kept_at_the_end(output)):
        shown = demonstrate(run.load(model), chosen, one(corpus), tokens, seed=seed, say=say)
    run.show(shown.to_dict(), lambda: shown.text(shutil.get_terminal_size().columns))
    if output is not None:
        say(f"wrote {shown.write(output)}")


for _group in (edit, evaluate, recommend, trial, measure):
    app.add_typer(_group.app)
app.add_typer(session.app, name="session")
app.add_typer(stats.app, name="stats")
app.add_typer(train.app, name="train")
app.add_typer(study.app, name="study")
app.add_typer(lists.app)


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(help="An edit, statistics, facts, or an edited model's folder."),
    ],
    strict: Strict = False,
    *,
    output: Output,
) -> None:
    """Say what a file of ours holds: method, facts, layers, norms, the model it belongs to."""
    from knowedit.cli.inspection import describe

    seen = describe(path, strict)
    output.show(seen.to_dict(), lambda: printable(seen.text))


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Also check this model.")] = None,
    *,
    output: Output,
) -> None:
    """What hardware is here, which kernels will run, why not the others, and whether a model can be
    edited.
    """
    from knowedit.cli.doctor import diagnose

    report = diagnose(model)
    tables = [
        Table([section, ""], [(name, str(value)) for name, value in entries.items()])
        for section, entries in report.items()
    ]
    output.show(report, lambda: "\n\n".join(map(str, tables)))
