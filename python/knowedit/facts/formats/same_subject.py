"""CounterFact edits grouped by subject, 2-4 on different relations each: RoSE's scenario (arXiv
2603.15518).

One record is ``{"subject": ..., "records": [flat CounterFact records]}``; the groups become
consecutive facts (`knowedit.facts.groups` puts them together again).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from knowedit.facts.fact import Fact
from knowedit.facts.formats import counterfact
from knowedit.facts.formats.registry import NamedSet, fact_format


def matches(record: dict[str, Any]) -> bool:
    return "subject" in record and isinstance(record.get("records"), list)


@fact_format(
    "same_subject",
    matches=matches,
    sets=(
        NamedSet(
            "same-subject",
            "CounterFact edits by subject, 2-4 facts each",
            ("counterfact_same_subject_groups.jsonl.gz",),
        ),
    ),
)
def facts(record: dict[str, Any], forms: Counter[str]) -> Iterator[Fact]:
    for member in record["records"]:
        yield from counterfact.facts(member, forms)
