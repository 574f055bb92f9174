"""The register of public fact formats: how one is declared and how a record finds its own.

A format is one file beside this one. It declares itself with `fact_format` on the function that
turns a record into facts, and is found by being in the folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from knowedit.facts.fact import Fact, FactError

Record = dict[str, Any]
#: Makes the facts of one record; counts in its second argument which forms the answers had
#: (`answers.first_answer` does). May raise `FactError` for a record that is no usable fact, and a
#: lookup, type, attribute or value error for a broken one.
MakeFacts = Callable[[Record, Counter[str]], Iterator[Fact]]


@dataclass(frozen=True)
class NamedSet:
    """A public data set that can be loaded by its name.

    Attributes:
        name: what `load` takes, in lower case with dashes.
        what: one line for a list of sets.
        files: its file names, tried in this order in the folder `KNOWEDIT_DATA` names; the
            complete original first.
    """

    name: str
    what: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class FactFormat:
    """One public format: its name, how a record of it is recognised, how its facts are made, and
    the sets that come in it.
    """

    name: str
    matches: Callable[[Record], bool]
    facts: MakeFacts
    sets: tuple[NamedSet, ...] = ()


#: Every format by its name.
FORMATS: dict[str, FactFormat] = {}


def fact_format(
    name: str, *, matches: Callable[[Record], bool], sets: Iterable[NamedSet] = ()
) -> Callable[[MakeFacts], MakeFacts]:
    """Register the decorated function as the one that makes the facts of format `name`.

    Args:
        matches: whether a record is of this format, by its fields alone.

    Raises:
        FactError: the format's name, or the name of one of its sets, is taken.
    """

    def register(facts: MakeFacts) -> MakeFacts:
        made = FactFormat(name, matches, facts, tuple(sets))
        taken = {known.name for known in named_sets()}
        if name in FORMATS:
            raise FactError(f"fact format {name!r} is registered twice; rename one")
        if double := [new.name for new in made.sets if new.name in taken]:
            raise FactError(f"fact format {name!r}: data set {double[0]!r} is registered already")
        FORMATS[name] = made
        return facts

    return register


def named_sets() -> list[NamedSet]:
    """The public data sets of all formats."""
    return [named for form in FORMATS.values() for named in form.sets]


def recognise(record: Record) -> FactFormat | None:
    """The format that `record` is in, the first by name; None for our own, and for none at all."""
    return next((form for form in FORMATS.values() if form.matches(record)), None)
