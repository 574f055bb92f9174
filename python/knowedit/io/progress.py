"""How far something is: a bar on a terminal, elsewhere a plain line now and then of what takes
long. All of it goes to standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Event, Lock, Thread
from time import monotonic
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from knowedit.io.lines import printable

console = Console(stderr=True)

#: Seconds after which what goes on is said where there is no terminal, and between two such lines.
FIRST, EVERY = 2.0, 60.0
#: Called with the title of what goes on, how much of it is done, and how much there is.
Listener = Callable[[str, float, float], None]
_listeners: list[Listener] = []
_shown: list[_Bar | _Lines] = []  # the bars that are seen, the innermost last


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, amount: float = 1, note: str | None = None) -> None:
        """By `amount`; `note` is shown behind it until another one is given."""

    def within(self, share: float, block: float) -> None:
        """The bar moves on by blocks of about `block`, and this share of the next one is done: what
        is left is a whole number of blocks less that. The next call says how much it came to.
        """


class Within(Protocol):
    """Told by work that comes in blocks what share of one is done, and how large a block is."""

    def __call__(self, share: float, block: float) -> None: ...


@dataclass
class _Reach:
    """How far something is.

    Attributes:
        before: what an earlier run did; done: what is finished, that included.
        ahead: what of the block that is under way is done already; block: its size, if known.
    """

    total: float
    done: float
    begun: float
    before: float = 0.0
    ahead: float = 0.0
    block: float | None = None

    def __post_init__(self) -> None:
        self.before = self.done

    def advance(self, amount: float) -> None:
        self.done, self.ahead = self.done + amount, max(self.ahead - amount, 0.0)

    def within(self, share: float, block: float) -> None:
        self.ahead, self.block = share * block, block

    @property
    def shown(self) -> float:
        """What is done, as far as it was asked for."""
        return min(self.done + self.ahead, max(self.total, self.done))

    @property
    def moved(self) -> bool:
        """Is there anything yet that says how fast it goes?"""
        return self.done + self.ahead > self.before

    def seconds_left(self, now: float) -> float:
        """At the speed so far; the last block takes as long as the others."""
        left = self.total - self.done
        if self.block:
            left = max(math.ceil(left / self.block) * self.block - self.ahead, 0.0)
        return (now - self.begun) * left / (self.done + self.ahead - self.before)


class _Left(ProgressColumn):
    """The time left on a terminal."""

    def __init__(self, reach: _Reach) -> None:
        super().__init__()
        self.reach = reach

    def render(self, task: Task) -> Text:
        if not self.reach.moved or task.finished:
            return Text("0:00:00" if task.finished else "-:--:--", style="progress.remaining")
        seconds = math.ceil(self.reach.seconds_left(monotonic()))
        return Text(str(timedelta(seconds=seconds)), style="progress.remaining")


@contextmanager
def bar(
    title: str, total: float, unit: str = "", *, done: float = 0.0, show: bool = True
) -> Iterator[Advance]:
    """Yield the function that moves a progress bar on. Without a terminal, work of more than two
    seconds prints a line by then, another every minute (also within a step), and one at the end.

    Args:
        total: the amount at the end, in `unit`; done: what of it an earlier run did.
        show: False shows nothing of its own, and a terminal shows one bar at a time, the outermost:
            what is not shown is told behind the bar that is.
    """
    if not console.is_terminal:
        lines = _Lines(title, unit, _Reach(total, done, monotonic()), show)
        try:
            with _among_shown(lines):
                yield lines
        finally:
            lines.over.set()
        lines.end()
        return
    reach = _Reach(total, done, monotonic())
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(30),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        _Left(reach),
        TextColumn("{task.fields[note]}", markup=False),
    )
    show = show and not _shown
    with Progress(*columns, console=console, disable=not show) as progress:
        drawn = _Bar(title, reach, progress, show)
        with _among_shown(drawn):
            yield drawn


@contextmanager
def _among_shown(one: _Bar | _Lines) -> Iterator[None]:
    """Within the block the bar is the innermost that is seen, if it is seen; else it is told behind
    the one that is.
    """
    if not one.show:
        one.around = _shown[-1] if _shown else None
        try:
            yield
        finally:
            if one.around is not None:
                one.around.inside("")
        return
    _shown.append(one)
    try:
        yield
    finally:
        _shown.remove(one)


class _Bar:
    """A bar on a terminal."""

    def __init__(self, title: str, reach: _Reach, progress: Progress, show: bool) -> None:
        self.title, self.reach, self.progress, self.show = title, reach, progress, show
        self.note = ""
        self.around: _Bar | _Lines | None = None  # that is seen, where this one is not
        self.task = progress.add_task(title, total=reach.total, completed=int(reach.done), note="")

    def __call__(self, amount: float = 1, note: str | None = None) -> None:
        self.reach.advance(amount)
        self.note = self.note if note is None else note
        self.inside("")
        self._show()

    def within(self, share: float, block: float) -> None:
        self.reach.within(share, block)
        self._show()

    def inside(self, what: str) -> None:
        """What goes on within the step that is under way; nothing: the bar's own note."""
        self.progress.update(self.task, note=what or self.note)

    def _show(self) -> None:
        self.progress.update(self.task, completed=self.reach.shown)
        _tell(self)


