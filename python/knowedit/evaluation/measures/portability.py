"""Portability (Yao et al. 2023): does what follows from the new fact hold too?"""

from __future__ import annotations

from knowedit.evaluation.measures.base import FactMeasure, Question, register
from knowedit.facts.fact import Fact


@register
class Portability(FactMeasure):
    """Prompts that follow from the fact: aliases, further hops; exact = every token of the answer
    is the model's first choice.
    """

    name, about, place = "portability", "what follows from the new fact holds", 3
    shown = ("exact",)

    def questions(self, record: int, fact: Fact) -> list[Question]:
        return [
            Question(record, self.name, probe.prompt, probe.answer, None)
            for probe in fact.portability
            if probe.answer is not None
        ]
