"""How far something is: a bar on a terminal, elsewhere a plain line now and then of what takes
long. All of it goes to standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread
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

from knowedit.io.lines import printable

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
    seconds prints a line by then, another every minute (also within a step), and one at the end.

    Args:
        total: the amount at the end, in `unit`; done: what of it an earlier run did.
        show: False shows nothing; a terminal shows one bar at a time, the outermost.
    """
    if not console.is_terminal:
        lines = _Lines(title, total, unit, done, show)
        try:
            yield lines.advance
        finally:
            lines.over.set()
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
        self.due, self.lines, self.note = self.begun + FIRST, 0, ""
        self.turn, self.over = Lock(), Event()
        if show:
            Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Say how far it is where a single step takes long."""
        known = 0
        while not self.over.wait(EVERY if self.lines else FIRST):
            self._say_how_far(waited_since=known)
            known = self.lines

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        self.done += amount
        self.note = note or ""
        _tell(self.title, self.done, self.total)
        self._say_how_far()

    def _say_how_far(self, waited_since: int | None = None) -> None:
        """Say it if it is time: a step was done and a line is due; or one is under way, and no line
        was said since there were `waited_since`.
        """
        with self.turn:
            now = monotonic()
            if waited_since is None:
                due = now >= self.due and self.done > self.before
            else:
                due = self.lines == waited_since
            if due and not self.over.is_set() and self.done < self.total:
                self._say(self._how_far(now, first=not self.lines))
                self.due, self.lines = now + EVERY, self.lines + 1

    def _how_far(self, now: float, first: bool) -> str:
        parts = 0 if self.total >= 100 or float(self.done).is_integer() else 1
        some = f"{self.done:,.{parts}f} of {self.total:,.0f} {self.unit}".rstrip()
        if self.done > self.before:
            left = (now - self.begun) * (self.total - self.done) / (self.done - self.before)
            behind = f", {self.note}" if self.note else ""
            return f"{some}{behind}, about {_time(left)} left"
        if first:
            return f"{self.total - self.done:,.0f} {self.unit} to do" if self.unit else "begun"
        return f"{some} after {_time(now - self.begun)}" if self.unit else "not done yet"

    def end(self) -> None:
        if self.lines:
            self._say(f"done in {_time(monotonic() - self.begun)}")

    def _say(self, text: str) -> None:
        if self.show:
            plain_line(f"{self.title}: {text}")


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def plain_line(text: str) -> None:
    """A plain line on standard error, unless --quiet."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


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
def no_bars_of_transformers() -> Iterator[None]:
    """Within the block transformers draws no bars of its own, which know nothing of a pipe or
    --quiet.
    """
    from transformers.utils import logging

    was = logging.is_progress_bar_enabled() if hasattr(logging, "is_progress_bar_enabled") else True
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()


@contextmanager
def kept_on_interrupt(what: Callable[[], str]) -> Iterator[None]:
    """A Ctrl-C within the block carries what `what()` says up to whoever tells the user: what is
    kept, where, and how to go on. The innermost block that says something is heard.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        raise stop if stop.args else KeyboardInterrupt(what()) from None
