"""Neighbourhood, or specificity (Meng et al. 2022, NS and NM): do other subjects keep their true
answer?
"""

from __future__ import annotations

from knowedit.evaluation.measures.base import Answer, FactMeasure, Question, register
from knowedit.facts.fact import Fact


@register
class Neighbourhood(FactMeasure):
    """The fact's neighbours (see `base.answered`): success = p(true) > p(new); unchanged = the same
    decision as before the edit. Not asked where the new object is the neighbour's own answer: there
    is nothing to decide between.
    """

    name, about, place = "neighbourhood", "other subjects keep their true answer", 2
    shown = ("success", "unchanged")
    shares = (*FactMeasure.shares, "unchanged")

    def questions(self, record: int, fact: Fact) -> list[Question]:
        return [
            Question(record, self.name, probe.prompt, probe.answer, fact.target)
            for probe in fact.neighbours
            if probe.answer is not None and not fact.says(probe.answer)
        ]

    def values(self, answer: Answer, before: Answer | None) -> dict[str, float]:
        found = super().values(answer, before)
        if before is not None:
            found["unchanged"] = float(answer.success == before.success)
        return found
