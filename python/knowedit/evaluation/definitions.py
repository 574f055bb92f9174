"""The same answers, counted as other projects count them.

* `memit` (Meng et al. 2022): which of two answers is likelier. What every table here has.
* `easyedit` (Wang et al. 2023, teacher forcing): `accuracy` is the share of the right answer's
  tokens that are the model's first choice, given the ones before; for neighbours (its locality) it
  is the share of places where the first choice is the one of the unedited model, right or wrong.
  Its rewrite, rephrase and portability accuracy are those of `efficacy`, `paraphrase` and
  `portability` here.

A single wrong token of three leaves an `accuracy` of 0.67 and makes an answer not `exact`: that is
why the same edit has better figures there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from knowedit.errors import KnowEditError
from knowedit.evaluation.evaluation import Estimates, Evaluation, estimate
from knowedit.evaluation.measures.base import Answer, Question

DEFINITIONS = ("memit", "easyedit")
#: Measures whose answers are to stay what they were.
STAYS = ("neighbourhood",)


def check_definition(name: str) -> None:
    """Raises KnowEditError for an unknown one."""
    if name not in DEFINITIONS:
        raise KnowEditError(f"unknown definition {name!r}; known: {', '.join(DEFINITIONS)}")


def counted(evaluation: Evaluation, definition: str) -> Evaluation:
    """The evaluation with the figures of `definition` beside its own.

    Raises:
        KnowEditError: an unknown definition.
    """
    check_definition(definition)
    if definition == "memit":
        return evaluation
    asked, was = evaluation.questions, evaluation.answers_before
    return replace(
        evaluation,
        before=_with(evaluation.before, accuracies(asked, was, was)),
        after=_with(evaluation.after, accuracies(asked, evaluation.answers_after, was)),
    )


def accuracies(
    asked: Sequence[Question], answers: Sequence[Answer], before: Sequence[Answer]
) -> Estimates:
    """EasyEdit's figure of every kind of question: `{kind: {"accuracy": Estimate}}`."""
    found: Estimates = {}
    for kind in dict.fromkeys(question.kind for question in asked):
        mine = [i for i, question in enumerate(asked) if question.kind == kind]
        values = [
            _same(answers[i], before[i]) if kind in STAYS else answers[i].right.hits for i in mine
        ]
        owners = np.array([asked[i].record for i in mine])
        found[kind] = {"accuracy": estimate(np.array(values), owners)}
    return found


def _same(now: Answer, was: Answer) -> float:
    pairs = list(zip(now.right.choices, was.right.choices, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def _with(own: Estimates, others: Estimates) -> Estimates:
    return {kind: {**own.get(kind, {}), **others[kind]} for kind in others}
