"""CounterFact edits grouped by subject, 2-4 on different relations each: RoSE's scenario (arXiv 2603.15518).

One record is ``{"subject": ..., "records": [flat CounterFact records]}``; the groups become consecutive facts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..facts import Fact
from . import counterfact


def matches(record: dict[str, Any]) -> bool:
    return "subject" in record and isinstance(record.get("records"), list)


def facts(record: dict[str, Any], seen: Counter[str]) -> Iterator[Fact]:
    for member in record["records"]:
        yield from counterfact.facts(member, seen)
