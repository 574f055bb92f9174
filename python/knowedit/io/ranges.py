"""Ranges of the numbers in settings, as types: a field `gain: Share = 0.9` holds what lies between
0 and 1, and `Share | None`, `tuple[Share, ...]` hold no others either. To a type checker they are
plain numbers.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have.

    Attributes:
        said: what it must do, for messages: "be positive".
        holds: whether a number is one of them; never for NaN.
    """

    said: str
    holds: Callable[[float], bool]


Positive = Annotated[float, Range("be positive and finite", lambda x: 0 < x < math.inf)]
NotNegative = Annotated[float, Range("not be negative, and be finite", lambda x: 0 <= x < math.inf)]
Bound = Annotated[float, Range("be positive (infinite: no bound)", lambda x: x > 0)]
Share = Annotated[float, Range("lie between 0 and 1", lambda x: 0 < x < 1)]
Finite = Annotated[float, Range("be finite", math.isfinite)]
Count = Annotated[int, Range("be at least 1", lambda n: n >= 1)]
Whole = Annotated[int, Range("not be negative", lambda n: n >= 0)]


@cache
def ranges_of(cls: type) -> dict[str, tuple[Range, ...]]:
    """`{field: its ranges}` of the annotated fields that have any. A class that gives a field
    another default need not say its range again.
    """
    found: dict[str, tuple[Range, ...]] = {}
    for base in reversed(cls.__mro__):
        hints = typing.get_type_hints(base, include_extras=True)
        ranges = {name: tuple(_ranges(hint)) for name, hint in hints.items()}
        found |= {name: own for name, own in ranges.items() if own}
    return found


def _ranges(hint: Any) -> Iterator[Range]:
    if typing.get_origin(hint) is Annotated:
        yield from (part for part in hint.__metadata__ if isinstance(part, Range))
    else:
        for part in typing.get_args(hint):
            yield from _ranges(part)


def outside(cls: type, name: str, value: Any) -> str | None:
    """What a value of the field `name` must do and does not; None where it is in order, and for
    what is no number.
    """
    parts = value if isinstance(value, (tuple, list)) else (value,)
    numbers = [x for x in parts if isinstance(x, (int, float)) and not isinstance(x, bool)]
    for range_ in ranges_of(cls).get(name, ()):
        if not all(range_.holds(x) for x in numbers):
            return range_.said
    return None
