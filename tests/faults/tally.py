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
        outcomes: how often each end was met.
        failed: what went wrong, in words, the first 50.
        seconds, cpu_seconds: that they took, the latter with those of forked processes.
        about: what else is to be known, such as the processor.
    """

    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)

    def fail(self, what: str) -> None:
        """Keep a failure."""
        self.outcomes["FAILED"] += 1
        if len(self.failed) < MOST:
            self.failed.append(what[:900])

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file; `Tally(**record)` reads it again, with `outcomes` as a Counter."""
        return {
            **vars(self),
            "seconds": round(self.seconds),
            "cpu_seconds": round(self.cpu_seconds),
            "outcomes": dict(self.outcomes),
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Tally:
        """Go on from a record."""
        return cls(**{**record, "outcomes": Counter(record["outcomes"])})
