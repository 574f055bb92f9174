"""Answers counted as EasyEdit counts them: hand-computed cases, and the tokens themselves
(unit).
"""

from __future__ import annotations

import pytest
import torch

from knowedit.errors import KnowEditError
from knowedit.evaluation import evaluate
from knowedit.evaluation.definitions import accuracies, counted
from knowedit.evaluation.measures.base import Answer, Question
from knowedit.facts.fact import Fact, Probe
from knowedit.models.generation import Score
from tests.knowedit.evaluation.test_interview import an_edit

FACT = Fact(
    "The capital of {} is",
    "France",
    "Lyon and nothing else",
    "Paris",
    paraphrases=("France's capital is",),
    neighbours=(Probe("The capital of Italy is", "Rome, of course"),),
)


def answer(hits=0.0, choices=()):
    return Answer(Score(-1.0, hits == 1, hits, tuple(choices)), None)


def test_accuracy_is_a_share_of_tokens_and_locality_one_of_choices():
    asked = [
        *(Question(r, "efficacy", "p", "r", None) for r in (0, 1, 1)),
        *(Question(r, "neighbourhood", "p", "r", None) for r in (0, 1)),
    ]
    was = [*(answer() for _ in range(3)), answer(0, (5, 6, 7)), answer(1, (1, 2))]
    now = [answer(1), answer(1 / 3), answer(2 / 3), answer(0, (5, 6, 8)), answer(0, (3, 4))]
    found = accuracies(asked, now, was)
    assert found["efficacy"]["accuracy"].mean == pytest.approx((1 + (1 / 3 + 2 / 3) / 2) / 2)
    assert found["neighbourhood"]["accuracy"].mean == pytest.approx((2 / 3 + 0) / 2)
    assert accuracies(asked, was, was)["neighbourhood"]["accuracy"].mean == 1


def test_tokens_are_the_first_choices_of_the_model(tiny_llama):
    found = counted(evaluate(tiny_llama, an_edit(tiny_llama), [FACT], progress=False), "easyedit")
    row = tiny_llama.row(FACT.text, answer=FACT.new_answer)
    with torch.no_grad(), an_edit(tiny_llama).applied_to(tiny_llama):
        best = tiny_llama.hf(torch.tensor([row.ids])).logits[0].argmax(-1).tolist()
    right = [best[t - 1] == row.ids[t] for t in range(row.answer, len(row.ids))]
    assert len(right) > 2 and found.answers_after[0].right.choices == tuple(
        best[row.answer - 1 : -1]
    )
    assert found.after["efficacy"]["accuracy"].mean == pytest.approx(sum(right) / len(right))
    assert found.before["neighbourhood"]["accuracy"].mean == 1
    assert found.after["neighbourhood"]["accuracy"].mean < 1  # the edit is a large one
    assert {"success", "exact", "accuracy"} <= set(found.after["paraphrase"])


def test_the_usual_definition_changes_nothing_and_others_are_named(tiny_llama):
    found = evaluate(tiny_llama, None, [FACT], progress=False)
    assert counted(found, "memit") is found
    with pytest.raises(KnowEditError, match="unknown definition 'rome'; known: memit, easyedit"):
        counted(found, "rome")
