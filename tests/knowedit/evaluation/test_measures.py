"""Unit: the register of measures, and a measure in a file of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from knowedit.errors import KnowEditError
from knowedit.evaluation import evaluate
from knowedit.evaluation.measures import base
from knowedit.evaluation.measures.base import (
    FactMeasure,
    Question,
    chosen,
    fact_measures,
    measures,
    model_measures,
    questions,
    register,
)
from knowedit.facts.fact import Fact, Probe
from tests.knowedit.edits.test_edit import an_edit

FACT = Fact(
    "The capital of {} is",
    "France",
    "Lyon",
    "Paris",
    paraphrases=("France's capital is",),
    neighbours=(Probe("The capital of Italy is", "Rome"),),
    portability=(Probe("The river through the capital of France is the", "Rhône"),),
)


def test_every_file_is_a_measure_in_the_order_of_tables():
    assert list(measures()) == [
        "efficacy",
        "paraphrase",
        "neighbourhood",
        "portability",
        "drift",
        "perplexity",
    ]
    assert all(m.about and m.name == name for name, m in measures().items())
    assert list(model_measures(texts=False)) == ["drift"]


def test_unknown_and_repeated_names():
    assert list(chosen(["drift", "efficacy"])) == ["efficacy", "drift"]
    with pytest.raises(KnowEditError, match="unknown measure 'efficiency'; known: efficacy"):
        questions(0, FACT, ["efficiency"])
    with pytest.raises(ValueError, match="a measure 'efficacy' already"):
        register(type(measures()["efficacy"]))


def test_a_neighbour_whose_answer_is_the_new_object_is_not_asked():
    """It would be preferred to itself."""
    own = (Probe("The home of Lyon's opera is", "lyon"), *FACT.neighbours, Probe("Berne is in"))
    asked = questions(0, replace(FACT, neighbours=own), ["neighbourhood"])
    assert [question.right for question in asked] == ["Rome"]


def test_portability_asks_what_follows(tiny_llama):
    (asked,) = questions(3, FACT, ["portability"])
    assert (asked.record, asked.right, asked.wrong) == (3, "Rhône", None)
    found = evaluate(tiny_llama, None, [FACT], progress=False)
    assert list(found.after["portability"]) == ["exact"]  # no answer to prefer it to


def test_a_new_measure_moves_no_other(tiny_llama, monkeypatch):
    """A class is all it takes; the intervals of the others are as they were."""
    facts = [FACT, Fact("{} lies in", "Lima", "Peru", "Oslo", paraphrases=("Lima is in",))]
    edit = an_edit(tiny_llama, size=3.0)
    before = evaluate(tiny_llama, edit, facts, progress=False)
    monkeypatch.setattr(base, "_KNOWN", dict(base._KNOWN))

    @register
    class Shouted(FactMeasure):
        name, about, place = "shouted", "in capitals", 0

        def questions(self, record, fact):
            return [Question(record, self.name, fact.text.upper(), fact.target, fact.true)]

    assert "shouted" in fact_measures()
    after = evaluate(tiny_llama, edit, facts, progress=False)
    asked = [q.prompt for q in after.questions if q.kind == "shouted"]
    assert asked == ["THE CAPITAL OF FRANCE IS", "LIMA LIES IN"]
    assert after.after["shouted"]["magnitude"].records == 2
    for when in ("before", "after"):
        rest = {k: v for k, v in getattr(after, when).items() if k != "shouted"}
        assert rest == getattr(before, when)
