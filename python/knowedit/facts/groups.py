"""Facts grouped by their subject, for edits of several facts a subject."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from knowedit.facts.fact import Fact, FactError, Probe


def share_subjects(facts: Sequence[Fact]) -> bool:
    """Whether at least half of `facts` have their subject in common with another one."""
    count = Counter(fact.subject for fact in facts)
    return 2 * sum(n for n in count.values() if n > 1) >= max(len(facts), 1)


def groups(
    found: Sequence[Fact],
    *,
    least: int = 1,
    most: int | None = None,
    pool: Sequence[Fact] = (),
    further: int = 2,
) -> list[list[Fact]]:
    """`found` by subject, at most one fact a relation, in order of first appearance.

    Args:
        least, most: subjects with fewer facts than `least` are left out; of more than `most` the
            first are kept.
        pool: facts on other subjects. Up to `further` of the same relation and true object become
            further neighbours of each fact.

    A neighbour whose prompt names one of the subjects is left out: it may rightly change.

    Raises:
        FactError: `least` or `most` below 1, or `most` below `least`.
    """
    if least < 1 or (most is not None and most < least):
        raise FactError(
            f"least must be at least 1 and most no smaller, got least {least}, most {most}"
        )
    by_subject: dict[str, dict[str, Fact]] = {}
    for fact in found:
        by_subject.setdefault(fact.subject, {}).setdefault(fact.relation or fact.prompt, fact)
    edited = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, by_subject))})(?!\w)")
    alike: dict[tuple[str | None, str | None], list[Fact]] = {}
    for other in pool:
        if not edited.search(other.text):
            alike.setdefault((other.relation, other.true), []).append(other)
    return [
        [
            _neighboured(fact, alike.get((fact.relation, fact.true), ()), further, edited)
            for fact in [*group.values()][:most]
        ]
        for group in by_subject.values()
        if len(group) >= least
    ]


def halves(
    grouped: Sequence[list[Fact]], seed: int = 0
) -> tuple[list[list[Fact]], list[list[Fact]]]:
    """Two halves to tune on and to report on, drawn separately for each number of facts; no subject
    is in both.
    """
    rng = random.Random(seed)
    order = sorted(rng.sample(range(len(grouped)), len(grouped)), key=lambda i: len(grouped[i]))
    picked = [sorted(order[start::2]) for start in (0, 1)]
    return [grouped[i] for i in picked[0]], [grouped[i] for i in picked[1]]


def _neighboured(fact: Fact, others: Sequence[Fact], further: int, edited: re.Pattern[str]) -> Fact:
    known = [probe for probe in fact.neighbours if not edited.search(probe.prompt)]
    seen = {probe.prompt for probe in known}
    fresh = {
        other.subject: Probe(other.text, other.true)
        for other in others
        if fact.true and other.text not in seen
    }
    return replace(fact, neighbours=(*known, *[*fresh.values()][:further]))
