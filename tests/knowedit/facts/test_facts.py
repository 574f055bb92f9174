"""Facts: what is refused, and that files give back what was written."""

from __future__ import annotations

import gzip
import json
import logging
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from knowedit.errors import KnowEditError
from knowedit.facts.fact import Fact, FactError, Probe, check_facts, read_facts, write_facts
from knowedit.models.tokens import join, last_place

FRANCE = {"prompt": "The capital of {} is", "subject": "France", "target": "Lyon", "true": "Paris"}
FORMATS = [".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz"]

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
wordings = texts.filter(lambda t: "{}" not in t)
probes = st.builds(Probe, wordings, st.none() | texts)
lists = st.lists(wordings, max_size=3).map(tuple)


def a_fact(**fields):
    try:
        return Fact(**fields)
    except FactError as error:
        assume("stands behind" not in str(error))  # the subject happens to be in the prompt again
        raise


facts = st.builds(
    a_fact,
    prompt=st.tuples(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), wordings)
    .map("{}".join)
    .filter(lambda t: t.count("{}") == 1),
    subject=texts,
    target=texts,
    true=st.none() | texts,
    paraphrases=lists,
    neighbours=st.lists(probes, max_size=3).map(tuple),
    questions=lists,
    instructions=lists,
    relation=st.none() | texts,
    id=st.none() | texts,
    portability=st.lists(probes, max_size=2).map(tuple),
)


def lines(path, *records):
    path.write_text(
        "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records), "utf-8"
    )
    return path


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


def test_a_subject_that_stands_again_behind_its_place_is_refused():
    with pytest.raises(FactError, match="stands behind the '{}'"):
        Fact("{} (not Paris, Texas) lies in", "Paris", "Spain")
    assert Fact("Paris, Texas, and {} lie in", "Paris", "Spain").text.startswith("Paris, Texas")


@pytest.mark.parametrize(
    ("prompt", "answer", "whole"),
    [
        ("The capital is", "Lyon", "The capital is Lyon"),
        ("2+2=", "5", "2+2=5"),
        ("法国的首都是", "里昂", "法国的首都是里昂"),
        ("กรุงเทพอยู่ใน", "ไทย", "กรุงเทพอยู่ในไทย"),
        ("首都是", "Lyon", "首都是 Lyon"),
        ("수도는", "리옹", "수도는 리옹"),
        ("", "Lyon", "Lyon"),
        ("ends in ", "Lyon", "ends in Lyon"),
    ],
)
def test_a_blank_before_the_answer_where_the_script_has_one(prompt, answer, whole):
    assert join(prompt, answer) == whole


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


@given(facts)
def test_dictionaries_round_trip(fact):
    assert Fact.from_dict(json.loads(json.dumps(fact.to_dict()))) == fact


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)
@given(
    st.lists(facts, min_size=1, max_size=4, unique_by=lambda f: (f.prompt, f.subject)),
    st.sampled_from(FORMATS),
)
def test_files_round_trip(tmp_path, written, suffix):
    path = tmp_path / f"facts{suffix}"
    write_facts(path, written)
    assert read_facts(path) == written


@pytest.mark.parametrize("suffix", FORMATS)
def test_equal_facts_give_equal_bytes_and_no_leftovers(tmp_path, suffix):
    for name in "ab":
        write_facts(tmp_path / (name + suffix), [Fact(**FRANCE)])
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "facts.jsonl"
    write_facts(path, [Fact(**FRANCE)])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_facts(path, [])
    assert read_facts(path) == [Fact(**FRANCE)] and list(tmp_path.iterdir()) == [path]


def test_byte_order_marks_and_line_ends_do_not_matter(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(FRANCE).encode() + b"\r\n\r\n")
    assert read_facts(path) == [Fact(**FRANCE)]
    path = tmp_path / "facts.csv"
    path.write_bytes(
        b"\xef\xbb\xbfprompt,subject,target,true\r\nThe capital of {} is,France,Lyon,Paris\r\n"
    )
    assert read_facts(path) == [Fact(**FRANCE)]


def test_csv_cells_may_hold_one_text_or_a_list(tmp_path):
    path = lines(
        tmp_path / "facts.csv",
        "prompt,subject,target,true,questions,neighbours\n",
        'The capital of {} is,France,Lyon,,What is it?,"[{""prompt"": ""Italy has"", '
        '""answer"": ""Rome""}]"\n',
    )
    (fact,) = read_facts(path)
    assert fact.true is None and fact.questions == ("What is it?",)
    assert fact.neighbours == (Probe("Italy has", "Rome"),)


