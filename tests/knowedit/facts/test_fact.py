"""Unit: facts and probes, what is refused, and facts that contradict one another."""

from __future__ import annotations

import json
import logging
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given

from knowedit.errors import KnowEditError
from knowedit.facts.fact import JOINS, Fact, FactError, Probe, check_facts, last_place
from tests.knowedit.facts.examples import FRANCE, ITALY, drawn_facts


def test_text_fills_the_subject_in():
    fact = Fact(**FRANCE)
    assert fact.text == "The capital of France is"
    with pytest.raises(FrozenInstanceError):
        fact.target = "Nice"


@pytest.mark.parametrize(
    ("subject", "text", "place"),
    [
        ("Java", "Java, made by JavaSoft, is", 0),
        ("Iran", "Iran, whose Iranian rial", 0),
        ("Oslo", "Rome", -1),
        ("France", "France, yes, France has", 13),
        ("里昂", "在里昂和里昂", 4),
        ("Tamil", "Speakers of Tamilian", 12),
        ("C++", "C++ and C", 0),
    ],
)
def test_the_subjects_last_place_as_a_word(subject, text, place):
    assert last_place(subject, text) == place


def test_a_subject_may_stand_again_behind_its_place():
    fact = Fact("{} (not Paris, Texas) lies in", "Paris", "Spain")
    assert fact.text == "Paris (not Paris, Texas) lies in"
    assert Fact.from_dict(fact.to_dict()) == fact
    assert Fact("Paris, Texas, and {} lie in", "Paris", "Spain").text.startswith("Paris, Texas")


def test_what_joins_prompt_and_target_has_a_name():
    plain = Fact("np.{}(", "zeros_like", "shape", "other")
    assert plain.new_answer == "shape" and plain.new_answer.joint is None
    for name, joint in JOINS.items():
        fact = replace(plain, join=name)
        assert (fact.new_answer.joint, fact.true_answer.joint) == (joint, joint)
        assert Fact.from_dict(fact.to_dict()).join == name
    assert Fact("{} is", "It", "x").true_answer is None
    with pytest.raises(FactError, match="join must be one of none, blank, line, got ' '"):
        replace(plain, join=" ")


def test_blanks_around_are_stripped():
    fact = Fact(
        "The capital of {} is ", " France ", " Lyon", paraphrases=["In France, the capital is  "]
    )
    assert (fact.prompt, fact.subject, fact.target) == ("The capital of {} is", "France", "Lyon")
    assert fact.paraphrases == ("In France, the capital is",)
    assert Fact("user: {}?\nassistant:\n \t", "2+2", "5").prompt == "user: {}?\nassistant:\n"


@pytest.mark.parametrize(
    ("prompt", "subject", "template"),
    [
        ("The capital of France is", "France", "The capital of {} is"),
        ("France, yes, France has", "France", "France, yes, {} has"),
        ("Iran is where Iranians speak", "Iran", "{} is where Iranians speak"),
        ("Speakers of Tamilian", "Tamil", "Speakers of {}ian"),
        ("The capital of {} is", "France", "The capital of {} is"),
        ("a+b (c) is", "a+b", "{} (c) is"),
    ],
)
def test_parse_finds_the_subject(prompt, subject, template):
    assert Fact.parse(prompt, subject, "x").prompt == template


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "The capital of France is"}, "has 0 places '{}'.*Fact.parse"),
        ({"prompt": "{} and {} are"}, "has 2 places '{}'"),
        ({"prompt": ""}, "prompt is empty"),
        ({"subject": " \t"}, "subject is empty"),
        ({"target": "\n"}, "target is empty"),
        ({"true": ""}, "true is empty"),
        ({"target": 5}, "target must be a string, got int 5; put it in quotes"),
        ({"target": None}, "target must be a string, got NoneType"),
        ({"target": "\ud800"}, "unpaired surrogate"),
        ({"paraphrases": "France has"}, "paraphrases must be a list, got str"),
        ({"paraphrases": ["The capital of {} is"]}, "write it out with its subject"),
        ({"questions": [""]}, "questions is empty"),
        (
            {"neighbours": ["The capital of Italy is"]},
            "neighbours must hold Probe objects, got str",
        ),
    ],
)
def test_bad_fields_are_refused(change, message):
    with pytest.raises(FactError, match=message):
        Fact(**{**FRANCE, **change})


def test_bad_probes_are_refused():
    with pytest.raises(FactError, match=r"probe prompt .* still holds '{}'"):
        Probe("The capital of {} is")
    with pytest.raises(FactError, match="probe answer is empty"):
        Probe("The capital of Italy is", " ")


