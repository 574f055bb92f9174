"""Unit: files of facts give back what was written, and every error names its file and line."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knowedit.facts.fact import Fact, FactError, Probe
from knowedit.facts.records import read_facts, write_facts
from tests.knowedit.facts.examples import FRANCE, ITALY, drawn_facts, save

SUFFIXES = [".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz"]


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)
@given(
    st.lists(drawn_facts, min_size=1, max_size=4, unique_by=lambda f: (f.prompt, f.subject)),
    st.sampled_from(SUFFIXES),
)
def test_files_round_trip(tmp_path, written, suffix):
    path = tmp_path / f"facts{suffix}"
    write_facts(path, written)
    assert read_facts(path) == written


@pytest.mark.parametrize("suffix", SUFFIXES)
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
    path = save(
        tmp_path / "facts.csv",
        "prompt,subject,target,true,questions,neighbours\n",
        'The capital of {} is,France,Lyon,,What is it?,"[{""prompt"": ""Italy has"", '
        '""answer"": ""Rome""}]"\n',
    )
    (fact,) = read_facts(path)
    assert fact.true is None and fact.questions == ("What is it?",)
    assert fact.neighbours == (Probe("Italy has", "Rome"),)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [ITALY, {**FRANCE, "prompt": "The capital of Frnace is"}],
            r"facts\.jsonl:2: subject 'France' does not occur",
        ),
        ([ITALY, "\n", {**FRANCE, "target": " "}], r"facts\.jsonl:3: target is empty"),
        (
            [ITALY, FRANCE, FRANCE],
            r"facts\.jsonl:3: 'The capital of France is' repeats .*facts\.jsonl:2; remove",
        ),
        (
            [FRANCE, ITALY, {**FRANCE, "target": "Nice"}],
            r"jsonl:3: .*'Nice', which contradicts 'Lyon' of .*jsonl:1;",
        ),
        (
            [ITALY, {**FRANCE, "tagret": "x"}],
            r"facts\.jsonl:2: unknown field 'tagret'; did you mean 'target'",
        ),
        ([ITALY, '{"prompt": \n'], r"facts\.jsonl:2: not valid JSON at column 12"),
        ([ITALY, "[1]\n"], r"facts\.jsonl:2: a fact must be a JSON object, got list"),
        ([], r"facts\.jsonl: holds no facts"),
        (["\n"], r"facts\.jsonl: holds no facts"),
    ],
)
def test_errors_name_file_and_line(tmp_path, records, message):
    with pytest.raises(FactError, match=message):
        read_facts(save(tmp_path / "facts.jsonl", *records))


def test_json_errors_name_the_record(tmp_path):
    path = save(tmp_path / "facts.json", json.dumps([ITALY, {**FRANCE, "target": ""}]))
    with pytest.raises(FactError, match=r"facts\.json: record 2: target is empty"):
        read_facts(path)
    with pytest.raises(
        FactError, match=r"facts\.json: must hold a JSON list.*name the file \.jsonl"
    ):
        read_facts(save(path, FRANCE))
    with pytest.raises(FactError, match=r"facts\.json: not valid JSON at line 2, column"):
        read_facts(save(path, "[\n{]"))


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
        read_facts(save(tmp_path / "facts.csv", rows))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_bad_encoding_is_named_with_line_and_byte(tmp_path, pack):
    path = tmp_path / ("facts.jsonl" if pack is bytes else "facts.jsonl.gz")
    path.write_bytes(pack(json.dumps(ITALY).encode() + '\n{"prompt": "café'.encode("latin-1")))
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