GOOD = {**FRANCE, "subject": "Italy"}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [GOOD, {**FRANCE, "prompt": "The capital of Frnace is"}],
            r"facts\.jsonl:2: subject 'France' does not occur",
        ),
        ([GOOD, "\n", {**FRANCE, "target": " "}], r"facts\.jsonl:3: target is empty"),
        (
            [GOOD, FRANCE, FRANCE],
            r"facts\.jsonl:3: 'The capital of France is' repeats .*facts\.jsonl:2; remove",
        ),
        (
            [FRANCE, GOOD, {**FRANCE, "target": "Nice"}],
            r"jsonl:3: .*'Nice', which contradicts 'Lyon' of .*jsonl:1;",
        ),
        (
            [GOOD, {**FRANCE, "tagret": "x"}],
            r"facts\.jsonl:2: unknown field 'tagret'; did you mean 'target'",
        ),
        ([GOOD, '{"prompt": \n'], r"facts\.jsonl:2: not valid JSON at column 12"),
        ([GOOD, "[1]\n"], r"facts\.jsonl:2: a fact must be a JSON object, got list"),
        ([], r"facts\.jsonl: holds no facts"),
        (["\n"], r"facts\.jsonl: holds no facts"),
    ],
)
def test_errors_name_file_and_line(tmp_path, records, message):
    with pytest.raises(FactError, match=message):
        read_facts(lines(tmp_path / "facts.jsonl", *records))


def test_json_errors_name_the_record(tmp_path):
    path = lines(tmp_path / "facts.json", json.dumps([GOOD, {**FRANCE, "target": ""}]))
    with pytest.raises(FactError, match=r"facts\.json: record 2: target is empty"):
        read_facts(path)
    with pytest.raises(
        FactError, match=r"facts\.json: must hold a JSON list.*name the file \.jsonl"
    ):
        read_facts(lines(path, FRANCE))
    with pytest.raises(FactError, match=r"facts\.json: not valid JSON at line 2, column"):
        read_facts(lines(path, "[\n{]"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            "prompt,subject,target\nA {} is,x,y\nB {} is,x\n",
            r"facts\.csv:3: 2 cells under 3 columns",
        ),
        ("prompt,subject,target\nA {} is,x,\n", r"facts\.csv:2: target is empty"),
        (
            'prompt,subject,target\n"A\n{} is",x,y\nB is,z,y\n',
            r"facts\.csv:4: subject 'z' does not occur",
        ),
        ("prompt,subject,subject\nA {} is,x,y\n", r"facts\.csv:1: a column is named twice"),
        ('prompt,subject,target\n"A {} is,x,y\n', r"facts\.csv:2: broken CSV"),
        ("prompt,subject,target,questions\nA {} is,x,y,[1\n", r"facts\.csv:2: not valid JSON"),
        (
            "prompt,subjekt,target\nA {} is,x,y\n",
            r"facts\.csv:2: unknown field 'subjekt'; did you mean 'subject'",
        ),
    ],
)
def test_csv_errors_name_the_line(tmp_path, rows, message):
    with pytest.raises(FactError, match=message):
        read_facts(lines(tmp_path / "facts.csv", rows))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_bad_encoding_is_named_with_line_and_byte(tmp_path, pack):
    path = tmp_path / ("facts.jsonl" if pack is bytes else "facts.jsonl.gz")
    path.write_bytes(pack(json.dumps(GOOD).encode() + '\n{"prompt": "café'.encode("latin-1")))
    with pytest.raises(
        FactError, match=r"facts\.jsonl(\.gz)?:2: byte 16 \(0xe9\) is not UTF-8; save the file"
    ):
        read_facts(path)


def test_broken_archives_missing_files_and_strange_kinds(tmp_path):
    path = tmp_path / "facts.jsonl.gz"
    write_facts(path, [Fact(**FRANCE)])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FactError, match=r"facts\.jsonl\.gz: broken gzip archive after line \d"):
        read_facts(path)
    with pytest.raises(FactError, match=r"none\.jsonl: cannot be read \(No such file"):
        read_facts(tmp_path / "none.jsonl")
    for act in (read_facts, lambda p: write_facts(p, [])):
        with pytest.raises(FactError, match=r"facts\.yaml: unknown kind of file"):
            act(tmp_path / "facts.yaml")


def test_check_facts_without_places_counts():
    one, other = Fact(**FRANCE), Fact(**{**FRANCE, "target": "Nice"})
    with pytest.raises(
        FactError, match=r"mine\[2\]: .*'Nice', which contradicts 'Lyon' of mine\[0\]"
    ):
        check_facts([one, Fact(**GOOD), other], "mine")
    with pytest.raises(FactError, match=r"facts\[0\]: must be a Fact, got dict"):
        check_facts([FRANCE])


def test_a_target_that_is_already_true_is_a_warning(caplog):
    same = Fact(**{**FRANCE, "target": "Paris"})
    with caplog.at_level(logging.WARNING):
        assert check_facts([same]) == [same]
    assert "facts[0]: target 'Paris' is already the true answer" in caplog.text
