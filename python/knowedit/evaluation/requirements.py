"""Figures that a result must reach, so that a script can stop where it does not:
`neighbourhood.unchanged=0.95` at least, `drift.kl=0.01` at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knowedit.errors import KnowEditError
from knowedit.evaluation.measures.base import measures
from knowedit.io.names import nearest


@dataclass(frozen=True)
class Requirement:
    """One figure and what it must reach.

    Attributes:
        name: of a result's figure, as `figures` has it.
        value: the least it may be, or the most.
        at_least: which of the two.
    """

    name: str
    value: float
    at_least: bool

    @classmethod
    def parse(cls, text: str, *, at_least: bool) -> Requirement:
        """From `NAME=VALUE`. Raises KnowEditError for anything else."""
        name, sign, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (name and sign) or math.isnan(number):
            raise KnowEditError(
                f"{text!r} must be a figure and a number, as in neighbourhood.unchanged=0.95"
            )
        return cls(name, number, at_least)

    def broken(self, found: float) -> bool:
        """Whether `found` does not reach it; a figure that is no number never does."""
        return not (found >= self.value if self.at_least else found <= self.value)

    def __str__(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.value:g}"


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """Every figure of a record of `Result.to_dict` after the edit: means of the facts' measures as
    `kind.measure`, those of the whole model as `measure.figure`.
    """
    after = record["evaluation"]["after"]
    found = {f"{kind}.{m}": row[m]["mean"] for kind, row in after.items() for m in row}
    for measure, effects in record["side_effects"].items():
        for name, value in effects.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found[f"{measure}.{name}"] = value
    return found


def check_names(wanted: Iterable[Requirement]) -> None:
    """Raise KnowEditError for a figure of no measure, before anything is measured."""
    known = measures()
    for one in wanted:
        kind, _, figure = one.name.partition(".")
        if kind not in known or not figure:
            raise KnowEditError(
                f"no figure is called {one.name!r}; it is a measure with one of its figures, as in "
                f"neighbourhood.unchanged: {nearest(kind, known)}"
            )


def check_requirements(
    records: Iterable[Mapping[str, Any]],
    wanted: Sequence[Requirement],
    failed: Iterable[str] = (),
) -> None:
    """Raise KnowEditError, with all figures that miss what is wanted, or for one that a record does
    not have.

    Args:
        failed: what could not be measured, and why; it reaches nothing.
    """
    missed = list(failed) if wanted else []
    for record in records:
        known = figures(record)
        for one in wanted:
            if one.name not in known:
                raise KnowEditError(
                    f"{record['method']} has no figure {one.name!r}; {nearest(one.name, known)}"
                )
            if one.broken(known[one.name]):
                missed.append(
                    f"{record['method']}: {one.name} is {known[one.name]:.4g}, {one} asked"
                )
    if missed:
        raise KnowEditError("; ".join(missed))
