"""Unit: every public format is recognised and read; data: the real files are read whole."""

from __future__ import annotations

import json
import logging
import re

import pytest

from knowedit.facts.fact import Fact, FactError, Probe
from knowedit.facts.formats import FORMATS, NamedSet, fact_format, named_sets, recognise
from knowedit.facts.records import read_facts
from knowedit.facts.sets import load
from tests.knowedit.facts.examples import BASE, FLAT, ROME, save


def one(tmp_path, record):
    (fact,) = load(save(tmp_path / "facts.jsonl", record))
    return fact


def test_counterfact_flat(tmp_path):
    assert one(tmp_path, FLAT) == BASE
    generated = one(tmp_path, FLAT | {"rephrase_kind": "generation_prompt"})
    assert (
        generated.paraphrases == ()
        and one(tmp_path, FLAT | {"rephrase_kind": "paraphrase"}) == BASE
    )
    assert read_facts(tmp_path / "facts.jsonl") == [BASE]


def test_counterfact_of_rome(tmp_path):
    fact = one(tmp_path, ROME)
    assert fact.neighbours == (Probe("Bob Roy speaks", "French"),)
    assert fact.to_dict() | {"neighbours": 0} == BASE.to_dict() | {"neighbours": 0}
    (tmp_path / "counterfact.json").write_text(json.dumps([ROME]))
    assert (
        load(tmp_path / "counterfact.json") == read_facts(tmp_path / "counterfact.json") == [fact]
    )


def test_same_subject_groups(tmp_path):
    group = {
        "subject": "Ann Lee",
        "n": 2,
        "records": [FLAT, FLAT | {"prompt": "Ann Lee lives in", "case_id": 8}],
    }
    found = load(save(tmp_path / "facts.jsonl", group))
    assert [fact.text for fact in found] == ["The mother tongue of Ann Lee is", "Ann Lee lives in"]


def test_zsre(tmp_path):
    record = {
        "subject": "Ann Lee",
        "src": "Which tongue has Ann Lee?",
        "rephrase": "What does Ann Lee speak?",
        "alt": "English",
        "answers": ["French", "français"],
        "loc": "nq question: who won",
        "loc_ans": "Bob",
        "portability": {"New Question": "Who else speaks like Ann Lee?", "New Answer": "Eve"},
    }
    assert one(tmp_path, record) == Fact(
        "Which tongue has {}?",
        "Ann Lee",
        "English",
        "French",
        paraphrases=("What does Ann Lee speak?",),
        neighbours=(Probe("nq question: who won", "Bob"),),
        portability=(Probe("Who else speaks like Ann Lee?", "Eve"),),
    )
    assert one(tmp_path, {k: v for k, v in record.items() if k != "portability"}).portability == ()


@pytest.mark.parametrize(
    "answer", ["Dutch", ["Dutch", "Nederlands"], [["Dutch", "Nederlands"], ["x"]], [[], ["Dutch"]]]
)
def test_knowedit_takes_the_first_alias_of_any_form(tmp_path, answer, caplog):
    record = {
        "subject": "Ann Lee",
        "prompt": "The mother tongue of Ann Lee is",
        "target_new": "English",
        "locality": {
            "Relation_Specificity": [{"prompt": "Bob Roy speaks", "ground_truth": answer}]
        },
        "portability": {
            "Reasoning": [{"prompt": "Ann Lee's sister speaks", "ground_truth": "English"}],
            "Other": [],
        },
    }
    with caplog.at_level(logging.INFO):
        fact = one(tmp_path, record)
    assert fact.neighbours == (Probe("Bob Roy speaks", "Dutch"),) and fact.true is None
    assert fact.portability == (Probe("Ann Lee's sister speaks", "English"),)
    form = (
        "string"
        if isinstance(answer, str)
        else "list of lists"
        if isinstance(answer[0], list)
        else "list"
    )
    assert "knowedit format; answers as" in caplog.text and f"{form} (" in caplog.text


def test_wikibio(tmp_path):
    record = {
        "concept": "ann lee",
        "text": "A passage about ann lee. She",
        "labels": "was a smith.",
        "locality": {},
    }
    assert one(tmp_path, record) == Fact("A passage about {}. She", "ann lee", "was a smith.")


def test_mquake_cases_keep_their_edits_and_questions(tmp_path):
    edit = {
        "prompt": "The author of {} is",
        "subject": "Misery",
        "target_new": "Ann",
        "question": "Who wrote Misery?",
    }
    other = {
        "prompt": "{} lives in",
        "subject": "Ann",
        "target_new": {"str": "Rome"},
        "target_true": {"str": "Oslo"},
    }
    case = {
        "case_id": 3,
        "requested_rewrite": [edit, other],
        "questions": ["Where?"],
        "new_answer": "Rome",
    }
    first, second = load(save(tmp_path / "facts.jsonl", case))
    assert (first.id, first.questions, first.portability) == (
        "mquake:3:0",
        ("Who wrote Misery?",),
        (Probe("Where?", "Rome"),),
    )
    assert (second.id, second.true, second.portability) == ("mquake:3:1", "Oslo", ())


def test_known1000(tmp_path):
    record = {
        "known_id": 0,
        "subject": "Vinson Massif",
        "attribute": "Antarctica",
        "prompt": "Vinson Massif is in",
    }
    assert one(tmp_path, record) == Fact(
        "{} is in", "Vinson Massif", "Antarctica", "Antarctica", id="known:0"
    )


