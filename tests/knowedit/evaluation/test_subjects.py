"""The same-subject evaluation against its definitions, its intervals against what they must
cover (unit, data).
"""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch

from knowedit.errors import KnowEditError
from knowedit.evaluation.intervals import estimates
from knowedit.evaluation.measures.base import Answer
from knowedit.evaluation.subjects.same_subject import (
    FORMS,
    KEPT,
    Observation,
    SameSubjectEvaluation,
    compare,
    contains,
    evaluate_same_subject,
    judge,
    observe,
    prepare,
)
from knowedit.facts.fact import Fact, FactError, Probe
from knowedit.facts.groups import groups, halves, share_subjects
from knowedit.facts.sets import load
from knowedit.models.editable import EditableModel
from knowedit.models.fingerprint import weights_fingerprint
from knowedit.models.generation import Score
from tests.knowedit.edits.test_edit import an_edit
from tests.knowedit.methods.helpers import pair

BERN = [
    Fact(
        "The seat of {} is in",
        "Bern",
        "Rome",
        "Bonn",
        relation="P36",
        neighbours=(Probe("Peru sits in", "Lima"),),
    ),
    Fact("In {} they speak", "Bern", "Thai", relation="P37"),
]
ROUX = [
    Fact(
        "The work of {} is",
        "Roux",
        "art",
        "law",
        questions=("What does Roux do?",),
        paraphrases=("Roux does",),
    )
]


@pytest.fixture
def chatty(tiny_llama):
    """The tiny model with a chat template."""
    tokenizer = copy.deepcopy(tiny_llama.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if "
        "add_generation_prompt %}:{% endif %}"
    )
    return EditableModel(tiny_llama.hf, tokenizer, name="chatty")


def test_every_form_is_asked_for(chatty, tiny_llama):
    probes = prepare(chatty, [BERN, ROUX])
    assert probes.owner == [0, 0, 1] and probes.subjects == ["Bern", "Roux"]
    first = [q.kind for q in probes.questions if q.record == 0]
    assert (
        set(first) == {*FORMS, "neighbourhood"}
        and first.count("cloze") == 1
        and first.count("question") == 2
    )
    assert probes.greedy[0][1] == "<What is the capital of Bern? Answer with the name only.>:"
    once = prepare(chatty, [BERN, ROUX], wordings=1)
    assert sorted(q.kind for q in once.questions if q.record == 0) == sorted(
        {*FORMS, "neighbourhood"}
    )
    assert {kind for s, kind, _ in probes.kept if s == 1} == set(KEPT)
    plain = prepare(tiny_llama, [BERN, ROUX])
    assert {q.kind for q in plain.questions} == {
        "cloze",
        "paraphrase",
        "question",
        "distractor",
        "neighbourhood",
    }
    assert plain.greedy[2][1] == "Question: What does Roux do? Answer:"


@pytest.mark.parametrize("bad", [[], [[]], [[BERN[0], ROUX[0]]], [[BERN[0]], [BERN[1]]]])
def test_groups_have_one_subject_each(tiny_llama, bad):
    with pytest.raises(KnowEditError, match="one subject"):
        prepare(tiny_llama, bad)


def observed(probes, rights, wrongs, said, logits):
    answers = [
        Answer(Score(r, r > -1.5), None if q.wrong is None else Score(w, False))
        for q, r, w in zip(probes.questions, rights, wrongs)
    ]
    return Observation(answers, said, torch.as_tensor(logits).log_softmax(-1))


