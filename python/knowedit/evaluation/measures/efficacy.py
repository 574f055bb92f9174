"""Efficacy (Meng et al. 2022, ES and EM): does the edited prompt get the new answer?"""

from __future__ import annotations

from knowedit.evaluation.measures.base import FactMeasure, Question, register
from knowedit.facts.fact import Fact


@register
class Efficacy(FactMeasure):
    """The edited prompt itself: success = p(new) > p(true)."""

    name, about, place = "efficacy", "the edited prompt prefers the new answer", 0
    shown = ("success", "exact")

    def questions(self, record: int, fact: Fact) -> list[Question]:
        return [Question(record, self.name, fact.text, fact.new_answer, fact.true_answer)]
