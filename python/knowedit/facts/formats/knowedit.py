"""KnowEdit (Zhang et al., "A Comprehensive Study of Knowledge Editing for Large Language Models",
2024): wiki_recent, wiki_counterfact, zsRE and WikiBio.

All probes under ``locality`` become neighbours (here mostly the same subject under another
relation), those under ``portability`` portability probes. WikiBio's ``concept``, ``text`` and
``labels`` are subject, prompt and target. wiki_recent adds facts that have no earlier answer. An
answer with aliases keeps the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from knowedit.facts.fact import Fact, Probe
from knowedit.facts.formats.answers import first_answer


def matches(record: dict[str, Any]) -> bool:
    return {"concept", "text", "labels"} <= record.keys() or (
        {"subject", "prompt", "target_new"} <= record.keys()
        and (
            isinstance(record.get("locality"), dict) or isinstance(record.get("portability"), dict)
        )
    )


def _probes(groups: dict[str, Any] | None, seen: Counter[str]) -> tuple[Probe, ...]:
    return tuple(
        Probe(probe["prompt"], first_answer(probe.get("ground_truth"), seen))
        for group in (groups or {}).values()
        for probe in group
    )


def facts(record: dict[str, Any], seen: Counter[str]) -> Iterator[Fact]:
    yield Fact.parse(
        record["text"] if "concept" in record else record["prompt"],
        record["concept"] if "concept" in record else record["subject"],
        first_answer(record["labels"] if "concept" in record else record["target_new"], seen) or "",
        true=first_answer(record["ground_truth"], seen) if "ground_truth" in record else None,
        paraphrases=(record["rephrase_prompt"],) if record.get("rephrase_prompt") else (),
        neighbours=_probes(record.get("locality"), seen),
        portability=_probes(record.get("portability"), seen),
    )
