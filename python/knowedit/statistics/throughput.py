"""Tokens a second of a collection, shown while it runs: a bar on a terminal, a line a minute
elsewhere, JSON lines for machines.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from knowedit.io.progress import bar, console

EVERY = 60.0  # seconds between lines where nobody watches a bar
EVERY_JSON = 1.0


class Meter:
    """Counts tokens and shows the speed, the time left and how well the estimate has converged."""

    def __init__(
        self, total: int, advance: Any, *, lines: bool, as_json: bool, out: TextIO
    ) -> None:
        self.total, self.done = total, 0
        self.convergence: dict[str, float] = {}
        self._advance, self._lines, self._json, self._out = advance, lines, as_json, out
        self._start = self._written = time.monotonic()
        self._before = 0

    def on_resume(self, tokens: int) -> None:
        """Tokens that an earlier run counted: they are done, and not part of this run's speed."""
        self.done = self._before = tokens
        self._advance(tokens)

    def on_tokens(self, tokens: int) -> None:
        """More tokens are summed; writes a line when it is time."""
        self.done += tokens
        self._advance(tokens, self._note())
        now = time.monotonic()
        if (self._json and now - self._written >= EVERY_JSON) or (
            self._lines and now - self._written >= EVERY
        ):
            self._written = now
            self.write("progress")

    def on_check(self, errors: dict[str, float]) -> None:
        """Relative errors estimated from the tokens so far: `{"solve": 0.1, "null_space": 0.2}`."""
        self.convergence = errors
        if self._json:
            self.write("convergence")

    @property
    def rate(self) -> float:
        """Tokens a second of this run."""
        return (self.done - self._before) / max(time.monotonic() - self._start, 1e-9)

    def write(self, event: str) -> None:
        """One line now: "progress", "convergence" or "done"."""
        left = (self.total - self.done) / max(self.rate, 1e-9)
        if self._json:
            line = {
                "event": event,
                "tokens": self.done,
                "of": self.total,
                "tokens_per_second": round(self.rate, 1),
                "seconds_left": round(left, 1),
                "convergence": self.convergence,
            }
            print(json.dumps(line), file=self._out, flush=True)
        elif self._lines:
            rest = f", {left / 60:.0f} min left" if event == "progress" else ""
            print(
                f"{self.done:,} of {self.total:,} tokens, {self._note()}{rest}",
                file=self._out,
                flush=True,
            )

    def _note(self) -> str:
        errors = "".join(
            f", {name.replace('_', ' ')} ±{error:.1%}" for name, error in self.convergence.items()
        )
        return f"{self.rate:,.0f} tokens/s{errors}"


@contextmanager
def metered(
    title: str, total: int, *, show: bool, as_json: bool = False, out: TextIO | None = None
) -> Iterator[Meter]:
    """A meter for `total` tokens. `show`: at all; `as_json`: JSON lines on `out` (default stderr)
    instead of a bar.
    """
    shown = show and not as_json
    lines = shown and not console.is_terminal
    with bar(title, total, "tokens", show=shown and not lines) as advance:
        yield Meter(total, advance, lines=lines, as_json=as_json and show, out=out or sys.stderr)
