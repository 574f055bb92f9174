"""Texts that an edit should leave alone: to train with, and others to measure with.

``ordinary.json`` holds sentences on many topics, written for this package: prose, instructions,
code, questions, sums. ``held_out.json`` holds a few more, ``passages.json`` longer ones; nothing is
trained on either. Openings are prompts about entities of the shipped relations (`relations.probes`,
training split), to be continued.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache

from knowedit.facts.fact import Fact
from knowedit.facts.wordings.forms import occurs, training_neighbours
from knowedit.facts.wordings.relations import PATH, probes, relations

NEIGHBOURS = 4  # prompts a fact


@cache
def sentences() -> tuple[str, ...]:
    """The content of ``ordinary.json``."""
    return tuple(json.loads(PATH.with_name("ordinary.json").read_text("utf-8")))


@cache
def held_out() -> tuple[str, ...]:
    """The content of ``held_out.json``."""
    return tuple(json.loads(PATH.with_name("held_out.json").read_text("utf-8")))


@cache
def passages() -> tuple[str, ...]:
    """The content of ``passages.json``."""
    return tuple(json.loads(PATH.with_name("passages.json").read_text("utf-8")))


def openings(facts: Sequence[Fact], count: int = 48, seed: int = 0) -> list[str]:
    """Up to `count` distinct prompts on subjects other than those of `facts`, none of which `facts`
    test with.

    At most half are the facts' own prompts about other subjects of their relations, so that
    neighbours are among them.
    """
    rng = random.Random(seed)
    near = [
        prompt
        for prompts in training_neighbours(facts, count=NEIGHBOURS, seed=seed)
        for prompt in prompts
    ]
    near = list(dict.fromkeys(near))
    rng.shuffle(near)
    names = {fact.subject for fact in facts}
    tested = "\n".join(
        probe.prompt for fact in facts for probe in (*fact.neighbours, *fact.portability)
    )
    found = near[: count // 2]
    kinds = {kind: split["train"] for kind, split in probes().items()}
    entities = [(name, pool["kind"]) for pool in relations().values() for name in pool["entities"]]
    rng.shuffle(entities)
    for name, kind in dict(entities).items():
        if name not in names and not occurs(name, tested):
            found.append(rng.choice(kinds["identity"] + kinds[kind]).replace("{}", name))
    return list(dict.fromkeys(found))[:count]