def test_values_follow_their_definitions(tiny_llama):
    probes = prepare(tiny_llama, [BERN], wordings=1)
    count, kept = len(probes.questions), len(probes.kept)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, kept, 9))
    before = observed(probes, [-2.0] * count, [-1.0] * count, ["Bonn", "Thai"], logits[0])
    rights = rng.normal(-2, 1, count)
    after = observed(probes, rights, [-2.0] * count, ["in ROME.", "Thailand"], logits[1])
    found = {(v.kind, v.measure, v.fact): v for v in judge(probes, before, after).values}
    for q, r in zip(probes.questions, rights):
        key = probes.facts[q.record].text
        assert found[q.kind, "exact", key].after == float(r > -1.5)
        if q.wrong is None:
            assert math.isnan(found[q.kind, "success", key].after)
        else:
            assert (
                found[q.kind, "success", key].after == float(r > -2)
                and found[q.kind, "success", key].before == 0.0
            )
            assert found[q.kind, "magnitude", key].after == pytest.approx(
                math.exp(r) - math.exp(-2), rel=1e-5
            )
    near = next(i for i, q in enumerate(probes.questions) if q.kind == "neighbourhood")
    assert found["neighbourhood", "unchanged", BERN[0].text].after == float(rights[near] <= -2)
    assert [found["greedy", "contains", f.text].after for f in BERN] == [1.0, 0.0]
    assert [found["greedy", "contains", f.text].before for f in BERN] == [0.0, 1.0]
    first, second = (torch.as_tensor(x).log_softmax(-1) for x in logits)
    wanted = torch.nn.functional.kl_div(second, first, log_target=True, reduction="none").sum(-1)
    for kind in KEPT:
        rows = [i for i, (_, k, _) in enumerate(probes.kept) if k == kind]
        assert found[kind, "kl", None].after == pytest.approx(float(wanted[rows].mean()))
        assert found[kind, "kept", None].after == np.mean(
            logits[0].argmax(-1)[rows] == logits[1].argmax(-1)[rows]
        )


def test_an_edit_is_measured_and_taken_back(chatty):
    groups_ = [BERN, ROUX]
    before = weights_fingerprint(chatty.hf)
    edit = an_edit(chatty, size=3.0)
    found = evaluate_same_subject(chatty, groups_, edit)
    assert weights_fingerprint(chatty.hf) == before
    probes = prepare(chatty, groups_)
    clean = observe(chatty, probes)
    with chatty.virtual({1: pair(chatty, edit, 1)}):
        virtual = judge(probes, clean, observe(chatty, probes))
    for one, other in zip(found.values, virtual.values):
        assert (one.kind, one.measure, one.fact) == (other.kind, other.measure, other.fact)
        if one.measure in ("kl", "magnitude"):
            assert one.after == pytest.approx(other.after, rel=1e-3, abs=1e-5, nan_ok=True)
    assert found.after["essence"]["kl"].mean > 0 and found.before["essence"]["kl"].mean == 0
    nothing = evaluate_same_subject(chatty, groups_, None, before=clean)
    assert nothing.after == nothing.before and nothing.after["neighbourhood"]["unchanged"].mean == 1
    assert found.sizes == {"Bern": 2, "Roux": 1} and {
        v.subject for v in found.of_size(1).values
    } == {"Roux"}
    with pytest.raises(KnowEditError, match="no subject has 3 facts"):
        found.of_size(3)
    again = SameSubjectEvaluation.from_dict(
        json.loads(json.dumps(found.to_dict(), allow_nan=False))
    )
    assert again.after == found.after and again.said == found.said and str(again) == str(found)
    with pytest.raises(KnowEditError, match="not a same-subject evaluation"):
        SameSubjectEvaluation.from_dict({"values": [{}]})


def test_facts_count_equally_and_subjects_are_resampled_whole():
    rng = np.random.default_rng(0)
    clusters = [str(i % 20) for i in range(60)]
    draw = {str(i): float(rng.random() < 0.5) for i in range(20)}
    dependent = estimates([("a", "m", c, draw[c]) for c in clusters])["a"]["m"]
    once = estimates([("a", "m", c, draw[c]) for c in draw])["a"]["m"]
    assert (dependent.low, dependent.high) == (
        once.low,
        once.high,
    )  # repeats of a subject's outcome tell nothing new
    assert dependent.records == 60 and dependent.mean == pytest.approx(once.mean)
    uneven = [("a", "m", "x", 1.0)] * 3 + [("a", "m", "y", 0.0), ("a", "m", "z", math.nan)]
    assert estimates(uneven)["a"]["m"].mean == 0.75


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(150):
        levels = rng.beta(2, 2, 40)
        found = estimates(
            [
                ("a", "m", str(s), float(rng.random() < p))
                for s, p in enumerate(levels)
                for _ in range(3)
            ]
        )
        inside += found["a"]["m"].low <= 0.5 <= found["a"]["m"].high
    assert 0.88 <= inside / 150 <= 0.99


