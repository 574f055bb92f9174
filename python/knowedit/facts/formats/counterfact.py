"""CounterFact (Meng et al., "Locating and Editing Factual Associations in GPT", 2022), in both
public schemas.

* The authors' (``counterfact.json``): ``requested_rewrite`` with 2 paraphrase and 10 neighbourhood
  prompts, whose right answer is the record's own true object.
* EasyEdit's flat one: ``prompt``, ``target_new``, ``ground_truth``, one ``rephrase_prompt``, one
  ``locality_prompt``. Its rephrase prompt is often a generation prompt; where ``rephrase_kind``
  says so it is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from knowedit.facts.fact import Fact, Probe
from knowedit.facts.formats.answers import first_answer
from knowedit.facts.formats.registry import NamedSet, fact_format

TRUE = ("target_true", "ground_truth", "target_old")  # names of the former answer


def matches(record: dict[str, Any]) -> bool:
    return isinstance(record.get("requested_rewrite"), dict) or (
        {"prompt", "subject", "target_new"} <= record.keys()
        and ("locality_prompt" in record or isinstance(record.get("rephrase_prompt"), str))
        and "locality" not in record
    )


@fact_format(
    "counterfact",
    matches=matches,
    sets=(
        NamedSet(
            "counterfact",
            "CounterFact, the authors' schema: paraphrases and ten neighbours a fact",
            ("counterfact.json", "counterfact_rome_schema.jsonl.gz"),
        ),
        NamedSet(
            "counterfact-flat",
            "CounterFact, EasyEdit's flat schema",
            ("counterfact_first2000.jsonl.gz",),
        ),
    ),
)
def facts(record: dict[str, Any], forms: Counter[str]) -> Iterator[Fact]:
    rewrite = record.get("requested_rewrite", record)
    former = (rewrite[name] for name in TRUE if name in rewrite)
    true = first_answer(next(former, None), forms)
    paraphrases = list(record.get("paraphrase_prompts", ()))
    neighbours = [Probe(prompt, true) for prompt in record.get("neighborhood_prompts", ())]
    if record.get("rephrase_prompt") and record.get("rephrase_kind", "paraphrase") == "paraphrase":
        paraphrases.append(record["rephrase_prompt"])
    if record.get("locality_prompt"):
        answer = first_answer(record.get("locality_ground_truth"), forms)
        neighbours.append(Probe(record["locality_prompt"], answer))
    yield Fact.parse(
        rewrite["prompt"],
        rewrite["subject"],
        first_answer(rewrite["target_new"], forms) or "",
        true=true,
        paraphrases=tuple(paraphrases),
        neighbours=tuple(neighbours),
        relation=rewrite.get("relation_id"),
        id=f"counterfact:{record['case_id']}" if "case_id" in record else None,
    )
