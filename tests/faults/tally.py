"""What came of many tries: counts, and what went wrong, in a form that a file keeps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MOST = 50  # failures that are kept in words


@dataclass
class Tally:
    """So many tries and their ends.

    Attributes:
        tried: how many; the next one's number.
        outcomes: how often each end was met; "FAILED" of those that still fail.
        failed: what went wrong, in words, by the number of the try; the first 50.
        mended: what went wrong once and, tried again, does no longer.
        commits: how many ended well at which commit.
        seconds, cpu_seconds: that they took, the latter with those of forked processes.
        about: what else is to be known, such as the processor.
    """

    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)
    mended: dict[str, str] = field(default_factory=dict)
    commits: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)

    def fail(self, number: int, what: str) -> None:
        """Keep a failure."""
        self.outcomes["FAILED"] += 1
        if len(self.failed) < MOST:
            self.failed[str(number)] = what[:900]

    def forget(self) -> dict[str, str]:
        """The failures that are kept, which are to be tried again and no longer count."""
        failed, self.failed = self.failed, {}
        self.outcomes["FAILED"] -= len(failed)
        return failed

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file; `from_dict` reads it again."""
        return {
            **vars(self),
            "seconds": round(self.seconds),
            "cpu_seconds": round(self.cpu_seconds),
            "outcomes": dict(+self.outcomes),
            "commits": dict(self.commits),
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Tally:
        """Go on from a record."""
        counters = {name: Counter(record[name]) for name in ("outcomes", "commits")}
        return cls(**{**record, **counters})