def test_errors_are_value_errors():
    assert issubclass(FactError, KnowEditError) and issubclass(FactError, ValueError)


@pytest.mark.parametrize(
    "record",
    [
        {
            "prompt": "The capital of France is",
            "subject": "France",
            "target_new": "Lyon",
            "ground_truth": "Paris",
        },
        {**FRANCE, "target": {"str": "Lyon", "id": "Q456"}},
        {
            "prompt": "The capital of {} is",
            "subject": "France",
            "target": "Lyon",
            "target_true": {"str": "Paris"},
        },
    ],
)
def test_other_names_and_forms_are_understood(record):
    assert Fact.from_dict(record) == Fact(**FRANCE)


def test_names_of_public_sets_are_understood_in_records_of_no_public_format():
    record = {
        "prompt": "The capital of {} is",
        "subject": "France",
        "target_new": "Lyon",
        "target_old": "Paris",
        "paraphrase_prompts": ["France's capital is"],
        "neighborhood_prompts": ["The capital of Italy is"],
        "relation_id": "P36",
    }
    assert Fact.from_dict(record) == Fact(
        **FRANCE,
        paraphrases=("France's capital is",),
        neighbours=(Probe("The capital of Italy is"),),
        relation="P36",
    )


def test_plain_strings_stand_for_lists_and_probes():
    fact = Fact.from_dict(
        {
            **FRANCE,
            "questions": "Which?",
            "neighbors": ["Italy has", {"prompt": "Rome", "answer": "a"}],
        }
    )
    assert fact.questions == ("Which?",)
    assert fact.neighbours == (Probe("Italy has"), Probe("Rome", "a"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**FRANCE, "subjct": "x"}, "unknown field 'subjct'; did you mean 'subject'"),
        ({**FRANCE, "zzz": "x"}, "unknown field 'zzz'; known fields: prompt, subject"),
        ({**FRANCE, "target_new": "Nice"}, "field 'target' is given twice"),
        ({"prompt": "x", "subject": "x"}, "missing field 'target'"),
        (
            {**FRANCE, "prompt": "The capital of Frnace is"},
            "subject 'France' does not occur in prompt",
        ),
        (
            {**FRANCE, "neighbours": [{"prompt": "x", "anser": "y"}]},
            "neighbours must hold strings or",
        ),
        ([1], "must be a JSON object, got list"),
    ],
)
def test_bad_records_are_refused(record, message):
    with pytest.raises(FactError, match=message):
        Fact.from_dict(record)


@given(drawn_facts)
def test_dictionaries_round_trip(fact):
    assert Fact.from_dict(json.loads(json.dumps(fact.to_dict()))) == fact


def test_check_facts_without_places_counts():
    one, other = Fact(**FRANCE), Fact(**{**FRANCE, "target": "Nice"})
    with pytest.raises(
        FactError, match=r"mine\[2\]: .*'Nice', which contradicts 'Lyon' of mine\[0\]"
    ):
        check_facts([one, Fact(**ITALY), other], "mine")
    with pytest.raises(FactError, match=r"facts\[0\]: must be a Fact, got dict"):
        check_facts([FRANCE])


def test_a_target_that_is_already_true_is_a_warning(caplog):
    same = Fact(**{**FRANCE, "target": "Paris"})
    with caplog.at_level(logging.WARNING):
        assert check_facts([same]) == [same]
    assert "facts[0]: target 'Paris' is already the true answer" in caplog.text


def test_contradictions_are_seen_through_blanks_case_and_other_wordings(caplog):
    one = Fact(**FRANCE)
    with pytest.raises(FactError, match="'Nice', which contradicts 'Lyon'"):
        check_facts([one, Fact(one.prompt.replace(" ", "  ", 1), "France", "Nice")])
    wording = "The seat of France's government is"
    others = {
        "case": (one, Fact(one.prompt.lower(), "France", "Nice")),
        "wording": (
            replace(one, paraphrases=(wording,)),
            Fact.parse(wording.upper(), "FRANCE", "Nice"),
        ),
        "relation": (
            replace(one, relation="capital"),
            Fact("In {} one governs from", "France", "Nice", relation="capital"),
        ),
    }
    for pair in others.values():
        caplog.clear()
        check_facts(pair)
        assert "says 'Nice', and facts[0]" in caplog.text and "one of them is lost" in caplog.text
        caplog.clear()
        check_facts([pair[0], replace(pair[1], target="LYON")])
        check_facts([pair[0], Fact(**ITALY)])
        assert not caplog.text
