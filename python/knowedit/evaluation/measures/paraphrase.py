"""Paraphrase (Meng et al. 2022, PS and PM): does the edit hold in other words?"""

from __future__ import annotations

from knowedit.evaluation.measures.base import FactMeasure, Question, register
from knowedit.facts.fact import Fact


@register
class Paraphrase(FactMeasure):
    """The fact's paraphrases: success = p(new) > p(true)."""

    name, about, place = "paraphrase", "other wordings prefer the new answer", 1

    def questions(self, record: int, fact: Fact) -> list[Question]:
        return [
            Question(record, self.name, prompt, fact.new_answer, fact.true_answer)
            for prompt in fact.paraphrases
        ]
