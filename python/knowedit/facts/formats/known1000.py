"""ROME's known facts for causal tracing (Meng et al., 2022): prompts GPT-2 XL completes rightly.
They are not edits, so the attribute is both `target` and `true`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from knowedit.facts.fact import Fact
from knowedit.facts.formats.answers import first_answer
from knowedit.facts.formats.registry import NamedSet, fact_format


def matches(record: dict[str, Any]) -> bool:
    return {"known_id", "subject", "attribute", "prompt"} <= record.keys()


@fact_format(
    "known1000",
    matches=matches,
    sets=(
        NamedSet(
            "known1000",
            "ROME's known facts, for causal tracing; no edits",
            ("known_1000.json", "known_1000_1209.jsonl.gz"),
        ),
    ),
)
def facts(record: dict[str, Any], forms: Counter[str]) -> Iterator[Fact]:
    attribute = first_answer(record["attribute"], forms)
    yield Fact.parse(
        record["prompt"],
        record["subject"],
        attribute or "",
        true=attribute,
        relation=record.get("relation_id"),
        id=f"known:{record['known_id']}",
    )
