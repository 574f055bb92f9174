"""Neighbourhood, or specificity (Meng et al. 2022, NS and NM): do other subjects keep their true
answer?
"""

from __future__ import annotations

from knowedit.evaluation.measures.base import Answer, FactMeasure, Question, register
from knowedit.facts.fact import Fact


@register
class Neighbourhood(FactMeasure):
    """The fact's neighbours: success = p(true) > p(new); unchanged = the same decision as before
    the edit.
    """

    name, about, place = "neighbourhood", "other subjects keep their true answer", 2
    shown = ("success", "unchanged")
    shares = (*FactMeasure.shares, "unchanged")

    def questions(self, record: int, fact: Fact) -> list[Question]:
        answers = [(probe.prompt, probe.answer or fact.true) for probe in fact.neighbours]
        return [
            Question(record, self.name, prompt, true, fact.target)
            for prompt, true in answers
            if true is not None
        ]

    def values(self, answer: Answer, before: Answer | None) -> dict[str, float]:
        found = super().values(answer, before)
        if before is not None:
            found["unchanged"] = float(answer.success == before.success)
        return found
