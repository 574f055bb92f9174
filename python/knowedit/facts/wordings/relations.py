"""Wordings of relations, in two pools that share none: one to train edits on, one to test them
with.

``relations.json`` maps each relation of the embedded set, and each of CounterFact's 34 (by its
Wikidata number), to ``paraphrases`` and ``questions``, each with the lists ``train`` and ``test``
of templates that hold one ``{}`` for the subject; to ``entities``, further subjects of that
relation; and to the ``kind`` of thing its subjects are. Relations of the embedded set also have
their cloze ``prompt``; CounterFact's facts bring their own. Instructions quote the fact's own
cloze: only the wording around it is held out. An embedded fact's paraphrases, questions and
instructions are the test pool filled in, so evaluation never sees a training wording.

``probes.json`` has, again for training and for testing, prompts about a subject that no edit should
change: who or what it is (``identity``), and unrelated matters by the kind of subject.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from knowedit.facts.fact import Fact, FactError

PATH = Path(__file__).with_name("relations.json")
SPLITS = ("train", "test")
INSTRUCTIONS = {
    "train": ("Fill in the blank: {} ____", "Continue this sentence in a word or two: {}"),
    "test": (
        "Complete the sentence with the missing words only: {} ...",
        "Finish what I am saying, and add nothing else: {}",
    ),
}


@dataclass(frozen=True)
class Wordings:
    """Other ways to ask for a fact's object, subject filled in."""

    paraphrases: tuple[str, ...]  # the object follows
    questions: tuple[str, ...]
    instructions: tuple[str, ...]


@cache
def relations() -> dict[str, dict[str, Any]]:
    """The content of ``relations.json`` (do not change it)."""
    return json.loads(PATH.read_text("utf-8"))


@cache
def probes() -> dict[str, dict[str, list[str]]]:
    """The content of ``probes.json`` (do not change it)."""
    return json.loads(PATH.with_name("probes.json").read_text("utf-8"))


def wordings(fact: Fact, split: str = "train") -> Wordings:
    """The `split` pool ("train" or "test") of the fact's relation, with its subject filled in.

    Raises `FactError` for another split, or when the fact's relation is not one of `relations()`.
    """
    if split not in SPLITS:
        raise FactError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if fact.relation not in relations():
        raise FactError(
            f"relation {fact.relation!r} of {fact.text!r} has no wordings; known relations: "
            f"{', '.join(relations())}"
        )
    pools = relations()[fact.relation]
    return Wordings(
        paraphrases=_filled(pools["paraphrases"][split], fact.subject),
        questions=_filled(pools["questions"][split], fact.subject),
        instructions=_filled(INSTRUCTIONS[split], fact.text),
    )


def kind_of(facts: Sequence[Fact]) -> str:
    """What the subject of `facts` is: "person", "place", ..., by its relations; "any" where none
    of them decides.
    """
    kinds = Counter(relations().get(fact.relation or "", {}).get("kind", "any") for fact in facts)
    kinds.pop("any", None)
    return kinds.most_common(1)[0][0] if kinds else "any"


def identity_prompts(facts: Sequence[Fact], split: str = "train") -> tuple[str, ...]:
    """Prompts about who or what the subject of `facts` is ("{} is a", which every method trains, is
    in neither pool).
    """
    return _filled(probes()["identity"][split], facts[0].subject)


def unrelated_prompts(facts: Sequence[Fact], split: str = "train") -> tuple[str, ...]:
    """Prompts about other matters of the subject of `facts`, which an edit of `facts` should leave
    alone.
    """
    return _filled(probes()[kind_of(facts)][split], facts[0].subject)


def _filled(templates: Sequence[str], text: str) -> tuple[str, ...]:
    return tuple(template.replace("{}", text) for template in templates)
