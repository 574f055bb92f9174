"""What follows from written facts, on a tiny model: what is asked, counted and shown (unit)."""

import json

import pytest

from benchmarks import common, portability
from benchmarks.portability import FIGURES, SETS, UNEDITED, Asked
from knowedit.facts.fact import Fact
from knowedit.methods import MEMIT
from knowedit.methods.registry import make_method

FACTS = [
    Fact("The capital of {} is", name, "Lyon", true="Paris", id=f"mquake:{number}:0")
    for number, name in enumerate(("France", "Norway"))
]
QUESTIONS = [("Which river runs through it?", "Rhone"), ("Who is its mayor?", "Ann")]
ASKED = [
    Asked(FACTS[0], QUESTIONS, ("the Rhone",), ("Who is the mayor of Lyon?", "Ann")),
    Asked(FACTS[1], QUESTIONS[:1]),
]


def test_what_is_asked_comes_from_the_set(tmp_path, monkeypatch):
    """Facts that others contradict, and those without a question, are left out."""
    cases = [
        {
            "case_id": number,
            "requested_rewrite": [
                {"prompt": "{} is led by", "subject": subject, "target_new": "Eve"}
            ],
            "questions": asked,
            "new_answer": "Rome",
            "new_answer_alias": ["Roma"],
            "new_single_hops": [
                {"question": "Who leads?", "answer": "Eve"},
                {"question": "Where is Eve?", "answer": "Rome"},
            ],
        }
        for number, (subject, asked) in enumerate(
            [
                ("Peru", ["Where?", "In which town?"]),
                ("Peru", ["Again?"]),
                ("Chad", []),
                ("Mali", ["?"]),
            ]
        )
    ]
    monkeypatch.setenv("KNOWEDIT_DATA", str(tmp_path))
    (tmp_path / "MQuAKE-CF-3k.json").write_text(json.dumps(cases))
    found = portability.asked_of("mquake", 5)
    assert [one.fact.subject for one in found] == ["Peru", "Mali"]
    assert found[0].answers == [("Where?", "Rome"), ("In which town?", "Rome")]
    assert found[0].aliases == ["Roma"] and found[0].hop == ("Where is Eve?", "Rome")
    assert found[0].prompts(False) == [
        "Question: Where?\nAnswer:",
        "Question: In which town?\nAnswer:",
    ]
    assert found[0].prompts(True)[0] == "Peru is led by Eve.\nQuestion: Where?\nAnswer:"
    assert len(portability.asked_of("mquake", 1)) == 1


@pytest.fixture
def rows(tiny_llama, tmp_path, own_cache, monkeypatch):
    """The rows of two methods, the second of which was measured by an earlier run."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"Some short text, number {i} of several." for i in range(30)))
    record = MEMIT(layers=(1,)).with_settings(["target.steps=2"]).to_dict()
    monkeypatch.setattr(portability, "make_method", lambda _: make_method(record))
    kept = []
    for methods in (("memit",), ("memit", "later")):
        report = common.Report(portability.NAME, tmp_path / "portability.jsonl")
        report.rows += kept
        portability.run(report, tiny_llama, {"mquake": ASKED}, methods, corpus, 300)
        kept = [json.loads(line) for line in report.output.read_text().splitlines()][1:]
    return kept


def test_rows_say_what_the_model_does(tiny_llama, rows, tmp_path):
    assert [row["method"] for row in rows] == [UNEDITED, "memit", "later"]
    assert not tiny_llama.ledger.active and rows[1]["figures"] == rows[2]["figures"]
    for row in rows:
        assert set(row["figures"]) == set(FIGURES) and set(row["figures"]["exact"]) == {"0", "1"}
    clean = rows[0]["figures"]
    prompts = ASKED[0].prompts(True)
    scores = tiny_llama.score(prompts, [answer for _, answer in QUESTIONS])
    assert clean["exact in context"]["0"] == sum(s.exact for s in scores) / 2
    (text,) = tiny_llama.generate(prompts[:1], portability.WORDS)
    assert clean["said in context"]["0"] == float("rhone" in text.lower())
    told = portability.table(tmp_path)
    assert SETS["mquake"] in told and "not the official file" in told
    assert told.count("| +0 [-84, +84] |") == 2  # no answer of two records has changed


def test_the_answer_is_found_where_it_stands(tiny_llama, monkeypatch):
    """A model that says the alias, and rates the answer of one question of two first."""
    monkeypatch.setattr(type(tiny_llama), "generate", lambda self, p, n: ["By the Rhone."] * len(p))
    found = portability.measured(tiny_llama, ASKED)
    assert found["said"] == {"0": 1.0, "1": 1.0} == found["said in context"]
    assert portability.known_hops(tiny_llama, ASKED) == []
    monkeypatch.setattr(type(tiny_llama), "generate", lambda self, p, n: ["It is Ann"] * len(p))
    assert portability.known_hops(tiny_llama, ASKED) == ["0"]


def test_a_change_is_that_of_each_record():
    assert portability.change({"0": 1.0, "1": 0.5}, {"0": 0.0, "1": 0.5}).startswith("+50 [")
    assert portability.change({"0": 1.0}, {"0": 0.0}) == "+100"
