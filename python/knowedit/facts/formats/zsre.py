"""zsRE evaluation records in MEND's format (Mitchell et al., 2022), with EasyEdit's portability
questions if present.

The edit writes ``alt``, a wrong answer, as EasyEdit does. ROME and MEMIT write ``answers[0]``, the
right one: scores of the two habits are not comparable. Prompts are questions; ``loc`` is an
unrelated Natural Questions question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from knowedit.facts.fact import Fact, Probe
from knowedit.facts.formats.answers import first_answer
from knowedit.facts.formats.registry import NamedSet, fact_format


def matches(record: dict[str, Any]) -> bool:
    return {"subject", "src", "alt", "answers", "loc"} <= record.keys()


@fact_format(
    "zsre",
    matches=matches,
    sets=(
        NamedSet(
            "zsre",
            "zsRE questions in MEND's format, with portability",
            ("zsre_mend_eval_portability_gpt4.json", "zsre_eval_portability_first600.jsonl.gz"),
        ),
    ),
)
def facts(record: dict[str, Any], forms: Counter[str]) -> Iterator[Fact]:
    further = record.get("portability") or {}
    portability: tuple[Probe, ...] = ()
    if further.get("New Question"):
        portability = (
            Probe(further["New Question"], first_answer(further.get("New Answer"), forms)),
        )
    yield Fact.parse(
        record["src"],
        record["subject"],
        first_answer(record["alt"], forms) or "",
        true=first_answer(record["answers"], forms),
        paraphrases=(record["rephrase"],) if record.get("rephrase") else (),
        neighbours=(Probe(record["loc"], first_answer(record.get("loc_ans"), forms)),),
        portability=portability,
    )
