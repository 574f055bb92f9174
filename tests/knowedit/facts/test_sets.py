"""Fact sets: the embedded one keeps its promises, the public ones are read whole."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter

import pytest

from knowedit.facts import sets as datasets
from knowedit.facts.fact import Fact, FactError, Probe, check_facts, read_facts
from knowedit.facts.sets import conflict_free, data_dir, load
from knowedit.facts.wordings.relations import INSTRUCTIONS, SPLITS, probes, relations, wordings

EMBEDDED = load("embedded")
KINDS = ("paraphrases", "questions", "instructions")


def mentions(text: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


# -- the embedded set
# -------------------------------------------------------------------------------------------------


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
    assert read_facts(datasets.EMBEDDED) == EMBEDDED


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


@pytest.mark.parametrize("relation", relations())
def test_training_and_test_wordings_are_disjoint(relation):
    pools = relations()[relation]
    templates = [
        t for kind in ("paraphrases", "questions") for split in SPLITS for t in pools[kind][split]
    ]
    templates += [pools["prompt"]] if "prompt" in pools else []
    assert len({template.casefold() for template in templates}) == len(templates)
    for template in templates:
        assert template.count("{}") == 1 and template == template.strip()
    for kind in ("paraphrases", "questions"):
        assert pools[kind]["train"] and len(pools[kind]["test"]) >= 2
    assert all(q.endswith("?") for split in SPLITS for q in pools["questions"][split])
    assert len(set(pools["entities"])) == len(pools["entities"]) >= 8
    assert ("prompt" in pools) == any(fact.relation == relation for fact in EMBEDDED)


def test_instructions_and_probes_are_disjoint():
    assert not {t.partition("{}")[0] for t in INSTRUCTIONS["train"]} & {
        t.partition("{}")[0] for t in INSTRUCTIONS["test"]
    }
    for kind, pools in probes().items():
        assert len(pools["train"]) >= 3 and len(pools["test"]) >= 4
        assert not set(pools["train"]) & set(pools["test"]), kind
        assert all(t.count("{}") == 1 for split in SPLITS for t in pools[split])
    assert {pools["kind"] for pools in relations().values()} == set(probes()) - {"identity"}


def test_wordings_fill_the_subject_in():
    (fact,) = load("demo", limit=1)
    assert wordings(fact).questions == tuple(
        t.replace("{}", "France") for t in relations()["capital"]["questions"]["train"]
    )
    with pytest.raises(FactError, match="split must be one of train, test, got 'dev'"):
        wordings(fact, "dev")
    with pytest.raises(
        FactError, match="relation 'P35' of 'A b is' has no wordings; known relations: capital"
    ):
        wordings(Fact("A {} is", "b", "c", relation="P35"))
    found = wordings(Fact("{}, whose seat is in", "Bern", "x", relation="P36"))
    assert found.questions[0] == "Which city is the seat of government of Bern?"
    assert found.instructions[0] == "Fill in the blank: Bern, whose seat is in ____"


def test_demo_is_a_handful_of_different_facts():
    demo = load("demo")
    assert [fact.id for fact in demo] == list(datasets.DEMO) and len(demo) == 6
    assert len({fact.subject for fact in demo}) == len({fact.relation for fact in demo}) == 6
    assert set(demo) <= set(EMBEDDED)
    assert demo[0].text == "The capital of France is" and demo[0].target == "Lyon"
    assert load("demo", limit=2) == demo[:2]


@pytest.fixture(scope="module")
def scored(smollm_path):
    """`{(prompt, answer): (mean log-probability of the answer's tokens, whether its first word is
    the arg-max)}`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm_path)
    model = AutoModelForCausalLM.from_pretrained(smollm_path, dtype=torch.float32).eval()
    pairs = {(fact.text, text) for fact in EMBEDDED for text in (fact.true, fact.target)}
    pairs |= {
        (probe.prompt, text)
        for fact in EMBEDDED
        for probe in fact.neighbours
        for text in (probe.answer, fact.target)
    }
    rows = {
        pair: (tokenizer(pair[0]).input_ids, tokenizer(" " + pair[1]).input_ids) for pair in pairs
    }
    order = sorted(rows, key=lambda pair: (sum(map(len, rows[pair])), pair))
    result = {}
    for start in range(0, len(order), 64):
        batch = order[start : start + 64]
        width = max(sum(map(len, rows[pair])) for pair in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for row, pair in zip(
            ids, batch
        ):  # right padding: a causal model's earlier positions do not see it
            row[: sum(map(len, rows[pair]))] = torch.tensor(rows[pair][0] + rows[pair][1])
        with torch.no_grad():
            hidden = model.model(
                input_ids=ids, attention_mask=torch.ones_like(ids)
            ).last_hidden_state
            for row, pair in zip(hidden, batch):
                prompt, answer = rows[pair]
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
        for p in f.neighbours
    ]
    assert sum(kept) >= 0.9 * len(kept)


# -- loading
# ----------------------------------------------------------------------------------------------------------  # noqa: E501

FLAT = {
    "case_id": 7,
    "prompt": "The mother tongue of Ann Lee is",
    "target_new": "English",
    "subject": "Ann Lee",
    "ground_truth": "French",
    "rephrase_prompt": "Ann Lee grew up with",
    "locality_prompt": "Bob Roy speaks",
    "locality_ground_truth": "Dutch",
    "relation_id": "P103",
}
ROME = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Ann Lee",
    },
    "paraphrase_prompts": ["Ann Lee grew up with"],
    "neighborhood_prompts": ["Bob Roy speaks"],
    "attribute_prompts": [],
    "generation_prompts": [],
}
BASE = Fact(
    "The mother tongue of {} is",
    "Ann Lee",
    "English",
    "French",
    paraphrases=("Ann Lee grew up with",),
    neighbours=(Probe("Bob Roy speaks", "Dutch"),),
    relation="P103",
    id="counterfact:7",
)


def save(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


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


def test_broken_public_records_name_their_place(tmp_path):
    broken = ROME | {"requested_rewrite": {"prompt": "x", "subject": "y"}}
    with pytest.raises(
        FactError, match=r"facts\.jsonl:2: broken counterfact record \(KeyError: 'target_new'\)"
    ):
        load(save(tmp_path / "facts.jsonl", ROME, broken))


def test_records_without_their_subject_are_left_out_and_named(tmp_path, caplog):
    path = save(tmp_path / "facts.jsonl", FLAT, FLAT | {"subject": "Anne Lee"})
    assert load(path) == [BASE]
    assert (
        "left out 1 records" in caplog.text
        and "facts.jsonl:2: subject 'Anne Lee' does not occur" in caplog.text
    )
    with pytest.raises(FactError, match=r"facts\.jsonl:2: subject 'Anne Lee' does not occur"):
        read_facts(path)


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


def test_limits_and_empty_files(tmp_path):
    with pytest.raises(FactError, match="limit must be at least 1, got 0"):
        load("embedded", limit=0)
    assert load("embedded", limit=3) == EMBEDDED[:3]
    with pytest.raises(FactError, match="holds no facts"):
        load(save(tmp_path / "facts.jsonl"))


# -- the real files
# ---------------------------------------------------------------------------------------------------  # noqa: E501


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
