"""MQuAKE-CF (Zhong et al., "MQuAKE: Assessing Knowledge Editing via Multi-Hop Questions", 2023).

One record (case) holds one or more edits and multi-hop questions that follow from all of them
together: the edits of case 3 get the ids ``mquake:3:0``, ``mquake:3:1``, and the questions are
portability probes of the case's first edit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from knowedit.facts.fact import Fact, Probe
from knowedit.facts.formats.answers import first_answer
from knowedit.facts.formats.registry import NamedSet, fact_format


def matches(record: dict[str, Any]) -> bool:
    return isinstance(record.get("requested_rewrite"), list)


@fact_format(
    "mquake",
    matches=matches,
    sets=(
        NamedSet(
            "mquake",
            "MQuAKE-CF: cases of edits with multi-hop questions",
            ("MQuAKE-CF-3k.json", "mquake_cf3k_2hop_reconstructed_842.jsonl.gz"),
        ),
    ),
)
def facts(record: dict[str, Any], forms: Counter[str]) -> Iterator[Fact]:
    answer = first_answer(record.get("new_answer"), forms)
    for i, edit in enumerate(record["requested_rewrite"]):
        yield Fact.parse(
            edit["prompt"],
            edit["subject"],
            first_answer(edit["target_new"], forms) or "",
            true=first_answer(edit["target_true"], forms) if "target_true" in edit else None,
            questions=(edit["question"],) if edit.get("question") else (),
            relation=edit.get("relation_id"),
            id=f"mquake:{record.get('case_id')}:{i}",
            portability=tuple(Probe(q, answer) for q in record.get("questions", ()))
            if i == 0
            else (),
        )