class _Lines:
    """The lines of one bar where there is no terminal."""

    def __init__(self, title: str, unit: str, reach: _Reach, show: bool) -> None:
        self.title, self.unit, self.reach, self.show = title, unit, reach, show
        self.due, self.lines, self.note, self.step = reach.begun + FIRST, 0, "", ""
        self.around: _Bar | _Lines | None = None  # that is seen, where this one is not
        self.turn, self.over = Lock(), Event()
        if show:
            Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Say how far it is where a single step takes long."""
        known = 0
        while not self.over.wait(EVERY if self.lines else FIRST):
            self._say_how_far(waited_since=known)
            known = self.lines

    def __call__(self, amount: float = 1, note: str | None = None) -> None:
        self.reach.advance(amount)
        self.note, self.step = note or "", ""
        self._tell()

    def within(self, share: float, block: float) -> None:
        self.reach.within(share, block)
        self._tell()

    def inside(self, what: str) -> None:
        """What goes on within the step that is under way, for the next line; nothing: the note."""
        self.step = what

    def _tell(self) -> None:
        _tell(self)
        self._say_how_far()

    def _say_how_far(self, waited_since: int | None = None) -> None:
        """Say it if it is time: a step was done and a line is due; or one is under way, and no line
        was said since there were `waited_since`.
        """
        with self.turn:
            now = monotonic()
            if waited_since is None:
                due = now >= self.due and self.reach.moved
            else:
                due = self.lines == waited_since
            if due and not self.over.is_set() and self.reach.done < self.reach.total:
                self._say(self._how_far(now, first=not self.lines))
                self.due, self.lines = now + EVERY, self.lines + 1

    def _how_far(self, now: float, first: bool) -> str:
        reach = self.reach
        parts = 0 if reach.total >= 100 or float(reach.shown).is_integer() else 1
        some = f"{reach.shown:,.{parts}f} of {reach.total:,.0f} {self.unit}".rstrip()
        if reach.shown >= reach.total:  # a block that is under way, and larger than what is left
            some = f"the last of {reach.total:,.0f} {self.unit}".rstrip()
        note = self.step or self.note
        behind = f", {note}" if note else ""
        if reach.moved:
            return f"{some}{behind}, about {_time(reach.seconds_left(now))} left"
        if first:
            return f"{reach.total - reach.done:,.0f} {self.unit} to do" if self.unit else "begun"
        some = f"{some} after {_time(now - reach.begun)}" if self.unit else "not done yet"
        return f"{some}{behind}"

    def end(self) -> None:
        if self.lines:
            self._say(f"done in {_time(monotonic() - self.reach.begun)}")

    def _say(self, text: str) -> None:
        if self.show:
            plain_line(f"{self.title}: {text}")


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def plain_line(text: str) -> None:
    """A plain line on standard error, unless --quiet."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def _tell(one: _Bar | _Lines) -> None:
    """Tell the listeners; and the bar that is seen, where `one`, within a step of it, is not."""
    title, done, total = one.title, one.reach.shown, one.reach.total
    if one.around is not None:
        one.around.inside(f"{title.rpartition(': ')[2]} {done:,.0f} of {total:,.0f}")
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
