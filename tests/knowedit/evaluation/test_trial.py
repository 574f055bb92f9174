"""Unit: both answers of a trial are the model's own, and the model is left as it was."""

from __future__ import annotations

import pytest

import knowedit as ke
from knowedit.errors import KnowEditError
from knowedit.evaluation.trial import Trial, nearest_facts
from knowedit.methods.registry import make_method
from knowedit.models.fingerprint import weights_fingerprint
from tests.knowedit.methods.test_locate import FACTS, statistics_of

MEMIT = {"kind": "memit", "layers": [1], "target": {"steps": 2}}


def test_both_answers_are_the_models_own(tiny_llama):
    edit = make_method(MEMIT).compute(tiny_llama, FACTS[:2], statistics_of(tiny_llama, [1]))
    before, text = weights_fingerprint(tiny_llama.hf), FACTS[0].text
    found = Trial(tiny_llama, [edit]).ask(text, tokens=5)
    assert weights_fingerprint(tiny_llama.hf) == before and not tiny_llama.ledger.active
    assert found["before"]["text"] == tiny_llama.generate([text], 5)[0]
    with edit.applied_to(tiny_llama):
        assert found["after"]["text"] == tiny_llama.generate([text], 5)[0]
        (score,) = tiny_llama.score([text], [FACTS[0].target])
        likely = tiny_llama.next_logprobs([text])[0].exp()
    assert found["facts"][0]["after"][FACTS[0].target] == pytest.approx(score.probability)
    assert found["after"]["next"][0][1] == pytest.approx(float(likely.max()))
    for bad, why in ((("  ",), "empty"), ((text,), "tokens must")):
        with pytest.raises(KnowEditError, match=why):
            Trial(tiny_llama, [edit]).ask(*bad, tokens=0)
    with pytest.raises(KnowEditError, match="no chat template"):
        Trial(tiny_llama, [edit]).ask(text, chat=True)


def test_facts_of_the_subject_come_first():
    def fact(prompt, subject):
        return ke.Fact(prompt, subject, "x")

    facts = [
        fact("The capital of {} is", "Italy"),
        fact("{} speaks", "France"),
        fact("The capital city of {} is", "Spain"),
    ]
    found = nearest_facts("What is the capital of france?", facts, 2)
    assert [one.subject for one in found] == ["France", "Italy"]
