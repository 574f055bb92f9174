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
from knowedit.facts.formats.registry import NamedSet, fact_format


def matches(record: dict[str, Any]) -> bool:
    return {"concept", "text", "labels"} <= record.keys() or (
        {"subject", "prompt", "target_new"} <= record.keys()
        and (
            isinstance(record.get("locality"), dict) or isinstance(record.get("portability"), dict)
        )
    )


def _probes(groups: Any, forms: Counter[str]) -> tuple[Probe, ...]:
    """The probes of all groups. A group may be null or one probe alone, and a probe its prompt."""
    found = groups.values() if isinstance(groups, dict) else (groups,)
    probes = [
        probe
        for group in found
        for probe in (group if isinstance(group, list) else [group] if group else ())
    ]
    return tuple(
        Probe(probe)
        if isinstance(probe, str)
        else Probe(probe["prompt"], first_answer(probe.get("ground_truth"), forms))
        for probe in probes
    )


@fact_format(
    "knowedit",
    matches=matches,
    sets=(
        NamedSet(
            "knowedit-wiki-counterfact",
            "KnowEdit: WikiData CounterFact",
            ("knowedit_wiki_counterfact_train_first900.jsonl.gz",),
        ),
        NamedSet(
            "knowedit-wiki-recent",
            "KnowEdit: recent changes in WikiData",
            ("knowedit_wiki_recent_train_570.jsonl.gz",),
        ),
        NamedSet(
            "knowedit-wikibio",
            "KnowEdit: sentences of WikiBio",
            ("knowedit_wikibio_test_306.jsonl.gz",),
        ),
        NamedSet("knowedit-zsre", "KnowEdit: zsRE", ("knowedit_zsre_test_first800.jsonl.gz",)),
    ),
)
def facts(record: dict[str, Any], forms: Counter[str]) -> Iterator[Fact]:
    yield Fact.parse(
        record["text"] if "concept" in record else record["prompt"],
        record["concept"] if "concept" in record else record["subject"],
        first_answer(record["labels"] if "concept" in record else record["target_new"], forms)
        or "",
        true=first_answer(record["ground_truth"], forms) if "ground_truth" in record else None,
        paraphrases=(record["rephrase_prompt"],) if record.get("rephrase_prompt") else (),
        neighbours=_probes(record.get("locality"), forms),
        portability=_probes(record.get("portability"), forms),
    )
