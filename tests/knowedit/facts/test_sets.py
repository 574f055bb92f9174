"""Unit: sets by name, and the promises of the embedded one; model: the default model knows its
facts.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter

import pytest

from knowedit.facts.fact import Fact, FactError, check_facts
from knowedit.facts.formats import named_sets
from knowedit.facts.records import read_facts
from knowedit.facts.sets import DEMO, conflict_free, data_dir, known_sets, load
from knowedit.facts.sets import EMBEDDED as EMBEDDED_FILE
from knowedit.facts.wordings.relations import relations, wordings
from tests.knowedit.facts.examples import BASE, FLAT, ROME, save

EMBEDDED = load("embedded")
KINDS = ("paraphrases", "questions", "instructions")


def mentions(text: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def test_embedded_counts():
    relations_of = Counter(fact.subject for fact in EMBEDDED)
    assert len(EMBEDDED) >= 110 and len(relations_of) >= 80
    assert sum(count >= 2 for count in relations_of.values()) >= 20
    assert len({fact.relation for fact in EMBEDDED}) >= 8
    assert len({fact.id for fact in EMBEDDED}) == len(EMBEDDED)
    assert len({(fact.subject, fact.relation) for fact in EMBEDDED}) == len(EMBEDDED)


def test_embedded_facts_can_be_written_together(caplog):
    with caplog.at_level(logging.WARNING):
        assert check_facts(EMBEDDED) == EMBEDDED
    assert not caplog.records
    assert read_facts(EMBEDDED_FILE) == EMBEDDED


@pytest.mark.parametrize("fact", EMBEDDED, ids=lambda fact: fact.id)
def test_every_embedded_fact_is_complete(fact):
    pools = relations()[fact.relation]
    assert fact.prompt == pools["prompt"] and not fact.prompt.startswith("{}")
    assert fact.true and fact.target != fact.true
    assert 2 <= len(fact.paraphrases) <= 3 and len(fact.questions) == len(fact.instructions) == 2
    test = wordings(fact, "test")
    assert all(getattr(fact, kind) == getattr(test, kind) for kind in KINDS)
    assert 3 <= len(fact.neighbours) <= 5 and len(
        {probe.prompt for probe in fact.neighbours}
    ) == len(fact.neighbours)
    for probe in fact.neighbours:
        assert probe.answer and probe.answer != fact.target
        assert not any(mentions(probe.prompt, other.subject) for other in EMBEDDED), probe


def test_demo_is_a_handful_of_different_facts():
    demo = load("demo")
    assert [fact.id for fact in demo] == list(DEMO) and len(demo) == 6
    assert len({fact.subject for fact in demo}) == len({fact.relation for fact in demo}) == 6
    assert set(demo) <= set(EMBEDDED)
    assert demo[0].text == "The capital of France is" and demo[0].target == "Lyon"
    assert load("demo", limit=2) == demo[:2]


@pytest.fixture(scope="module")
def scored(smollm):
    """`{(prompt, answer): (mean log-probability of the answer's tokens, whether its first word is
    the arg-max)}`.
    """
    import torch

    tokenizer, model = smollm.tokenizer, smollm.hf
    pairs = {(fact.text, text) for fact in EMBEDDED for text in (fact.true, fact.target)}
    pairs |= {
        (probe.prompt, text)
        for fact in EMBEDDED
        for probe in fact.neighbours[::12]
        for text in (probe.answer, fact.target)
    }
    tokens = {
        pair: (tokenizer(pair[0]).input_ids, tokenizer(" " + pair[1]).input_ids) for pair in pairs
    }
    # what is read before an answer's last token; answers of one prompt share most of it, so that a
    # row may serve several
    reads = {pair: (*prompt, *answer[:-1]) for pair, (prompt, answer) in tokens.items()}
    ordered = sorted(set(reads.values()))
    rows = [one for one, next_ in zip(ordered, [*ordered[1:], ()]) if next_[: len(one)] != one]
    rows.sort(key=len)
    served = {row[:end]: row for row in rows for end in range(1, len(row) + 1)}
    wanting: dict[tuple[int, ...], list[tuple[str, str]]] = {}
    for pair, read in reads.items():
        wanting.setdefault(served[read], []).append(pair)
    result = {}
    for start in range(0, len(rows), 64):
        batch = rows[start : start + 64]
        ids = torch.zeros(len(batch), len(batch[-1]), dtype=torch.long)
        for row, read in zip(
            ids, batch
        ):  # right padding: a causal model's earlier positions do not see it
            row[: len(read)] = torch.tensor(read)
        with torch.no_grad():
            hidden = model.model(
                input_ids=ids, attention_mask=torch.ones_like(ids)
            ).last_hidden_state
            for row, pair in (
                (h, pair) for h, read in zip(hidden, batch) for pair in wanting[read]
            ):
                prompt, answer = tokens[pair]
                logs = model.lm_head(
                    row[len(prompt) - 1 : len(prompt) + len(answer) - 1]
                ).log_softmax(-1)
                word = len(tokenizer(" " + pair[1].split()[0]).input_ids)
                right = logs.argmax(-1)[:word].tolist() == answer[:word]
                result[pair] = logs[range(len(answer)), answer].mean().item(), right
    return result


@pytest.mark.model
@pytest.mark.slow
def test_the_default_model_knows_the_embedded_facts(scored):
    for fact in EMBEDDED:
        assert scored[fact.text, fact.true][0] > scored[fact.text, fact.target][0], fact.id
    greedy = [scored[fact.text, fact.true][1] for fact in EMBEDDED]
    assert sum(greedy) >= 0.7 * len(greedy)
    assert all(scored[fact.text, fact.true][1] for fact in load("demo"))


@pytest.mark.model
@pytest.mark.slow
def test_the_default_model_knows_the_neighbours(scored):
    kept = [
        scored[p.prompt, p.answer][0] > scored[p.prompt, f.target][0]
        for f in EMBEDDED
        for p in f.neighbours[::12]  # a twelfth of them: each costs two forward passes
    ]
    assert sum(kept) >= 0.9 * len(kept)


def test_public_sets_may_hold_conflicts_and_own_files_may_not(tmp_path, caplog):
    path = save(tmp_path / "facts.jsonl", FLAT, FLAT, FLAT | {"target_new": "Greek"})
    assert len(load(path)) == 3 and "2 of 3 facts repeat or contradict" in caplog.text
    assert conflict_free(load(path)) == [BASE]
    own = BASE.to_dict()
    with pytest.raises(FactError, match=r"facts\.jsonl:2: .* repeats .*facts\.jsonl:1"):
        load(save(path, own, own))
    assert load(save(path, own)) == [BASE]


def test_conflict_free_needs_a_relation_or_the_prompt():
    facts = [
        Fact("A {} is", "x", "1"),
        Fact("B {} is", "x", "2"),
        Fact("A {} is", "x", "3"),
        Fact("A {} is", "y", "4"),
    ]
    assert [fact.target for fact in conflict_free(facts)] == ["1", "2", "4"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("contrfact", "'contrfact' is neither a file nor a known set; did you mean 'counterfact'"),
        ("qqqq", "known sets: demo, embedded, counterfact"),
        ("counterfact", r"needs counterfact\.json or .*put the file there, set KNOWEDIT_DATA"),
    ],
)
def test_absent_sets_say_what_to_do(tmp_path, monkeypatch, name, message):
    monkeypatch.setenv("KNOWEDIT_DATA", str(tmp_path))
    with pytest.raises(FactError, match=message):
        load(name)


def test_named_sets_come_from_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KNOWEDIT_DATA", str(tmp_path))
    assert data_dir() == tmp_path
    (tmp_path / "counterfact.json").write_text(json.dumps([ROME]))
    assert [fact.id for fact in load("counterfact")] == ["counterfact:7"]
    monkeypatch.setenv("KNOWEDIT_DATA", str(tmp_path / "none"))
    with pytest.raises(FactError, match=r"KNOWEDIT_DATA=.* is not a folder"):
        data_dir()


def test_without_the_variable_there_is_no_data_folder(monkeypatch):
    """Nothing is looked for beside the code."""
    monkeypatch.delenv("KNOWEDIT_DATA", raising=False)
    assert data_dir() is None
    assert [known.name for known in known_sets() if known.present] == ["demo", "embedded"]
    with pytest.raises(FactError, match="zsre_mend.* in the folder KNOWEDIT_DATA names; put the"):
        load("zsre")


def test_known_sets_say_what_is_here(tmp_path, monkeypatch):
    monkeypatch.setenv("KNOWEDIT_DATA", str(tmp_path))
    path = save(tmp_path / "known_1000_1209.jsonl.gz", "x")
    known = {found.name: found for found in known_sets()}
    assert list(known)[:3] == ["demo", "embedded", "counterfact"]
    assert known.keys() == {"demo", "embedded"} | {named.name for named in named_sets()}
    assert (known["known1000"].path, known["known1000"].size) == (path, 1)
    assert known["known1000"].files == ("known_1000.json", "known_1000_1209.jsonl.gz")
    assert not known["zsre"].present and known["zsre"].path is known["zsre"].size is None
    assert known["embedded"].size == EMBEDDED_FILE.stat().st_size
    assert known["embedded"].what.startswith(f"{len(EMBEDDED)} counterfactuals")
    assert load(known["embedded"].path) == EMBEDDED


def test_limits_and_empty_files(tmp_path):
    with pytest.raises(FactError, match="limit must be at least 1, got 0"):
        load("embedded", limit=0)
    assert load("embedded", limit=3) == EMBEDDED[:3]
    with pytest.raises(FactError, match="holds no facts"):
        load(save(tmp_path / "facts.jsonl"))