@pytest.mark.parametrize(
    ("groups", "probes"),
    [
        ({"Relation_Specificity": None, "Other": []}, ()),
        ({"Relation_Specificity": ["Bob Roy speaks"]}, (Probe("Bob Roy speaks"),)),
        ({"Relation_Specificity": "Bob Roy speaks"}, (Probe("Bob Roy speaks"),)),
        (["Bob Roy speaks"], (Probe("Bob Roy speaks"),)),
        ({"A": {"prompt": "Bob Roy speaks", "ground_truth": "a"}}, (Probe("Bob Roy speaks", "a"),)),
        (None, ()),
    ],
)
def test_groups_of_knowedit_that_are_null_or_flat(tmp_path, groups, probes):
    record = {"subject": "Ann Lee", "prompt": "Ann Lee speaks", "target_new": "English"}
    found = one(tmp_path, {**record, "locality": {}, "portability": groups})
    assert found == Fact("{} speaks", "Ann Lee", "English", portability=probes)


def test_a_former_answer_has_several_names(tmp_path):
    named = {"target_old": FLAT["ground_truth"], **FLAT}
    del named["ground_truth"]
    assert one(tmp_path, named) == BASE


def test_broken_public_records_name_their_place(tmp_path, caplog):
    broken = ROME | {"requested_rewrite": {"prompt": "x", "subject": "y"}}
    said = r"facts\.jsonl:2: counterfact record without 'target_new'"
    path = save(tmp_path / "facts.jsonl", ROME, broken)
    with pytest.raises(FactError, match=said):
        read_facts(path)
    assert len(load(path)) == 1 and re.search(f"left out 1 record .*{said}", caplog.text)
    with pytest.raises(FactError, match=said):
        load(path, strict=True)
    with pytest.raises(FactError, match="1: counterfact record without 'target_new'"):
        load(save(tmp_path / "facts.jsonl", broken))


def test_records_without_their_subject_are_left_out_and_named(tmp_path, caplog):
    path = save(tmp_path / "facts.jsonl", FLAT, FLAT | {"subject": "Anne Lee"})
    assert load(path) == [BASE]
    assert (
        "left out 1 record" in caplog.text
        and "facts.jsonl:2: subject 'Anne Lee' does not occur" in caplog.text
    )
    with pytest.raises(FactError, match=r"facts\.jsonl:2: subject 'Anne Lee' does not occur"):
        read_facts(path)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "count", "paraphrases", "neighbours", "portability"),
    [
        ("counterfact", 254, 508, 2540, 0),
        ("counterfact-flat", 2000, 309, 2000, 0),
        ("same-subject", 796, 0, 796, 0),
        ("zsre", 600, 600, 600, 600),
        ("knowedit-wiki-counterfact", 900, 0, 1296, 1406),
        ("knowedit-wiki-recent", 570, 0, 1946, 751),
        ("knowedit-wikibio", 306, 0, 612, 0),
        ("knowedit-zsre", 797, 797, 1594, 797),  # of 800: three prompts do not name their subject
        ("mquake", 1329, 0, 0, 1974),
        ("known1000", 1209, 0, 0, 0),
    ],
)
def test_the_real_files_are_read_whole(data, name, count, paraphrases, neighbours, portability):
    facts = load(name)
    assert len(facts) == count
    assert sum(len(fact.paraphrases) for fact in facts) == paraphrases
    assert sum(len(fact.neighbours) for fact in facts) == neighbours
    assert sum(len(fact.portability) for fact in facts) == portability
    assert all(fact.subject in fact.text for fact in facts)


# -- the register

EXAMPLES = {
    "counterfact": (FLAT, ROME),
    "knowedit": (
        {"concept": "ann", "text": "ann is", "labels": "a smith"},
        {"subject": "Ann", "prompt": "Ann is", "target_new": "Eve", "locality": {}},
    ),
    "known1000": ({"known_id": 0, "subject": "Ann", "attribute": "Rome", "prompt": "Ann is in"},),
    "mquake": ({"case_id": 3, "requested_rewrite": [], "questions": []},),
    "same_subject": ({"subject": "Ann Lee", "records": [FLAT]},),
    "zsre": ({"subject": "Ann", "src": "Who?", "alt": "Eve", "answers": [], "loc": "nq: x"},),
}


def test_every_format_recognises_its_own_records_and_no_others():
    assert EXAMPLES.keys() == FORMATS.keys()
    for name, records in EXAMPLES.items():
        for record in records:
            assert [form.name for form in FORMATS.values() if form.matches(record)] == [name]
    assert recognise(BASE.to_dict()) is None and recognise({}) is None


def test_every_set_has_a_name_of_its_own_and_files():
    names = [named.name for named in named_sets()]
    assert len(set(names)) == len(names) and {"counterfact", "zsre"} <= set(names)
    assert all(named.files and named.what for named in named_sets())


def test_a_new_format_is_one_function(tmp_path, monkeypatch):
    @fact_format(
        "invented",
        matches=lambda record: "invented" in record,
        sets=[NamedSet("invented-set", "mine", ("invented.jsonl",))],
    )
    def invented(record, forms):
        subject, verb, new = record["invented"]
        yield Fact.parse(f"{subject} {verb}", subject, new)

    save(tmp_path / "invented.jsonl", {"invented": ["Ann Lee", "speaks", "English"]})
    monkeypatch.setenv("KNOWEDIT_DATA", str(tmp_path))
    try:
        assert load("invented-set") == [Fact("{} speaks", "Ann Lee", "English")]
        broken = save(tmp_path / "broken.jsonl", {"invented": ["Ann Lee"]})
        with pytest.raises(FactError, match=r"broken\.jsonl:1: invented record with a field"):
            load(broken)
        for name, sets, said in (
            ("invented", (), "fact format 'invented' is registered twice"),
            ("other", [NamedSet("mquake", "", ("a",))], "data set 'mquake' is registered already"),
        ):
            with pytest.raises(FactError, match=said):
                fact_format(name, matches=lambda record: False, sets=sets)(invented)
    finally:
        del FORMATS["invented"]
