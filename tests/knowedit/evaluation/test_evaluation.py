"""CounterFact's measures against their definitions, intervals against a second implementation,
and drift (unit).
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knowedit.errors import KnowEditError, ModelError
from knowedit.evaluation import Answer, drift, evaluate, evaluate_each
from knowedit.evaluation.evaluation import estimate, summarise
from knowedit.evaluation.measures.base import questions
from knowedit.evaluation.protocols import measure
from knowedit.facts.fact import Fact, Probe
from knowedit.models.fingerprint import weights_fingerprint
from knowedit.models.generation import Score
from tests.knowedit.edits.test_edit import an_edit

FACTS = [
    Fact(
        prompt="The capital of {} is",
        subject="France",
        target="Lyon",
        true="Paris",
        paraphrases=("France's capital is",),
        neighbours=(Probe("The capital of Italy is", "Rome"), Probe("The capital of Nowhere is")),
    ),
    Fact(prompt="The language of {} is", subject="Brazil", target="Norse"),
]


def test_questions_and_their_right_answers():
    found = [(q.kind, q.prompt, q.right, q.wrong) for q in questions(0, FACTS[0])]
    assert found == [
        ("efficacy", "The capital of France is", "Lyon", "Paris"),
        ("paraphrase", "France's capital is", "Lyon", "Paris"),
        ("neighbourhood", "The capital of Italy is", "Rome", "Lyon"),
    ]  # of Nowhere no answer is known
    assert [(q.kind, q.wrong) for q in questions(1, FACTS[1])] == [("efficacy", None)]


def test_an_answer_follows_the_definitions():
    answer = Answer(Score(math.log(0.3), True), Score(math.log(0.2), False))
    assert (answer.success, answer.exact) == (1.0, 1.0)
    assert answer.magnitude == pytest.approx(0.1)
    alone = Answer(Score(-1.0, False), None)
    assert math.isnan(alone.success) and math.isnan(alone.magnitude) and alone.exact == 0.0


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1)), min_size=1, max_size=40))
def test_records_count_equally(pairs):
    records, values = (np.array(x) for x in zip(*pairs))
    found = estimate(values, records, np.random.default_rng(0))
    wanted = np.mean([values[records == r].mean() for r in set(records.tolist())])
    assert found.mean == pytest.approx(wanted)
    assert found.low - 1e-9 <= found.mean <= found.high + 1e-9 and found.records == len(
        set(records.tolist())
    )


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        values = (rng.random(60) < 0.7).astype(float)
        found = estimate(values, np.arange(60), rng)
        inside += found.low <= 0.7 <= found.high
    assert 0.88 <= inside / 200 <= 0.99


def test_unchanged_compares_decisions():
    asked = questions(0, FACTS[0])[2:] * 2
    before = [Answer(Score(-1, True), Score(-2, False)), Answer(Score(-2, False), Score(-1, True))]
    after = [Answer(Score(-3, False), Score(-2, False)), Answer(Score(-9, False), Score(-1, True))]
    table = summarise(asked, after, np.random.default_rng(0), before)
    assert table["neighbourhood"]["unchanged"].mean == 0.5
    assert table["neighbourhood"]["success"].mean == 0.0


def test_evaluate_leaves_the_model_alone_and_sees_the_edit(tiny_llama):
    before = weights_fingerprint(tiny_llama.hf)
    edit = an_edit(tiny_llama, size=3.0)
    found = evaluate(tiny_llama, edit, FACTS)
    assert weights_fingerprint(tiny_llama.hf) == before
    with edit.applied_to(tiny_llama):
        wanted = tiny_llama.score(["The capital of France is"], ["Lyon"])[0].logprob
    assert found.answers_after[0].right.logprob == pytest.approx(wanted, rel=1e-5)
    assert found.answers_after[0].right.logprob != found.answers_before[0].right.logprob
    assert (
        len(found.rows()) == 5
        and "efficacy" in str(found)
        and found.to_dict()["after"]["paraphrase"]["exact"]
    )
    nowhere = found.questions[3]  # judged by what the unedited model says
    (said,) = tiny_llama.generate([nowhere.prompt], 3)
    assert (nowhere.prompt, nowhere.right) == ("The capital of Nowhere is", said.strip())


def test_each_fact_is_measured_under_its_own_edit(tiny_llama):
    edits = [an_edit(tiny_llama, seed, size=2.0) for seed in (1, 2)]
    together = evaluate_each(tiny_llama, edits, FACTS)
    alone = evaluate(tiny_llama, edits[1], FACTS[1:])
    assert together.answers_after[-1].right.logprob == pytest.approx(
        alone.answers_after[0].right.logprob, rel=1e-5
    )


def test_no_edit_measures_the_model_as_it_is(tiny_llama):
    found = evaluate(tiny_llama, None, FACTS)
    assert [a.right for a in found.answers_before] == [a.right for a in found.answers_after]


def test_drift_is_a_divergence(tiny_llama):
    prompts = ["Water boils at", "The moon goes", "A triangle has three"]
    nothing = an_edit(tiny_llama, size=0.0)
    assert (
        drift(tiny_llama, nothing, prompts).kl == 0.0
        and drift(tiny_llama, nothing, prompts).same == 1.0
    )
    moved = drift(tiny_llama, an_edit(tiny_llama, size=3.0), prompts)
    clean = tiny_llama.next_logprobs(prompts)
    with an_edit(tiny_llama, size=3.0).applied_to(tiny_llama):
        after = tiny_llama.next_logprobs(prompts)
    wanted = torch.nn.functional.kl_div(after, clean, log_target=True, reduction="none").sum(-1)
    assert moved.kl == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert moved.worst[0] == prompts[int(wanted.argmax())]


@pytest.mark.parametrize("bad", [{"methods": ["rom"]}, {"protocol": "batched"}])
def test_unknown_names_are_refused_before_anything_is_loaded(bad):
    arguments = {
        "name": "x",
        "dataset": "demo",
        "methods": ["memit"],
        "limit": None,
        "protocol": "batch",
    } | bad
    with pytest.raises(KnowEditError, match=r"unknown .*(known: |did you mean)"):
        list(measure(**arguments, corpus="self", tokens=10))


def test_what_cannot_be_evaluated(tiny_llama):
    with pytest.raises(KnowEditError, match=r"facts\[0\]: must be a Fact, got dict"):
        evaluate(tiny_llama, None, [FACTS[0].to_dict()])
    with pytest.raises(KnowEditError, match="must be a list of Fact, got Fact"):
        evaluate(tiny_llama, None, FACTS[0])
    with pytest.raises(KnowEditError, match="an edit is what .* got str"):
        evaluate(tiny_llama, "lyon.edit.safetensors", FACTS)
    with pytest.raises(KnowEditError, match="no facts to measure; give at least one"):
        evaluate(tiny_llama, None, [])


def test_a_model_of_nan_is_refused_and_not_scored(tiny_llama):
    tiny_llama.weight(1).data[0, 0] = math.nan
    with pytest.raises(ModelError, match="weights that are NaN"):
        next(tiny_llama.samples(batch=2, length=4))
    with pytest.raises(ModelError, match=r"gives no numbers \(NaN\) for \d+ of \d+ answers"):
        evaluate(tiny_llama, None, FACTS[1:], progress=False)
    with pytest.raises(ModelError, match=r"cannot generate: its probabilities are no numbers"):
        evaluate(tiny_llama, None, FACTS[:1], progress=False)  # asked what Nowhere's capital is
