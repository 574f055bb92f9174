"""What a method measured and chose while it computed an edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from knowedit.edits.limits import RUINOUS, Limits
from knowedit.edits.measured import Measured
from knowedit.errors import EditError

COSTS = ("seconds", "peak_memory_bytes")
LOW_GAIN = 0.9  # of the planned change, from which on an edit says so


@dataclass
class EditReport:
    """What every method may say, and what only one has to say.

    Attributes:
        gain: share of the planned change that the edited model realises at the facts' own prompts,
            mean; None for a method that plans none.
        relative_norm: |change| / |weight| in Frobenius norm, by layer (its number as text) for MLP
            output projections, else by parameter.
        layers: by layer (its number as text), what was chosen and measured there.
        planned_nll: nats a token of the answers, were the plan realised; mean.
        steps: of the optimisation, one number a value, or one for all.
        seconds: of the computation.
        measured: on the edited model; None in a file of an earlier version.
        warnings: what a careful user wants to know before trusting the edit.
        details: what the method alone has to say; JSON-ready.
    """

    gain: float | None = None
    relative_norm: dict[str, float] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    planned_nll: float | None = None
    steps: int | list[float] | None = None
    seconds: float | None = None
    measured: Measured | None = None
    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if taken := sorted(set(self.details) & set(_SHARED)):
            raise EditError(f"the details of a report may not be called {', '.join(taken)}")

    @property
    def within_limits(self) -> bool:
        """Whether what was measured is within the default `Limits`."""
        return not Limits().broken(self)

    def add_measured(self, measured: Measured) -> None:
        """Take in what was measured on the edited model; what it says goes before what was
        predicted.
        """
        self.measured = measured
        gain, notes = measured.mean_gain, []
        if gain is not None:
            self.gain = gain
            if gain < LOW_GAIN and not self.details.get("look_ahead", {}).get("used"):
                notes.append(
                    f"only {gain:.0%} of the planned change is realised; lower the weight, or "
                    "raise the gain"
                )
        if missed := measured.exact.count(False):
            notes.append(
                f"{missed} of {len(measured.exact)} facts are not said at their own prompts "
                f"(least p(new) {min(measured.probability):.4f})"
            )
        broken = [f"{RUINOUS}: {text}" for text in Limits().broken(self)]
        self.warnings = [*broken, *self.warnings, *notes]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready and flat, what is not known left out: the shared entries and the details, side
        by side.
        """
        shared = {name: getattr(self, name) for name in _SHARED}
        shared["measured"] = None if self.measured is None else self.measured.to_dict()
        known = {n: v for n, v in shared.items() if v not in (None, {}) or n == "relative_norm"}
        return self.details | known

    def record(self) -> dict[str, Any]:
        """As a file keeps it: without what it cost, which differs from run to run, so that the same
        edit computed again is the same file.
        """
        return {name: value for name, value in self.to_dict().items() if name not in COSTS}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EditReport:
        """From what `to_dict` writes. Raises TypeError for a part of another kind."""
        shared = {name: record[name] for name in _SHARED if name in record}
        for name, value in shared.items():
            if not (value is None and name in _UNKNOWN) and not _KINDS[name](value):
                raise TypeError(f"report.{name} is {str(value)[:80]!r}")
        if shared.get("measured") is not None:
            shared["measured"] = Measured.from_dict(shared["measured"])
        return cls(**shared, details={n: v for n, v in record.items() if n not in _SHARED})


_SHARED = tuple(entry.name for entry in fields(EditReport) if entry.name != "details")


#: Entries that a method may leave unsaid.
_UNKNOWN = {entry.name for entry in fields(EditReport) if entry.default is None}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _numbers(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_number, value.values()))


#: What a file may hold in each shared entry, where it holds anything.
_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("gain", "planned_nll", "seconds"), _number),
    "relative_norm": _numbers,
    "layers": lambda value: (
        isinstance(value, Mapping) and all(isinstance(one, Mapping) for one in value.values())
    ),
    "steps": lambda value: _number(value) or (isinstance(value, list) and all(map(_number, value))),
    "measured": lambda value: isinstance(value, Mapping),
    "warnings": lambda value: (
        isinstance(value, list) and all(isinstance(one, str) for one in value)
    ),
}
