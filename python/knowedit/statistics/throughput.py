"""Tokens a second of a collection, shown while it runs: beside its bar, or as JSON lines for
machines.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from knowedit.io.progress import Advance, bar

EVERY = 1.0  # seconds between JSON lines


class Meter:
    """Counts tokens and shows the speed, the time left and how well the estimate has converged.

    Attributes:
        done: tokens so far; those that an earlier run counted are not part of this run's speed.
    """

    def __init__(
        self, total: int, done: int, advance: Advance, *, as_json: bool, out: TextIO
    ) -> None:
        self.total, self.done, self._before = total, done, done
        self.convergence: dict[str, float] = {}
        self._advance, self._json, self._out = advance, as_json, out
        self._start = self._written = time.monotonic()

    def on_tokens(self, tokens: int) -> None:
        """More tokens are summed; writes a line when it is time."""
        self.done += tokens
        self._advance(tokens, self._note())
        now = time.monotonic()
        if self._json and now - self._written >= EVERY:
            self._written = now
            self.write("progress")

    def within(self, share: float, block: float) -> None:
        """That share of the next `block` tokens is there to be summed (see `Advance`)."""
        self._advance.within(share, block)

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
        """One JSON line now, if any are wanted: "progress", "convergence" or "done"."""
        if not self._json:
            return
        left = (self.total - self.done) / max(self.rate, 1e-9)
        line = {
            "event": event,
            "tokens": self.done,
            "of": self.total,
            "tokens_per_second": round(self.rate, 1),
            "seconds_left": round(left, 1),
            "convergence": self.convergence,
        }
        print(json.dumps(line), file=self._out, flush=True)

    def _note(self) -> str:
        errors = "".join(
            f", {name.replace('_', ' ')} ±{error:.1%}" for name, error in self.convergence.items()
        )
        return f"{self.rate:,.0f} tokens/s{errors}"


@contextmanager
def metered(
    title: str,
    total: int,
    done: int = 0,
    *,
    show: bool,
    as_json: bool = False,
    out: TextIO | None = None,
) -> Iterator[Meter]:
    """A meter for `total` tokens, of which an earlier run counted `done`. `show`: at all;
    `as_json`: JSON lines on `out` (default stderr) instead of a bar.
    """
    with bar(title, total, "tokens", done=done, show=show and not as_json) as advance:
        yield Meter(total, done, advance, as_json=as_json and show, out=out or sys.stderr)
