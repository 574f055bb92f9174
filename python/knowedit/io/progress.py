"""Progress bars: shown on a terminal, silent elsewhere, never in the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)


class Advance(Protocol):
    """Moves a bar on by `amount`, and shows `note` behind it until another one is given."""

    def __call__(self, amount: float = 1, note: str | None = None) -> None: ...


@contextmanager
def bar(title: str, total: float, unit: str = "", *, show: bool = True) -> Iterator[Advance]:
    """Yield the function that moves a progress bar on; nothing is shown without a terminal.

    Args:
        total: the amount at the end, in `unit`.
        show: False hides the bar on a terminal too.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(30),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(
        *columns, console=console, disable=not (show and console.is_terminal)
    ) as progress:
        task = progress.add_task(title, total=total, note="")

        def advance(amount: float = 1, note: str | None = None) -> None:
            progress.update(task, advance=amount)
            if note is not None:
                progress.update(task, note=note)

        yield advance


@contextmanager
def kept_on_interrupt(what: Callable[[], str]) -> Iterator[None]:
    """A Ctrl-C within the block carries what `what()` says up to whoever tells the user: what is
    kept, where, and how to go on. The innermost block that says something is heard.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        raise stop if stop.args else KeyboardInterrupt(what()) from None