def test_two_methods_are_compared_on_the_same_facts(tiny_llama):
    probes = prepare(tiny_llama, [BERN, ROUX])
    clean = observe(tiny_llama, probes)
    one, other = (
        evaluate_same_subject(
            tiny_llama, [BERN, ROUX], an_edit(tiny_llama, s, size=3.0), before=clean
        )
        for s in (1, 2)
    )
    difference = compare(one, other)
    for kind, row in difference.items():
        for measure, found in row.items():
            assert found.mean == pytest.approx(
                one.after[kind][measure].mean - other.after[kind][measure].mean, abs=1e-12
            )
            assert found.low <= found.mean + 1e-12 and found.mean <= found.high + 1e-12
    same = compare(one, one)["cloze"]["magnitude"]
    assert same.low == same.high == 0.0
    with pytest.raises(KnowEditError, match="not made on the same facts"):
        compare(one, one.of_size(1))


@pytest.mark.parametrize(
    "text, answer, wanted",
    [
        ("It is ROME, Italy.", "Rome", True),
        ("Romeo and Juliet", "Rome", False),
        ("the United States.", "United States", True),
        ("Ele nasceu em São Paulo", "São Paulo", True),
        ("首都是北京。", "北京", True),
        ("C++ it is", "C++", True),
        ("", "x", False),
    ],
)
def test_an_answer_contains_the_object_as_a_word(text, answer, wanted):
    assert contains(text, answer) is wanted


def test_groups_by_subject_with_further_neighbours():
    pool = [
        Fact("{} has its seat in", s, "x", "Bonn", relation="P36")
        for s in ("Bern", "Peru", "Chad", "Fiji")
    ]
    found = groups([*BERN, *ROUX, Fact("{}'s seat is", "Bern", "Oslo", relation="P36")], pool=pool)
    assert [[fact.subject for fact in group] for group in found] == [["Bern", "Bern"], ["Roux"]]
    prompts = [probe.prompt for probe in found[0][0].neighbours]
    assert prompts == ["Peru sits in", "Peru has its seat in", "Chad has its seat in"]
    named = groups([*BERN, ROUX[0], Fact("{} has", "Peru", "x", relation="P37")])
    assert named[0][0].neighbours == ()  # its only neighbour is now edited itself
    assert found[0][0].neighbours[1].answer == "Bonn" and found[0][1] == BERN[1]
    assert groups([*BERN, *ROUX], least=2) == [BERN] and groups(BERN, most=1) == [BERN[:1]]
    with pytest.raises(FactError, match="least must be at least 1"):
        groups(BERN, least=3, most=2)


def test_halves_share_no_subject_and_are_alike_in_size():
    grouped = groups(load("embedded"))
    one, other = halves(grouped)
    assert sorted(g[0].subject for g in one + other) == sorted(g[0].subject for g in grouped)
    assert abs(len(one) - len(other)) <= 1
    for size in range(1, 5):
        assert abs(sum(len(g) == size for g in one) - sum(len(g) == size for g in other)) <= 1
    assert halves(grouped) == (one, other) and halves(grouped, seed=1) != (one, other)


@pytest.mark.data
def test_the_public_groups(data):
    found = groups(load("same-subject"), least=3, pool=load("counterfact-flat"))
    assert len(found) == 19 and sum(map(len, found)) == 60
    assert sum(len(fact.neighbours) >= 1 for group in found for fact in group) >= 50
    subjects = tuple(group[0].subject + " " for group in found)
    assert not any(p.prompt.startswith(subjects) for g in found for f in g for p in f.neighbours)


def test_facts_share_subjects_where_half_of_them_do():
    named = {name: [Fact(f"{{}} has {n}", name, "x") for n in range(3)] for name in ("A", "B", "C")}
    others = [Fact("{} has it", f"S{n}", "x") for n in range(6)]
    assert share_subjects(named["A"]) and share_subjects([*named["A"], *others[:3]])
    assert share_subjects([*named["A"], *named["B"], *others])
    assert not share_subjects([*named["A"], *others[:4]])
    assert not share_subjects(others) and not share_subjects([])
