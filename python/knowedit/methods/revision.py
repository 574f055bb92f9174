"""Correcting and forgetting: facts of a history are taken out, and others are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from knowedit.edits.edit import Edit
from knowedit.edits.history import History, Place
from knowedit.facts.fact import Fact, FactError
from knowedit.methods.base import Method
from knowedit.methods.locate.removal import after_removal
from knowedit.models.editable import EditableModel
from knowedit.statistics import KeyStatistics


def check_standing(history: History, facts: Sequence[Fact]) -> None:
    """Raise FactError for a fact whose prompt and subject nothing was written for."""
    standing = {(fact.prompt, fact.subject) for fact in history.facts}
    for fact in facts:
        if (fact.prompt, fact.subject) not in standing:
            raise FactError(
                f"nothing that stands in the history says {fact.text!r}: there is nothing to "
                "correct or forget; `write` writes it"
            )


def revise(
    method: Method,
    model: EditableModel,
    facts: Sequence[Fact],
    statistics: KeyStatistics | None,
    history: History,
    *,
    forget: bool = False,
    progress: bool = True,
) -> Edit:
    """One edit that takes out what the history says of the facts' prompts and subjects, and writes
    `facts` instead (`forget`: nothing). What stood in one group with them is written again.

    The result is that of the joint write with the new facts and without the old ones, where the
    sequence is that of its facts (one edited layer, fixed values, a fixed weight).

    Raises:
        FactError: a fact repeats what stands already.
        EditError: what is to be taken out cannot be, taken by itself.
    """
    new = [] if forget else list(facts)
    stale, said = history.find(facts), {(f.prompt, f.subject): f.target for f in new}
    for place in stale:
        if said.get((place.fact.prompt, place.fact.subject)) == place.fact.target:
            raise FactError(f"{place.fact.text!r} says {place.fact.target!r} already; leave it out")
    asked = {(fact.prompt, fact.subject) for fact in facts}
    with_them = [p.fact for p in stale if (p.fact.prompt, p.fact.subject) not in asked]
    removed = method.removal(model, stale, statistics, history)
    if not new and not with_them:
        return method.recorded(removed, model, statistics)
    with removed.applied_to(model), _unsaid(model, stale):
        longer = history.followed_by(removed)
        made = method.compute(
            model, [*new, *with_them], statistics, history=longer, progress=progress
        )
    return after_removal(made, removed, model)


@contextmanager
def _unsaid(model: EditableModel, places: Sequence[Place]) -> Iterator[None]:
    """Let nobody be warned that a write contradicts the facts at `places`, whose place it takes."""
    gone = [(place.edit.key, place.fact) for place in places]
    told = {what: said for what, said in model.told.items() if said in gone}
    for what in told:
        del model.told[what]
    try:
        yield
    finally:
        model.told.update(told)
