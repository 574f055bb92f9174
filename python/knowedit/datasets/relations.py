"""Wordings of the embedded set's relations, in two pools that share none: one to train edits on, one to test them with.

``relations.json`` maps a relation to its cloze ``prompt`` and to ``paraphrases``, ``questions`` and ``instructions``,
each with the lists ``train`` and ``test`` of templates that hold one ``{}`` for the subject. An embedded fact's own
paraphrases, questions and instructions are the test pool filled in, so evaluation never sees a training wording. An
instruction may quote the cloze: only its own wording is held out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..facts import Fact, FactError

PATH = Path(__file__).with_name("relations.json")
SPLITS = ("train", "test")


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


def wordings(fact: Fact, split: str = "train") -> Wordings:
    """The `split` pool ("train" or "test") of the fact's relation, with its subject filled in.

    Raises `FactError` for another split, or when the fact's relation is not one of the embedded set's.
    """
    if split not in SPLITS:
        raise FactError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if fact.relation not in relations():
        raise FactError(
            f"relation {fact.relation!r} of {fact.text!r} has no wordings; known relations: {', '.join(relations())}"
        )
    pools = relations()[fact.relation]
    filled = {
        kind: tuple(template.replace("{}", fact.subject) for template in pools[kind][split])
        for kind in ("paraphrases", "questions", "instructions")
    }
    return Wordings(**filled)
