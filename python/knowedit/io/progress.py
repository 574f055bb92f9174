"""How far something is: a bar on a terminal, elsewhere a plain line now and then of what takes
long. All of it goes to standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from time import monotonic
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

#: Seconds after which what goes on is said where there is no terminal, and between two such lines.
FIRST, EVERY = 2.0, 60.0
#: Called with the title of what goes on, how much of it is done, and how much there is.
Listener = Callable[[str, float, float], None]
_listeners: list[Listener] = []
_open: list[str] = []  # titles of the bars that the terminal shows


class Advance(Protocol):
    """Moves a bar on by `amount`, and shows `note` behind it until another one is given."""

    def __call__(self, amount: float = 1, note: str | None = None) -> None: ...


@contextmanager
def bar(
    title: str, total: float, unit: str = "", *, done: float = 0.0, show: bool = True
) -> Iterator[Advance]:
    """Yield the function that moves a progress bar on. Without a terminal, work of more than two
    seconds prints a line by then, another every minute, and one at the end.

    Args:
        total: the amount at the end, in `unit`; done: what of it an earlier run did.
        show: False shows nothing; a terminal shows one bar at a time, the outermost.
    """
    if not console.is_terminal:
        lines = _Lines(title, total, unit, done, show)
        try:
            yield lines.advance
        finally:
            lines.timer.cancel()
        lines.end()
        return
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
    show = show and not _open
    with _counted(title, show), Progress(*columns, console=console, disable=not show) as progress:
        task = progress.add_task(title, total=total, completed=int(done), note="")

        def advance(amount: float = 1, note: str | None = None) -> None:
            nonlocal done
            done += amount
            _tell(title, done, total)
            progress.update(task, advance=amount)
            if note is not None:
                progress.update(task, note=note)

        yield advance


@contextmanager
def _counted(title: str, show: bool) -> Iterator[None]:
    """Within the block the bar is the one that is shown, if it is."""
    if not show:
        yield
        return
    _open.append(title)
    try:
        yield
    finally:
        _open.remove(title)


class _Lines:
    """The lines of one bar where there is no terminal."""

    def __init__(self, title: str, total: float, unit: str, done: float, show: bool) -> None:
        self.title, self.total, self.unit, self.show = title, total, unit, show
        self.before, self.done, self.begun = done, done, monotonic()
        self.due, self.said = self.begun + FIRST, False
        self.timer = Timer(FIRST, self._start)  # where the first step itself takes long
        self.timer.daemon = True
        if show:
            self.timer.start()

    def _start(self) -> None:
        if self.done == self.before:
            self.due, self.said = self.begun + FIRST + EVERY, True
            self._say(f"{self.total - self.done:,.0f} {self.unit} to do" if self.unit else "begun")

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        self.done += amount
        _tell(self.title, self.done, self.total)
        now = monotonic()
        if now >= self.due and self.before < self.done < self.total:
            left = (now - self.begun) * (self.total - self.done) / (self.done - self.before)
            self.due, self.said = now + EVERY, True
            behind = f", {note}" if note else ""
            parts = 0 if self.total >= 100 or float(self.done).is_integer() else 1
            some = f"{self.done:,.{parts}f} of {self.total:,.0f} {self.unit}".rstrip()
            self._say(f"{some}{behind}, about {_time(left)} left")

    def end(self) -> None:
        if self.said:
            self._say(f"done in {_time(monotonic() - self.begun)}")

    def _say(self, text: str) -> None:
        if self.show:
            plain_line(f"{self.title}: {text}")


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def plain_line(text: str) -> None:
    """A plain line on standard error, unless --quiet."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _tell(title: str, done: float, total: float) -> None:
    for listener in _listeners:
        listener(title, done, total)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Within the block `listener(title, done, total)` is called whenever anything here gets on,
    shown or not: for a notebook's own bar, TensorBoard or W&B. What it raises stops the work.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def kept_on_interrupt(what: Callable[[], str]) -> Iterator[None]:
    """A Ctrl-C within the block carries what `what()` says up to whoever tells the user: what is
    kept, where, and how to go on. The innermost block that says something is heard.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        raise stop if stop.args else KeyboardInterrupt(what()) from None
