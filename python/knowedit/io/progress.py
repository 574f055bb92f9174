"""Progress bars: shown on a terminal, silent elsewhere, never in the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


@contextmanager
def bar(
    title: str, total: float, unit: str = "", *, show: bool = True
) -> Iterator[Callable[..., None]]:
    """Yield `advance(n, note="")`; with a terminal it moves a bar with rate, elapsed and remaining
    time.
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
